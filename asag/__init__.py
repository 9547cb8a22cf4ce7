"""Sparse, query-based object detectors on Detectron2; importing it registers models and data."""

from . import data, modeling
from .config import add_asag_config, get_asag_cfg
from .config_loading import load_config

__version__ = "0.1.0"
__all__ = ["add_asag_config", "data", "get_asag_cfg", "load_config", "modeling"]
