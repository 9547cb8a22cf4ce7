"""Cases of malformed input, one module for each kind; `tools/bad_inputs.py` runs them."""
