"""Drawings of detections and learning curves."""

from .curves import plot_curves
from .detections import class_color, draw_comparison, draw_detections

__all__ = ["class_color", "draw_comparison", "draw_detections", "plot_curves"]
