"""Detection of an export in progress, for modules that then compute differently."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Returns True while `torch.export` records a graph.

    Tensors then hold no values, results must not be cached, and the device of the tensors is not
    the one that will run the graph.
    """
    query = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return query is not None and query()
