"""Pictures of what a detector sees and how it learns."""

from .curves import plot_curves
from .detections import class_color, draw_comparison, draw_detections

__all__ = ["class_color", "draw_comparison", "draw_detections", "plot_curves"]
