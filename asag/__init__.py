"""Sparse, query-based object detectors on Detectron2; importing it registers models and data."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():
    # fvcore scripts its losses when it is imported; torch's advice is for its authors.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

    from . import data, modeling
    from .config import add_asag_config, get_asag_cfg
    from .config.loading import load_config

if TYPE_CHECKING:
    from . import model_zoo
    from .inference.detector import Detections, Detector

__version__ = "0.1.0"
__all__ = [
    "Detections",
    "Detector",
    "add_asag_config",
    "data",
    "get_asag_cfg",
    "load_config",
    "model_zoo",
    "modeling",
]

# Training needs none of these: they are imported when they are first asked for.
_LATE = {
    "Detections": ".inference.detector",
    "Detector": ".inference.detector",
    "model_zoo": ".model_zoo",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATE[name], __name__)
    return module if name == "model_zoo" else getattr(module, name)
