"""Comparisons of alternative implementations, and arguments that all benchmarks share."""
