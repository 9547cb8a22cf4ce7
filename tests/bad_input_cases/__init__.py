"""The malformed inputs of tools/bad_inputs.py, one module a kind."""
