"""Counting of parameters and multiply-adds, and metrics by stage."""
