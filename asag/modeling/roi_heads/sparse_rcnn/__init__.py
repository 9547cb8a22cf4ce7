"""Dynamic convolution stages: Sparse R-CNN and its descendants."""
