"""Argument types that the benchmarks share, and the name of the device."""

from __future__ import annotations

import argparse
import platform

import torch


def image_size(text: str) -> tuple[int, int]:
    """Parses "HEIGHTxWIDTH".

    Returns:
        Height and width in pixels.

    Raises:
        argparse.ArgumentTypeError: these are not two positive numbers.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) * int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 800x1216")
    return int(height), int(width)


def positive(text: str) -> int:
    """Parses a positive whole number.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def device_name(device: str) -> str:
    """Returns the name of the GPU, or of the CPU with its number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU ({torch.get_num_threads()} threads)"
