"""One stage with parallel auxiliary copies: the decoders of ASAG."""
