"""Sparse, query-based object detectors on Detectron2; importing the package registers them."""

from . import modeling
from .config import add_asag_config, get_asag_cfg, load_config

__version__ = "0.1.0"
__all__ = ["add_asag_config", "get_asag_cfg", "load_config", "modeling"]
