"""One module a suite of reference tensors; `tools/verify.py` walks folders and calls them."""
