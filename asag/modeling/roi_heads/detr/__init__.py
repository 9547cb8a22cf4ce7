"""Transformer decoders of DETR and Conditional DETR."""
