"""Counting parameters and multiply-adds of detectors, and the metrics of their stages."""
