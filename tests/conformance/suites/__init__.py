"""Suites of reference tensors, one module for each."""
