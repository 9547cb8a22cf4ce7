"""Detection of an export in progress, for modules that compute differently then."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether `torch.export` is recording: tensors then hold no numbers, nothing may be kept for
    later calls, and the device that will run the graph is not the one at hand."""
    asked = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return asked is not None and asked()
