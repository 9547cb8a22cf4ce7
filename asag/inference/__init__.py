"""Detection in images and videos with a trained model."""
