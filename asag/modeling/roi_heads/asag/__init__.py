"""Decoders of ASAG: one stage with parallel auxiliary copies."""
