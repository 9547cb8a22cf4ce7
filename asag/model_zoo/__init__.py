"""Every configuration of this library by name, with what is known of it.

    >>> from asag import model_zoo
    >>> model_zoo.names()                                         # what there is
    >>> model_zoo.entry("conditional_detr_r50_50ep").figures      # parameters, multiply-adds, ...
    >>> model = model_zoo.get("sparse_rcnn_tiny_shapes", pretrained=True)    # comes along
    >>> model = model_zoo.get("sparse_rcnn_r50_300pro_3x_mmdet", pretrained=True)  # is downloaded
    >>> model = model_zoo.get("asag_a_r50_100_1x", pretrained="downloaded.pth")

Names are those of the files in `configs/` without the suffix, and those of weights: of the ones
that come with the library, and of the ones that others published. What the papers claim, and where
weights are, stands in `published.json`.
What this library's own code measures stands in `figures.json`, which `tools/make_model_zoo.py`
writes together with MODEL_ZOO.md. Nothing is computed at import.
"""

from .entries import PHOTOGRAPHS, Claim, Entry, Release, entry, names
from .loading import choose_device, config, get, locate

__all__ = [
    "PHOTOGRAPHS",
    "Claim",
    "Entry",
    "Release",
    "choose_device",
    "config",
    "entry",
    "get",
    "locate",
    "names",
]
