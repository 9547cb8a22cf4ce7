"""Transformer decoders: DETR and Conditional DETR."""
