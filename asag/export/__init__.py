"""Export of trained detectors to ONNX, and comparison of the file with the detector."""

from .check import Agreement, Tolerance, check_onnx
from .detector import ExportableDetector
from .onnx_file import ExportError, describe, export_onnx
from .pictures import generated_pictures, read_pictures

__all__ = [
    "Agreement",
    "ExportError",
    "ExportableDetector",
    "Tolerance",
    "check_onnx",
    "describe",
    "export_onnx",
    "generated_pictures",
    "read_pictures",
]
