"""Diagnostics of training: overfit check, replay of non-finite steps, profilers."""
