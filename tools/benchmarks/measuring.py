"""Arguments that all benchmarks share, and the device that they ran on."""

from __future__ import annotations

import argparse
import platform

import torch


def image_size(text: str) -> tuple[int, int]:
    """ "800x1216" -> (800, 1216), height first.

    Raises:
        argparse.ArgumentTypeError: not two positive numbers.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 800x1216")
    return int(height), int(width)


def positive(text: str) -> int:
    """A whole number above zero.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def device_name(device: str) -> str:
    """What the times were taken on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU ({torch.get_num_threads()} threads)"
