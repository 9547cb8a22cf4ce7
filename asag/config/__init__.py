"""Configuration: keys with their defaults, loading of files, and rules for the values."""

from .defaults import add_asag_config, get_asag_cfg
from .loading import CONFIG_FOLDERS, differences, find_config, leaves, load_config
from .rules import check_config

__all__ = [
    "CONFIG_FOLDERS",
    "add_asag_config",
    "check_config",
    "differences",
    "find_config",
    "get_asag_cfg",
    "leaves",
    "load_config",
]
