"""Every configuration of this library by name, with what is known of it.

    >>> from asag import model_zoo
    >>> model_zoo.names()                                         # what there is
    >>> model_zoo.entry("conditional_detr_r50_50ep").figures      # parameters, multiply-adds, ...
    >>> model = model_zoo.get("sparse_rcnn_tiny_shapes", pretrained=True)
    >>> model = model_zoo.get("sparse_rcnn_r50_100pro_3x", pretrained="downloaded.pth")

Names are those of the files in `configs/` without the suffix, and those of the weights that come
with the library. What the papers claim stands in `published.json`, each figure with its table.
What this library's own code measures stands in `figures.json`, which `tools/make_model_zoo.py`
writes together with MODEL_ZOO.md. Nothing is computed at import.
"""

from .entries import PHOTOGRAPHS, Claim, Entry, entry, names
from .loading import choose_device, config, get, locate

__all__ = [
    "PHOTOGRAPHS",
    "Claim",
    "Entry",
    "choose_device",
    "config",
    "entry",
    "get",
    "locate",
    "names",
]
