"""Benchmarks of alternative implementations of one component."""
