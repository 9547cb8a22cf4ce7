"""Sparse, query-based object detectors on Detectron2."""
