"""Conformance with tensors of the reference implementations; `tools/verify.py` is its command."""
