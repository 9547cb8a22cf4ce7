"""Writing of ONNX files through `torch.export`."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from .detector import OUTPUTS, ExportableDetector

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT = "images"
MAX_BATCH = 1024  # of a dynamic batch; torch requires a bound, the file has none


class ExportError(RuntimeError):
    """The model cannot be exported; the message says why."""


def require_packages() -> None:
    """Raises ExportError if a package is missing or torch is too old."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {', '.join(missing)}: pip install asag[export]")
    if not hasattr(torch.compiler, "is_exporting"):
        raise ExportError(f"export needs torch 2.7 or newer, this is {torch.__version__}")


def describe(
    cfg: CfgNode, *, config_name: str, class_names: Sequence[str], version: str
) -> dict[str, str]:
    """Returns metadata of a model, in addition to those of `export_onnx`.

    Args:
        cfg: of the model.
        config_name: name of its file.
        class_names: label -> name.
        version: of this library.
    """
    return {
        "library": f"asag {version}",
        "config": config_name,
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
    }


def export_onnx(
    detector: ExportableDetector,
    path: Path,
    *,
    batch: int | None = 1,
    opset: int | None = None,
    description: dict[str, str] | None = None,
) -> None:
    """Writes one file with graph, weights and metadata; `check_onnx` verifies it.

    Args:
        detector: the model to write.
        path: of the file.
        batch: images of a batch; None: dynamic.
        opset: version of the ONNX operators; None: the default of torch.
        description: further metadata.

    Raises:
        ExportError: a package is missing, or torch cannot export the model.
    """
    require_packages()
    device = detector.whwh.device
    images = torch.zeros(batch or 2, 3, *detector.size, device=device)
    free = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)} if batch is None else None
    try:
        # torch prints its progress; tracing inside of `no_grad` keeps grad mode out of the graph.
        with torch.no_grad(), redirect_stdout(io.StringIO()):
            program = torch.export.export(detector, (images,), dynamic_shapes=(free,), strict=False)
            onnx_program = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                opset_version=opset,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
                verbose=False,
            )
    except Exception as error:  # torch.export raises many kinds of exceptions
        hint = "; a fixed batch asks less of it" if batch is None else ""
        raise ExportError(f"torch cannot export this model{hint}: {error}") from error
    metadata = _metadata(detector, batch) | (description or {})
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(str(path), external_data=False)


def _metadata(detector: ExportableDetector, batch: int | None) -> dict[str, str]:
    height, width = detector.size
    threshold = detector.model.nms_threshold
    values: dict[str, Any] = {
        "height": height,
        "width": width,
        "batch": batch or "dynamic",
        "color_order": "RGB",
        "value_range": "0 to 255",
        "normalization": "inside",
        "boxes": "xyxy in pixels of the input",
        "nms": f"class-wise, inside, IoU above {threshold}" if threshold > 0 else "none",
    }
    return {name: str(value) for name, value in values.items()}


def _stable_sort() -> Any:
    """Translates torch's stable sort, for which torch has no translation.

    TopK of ONNX is stable: it puts the lower index first among equal values.
    """
    from onnxscript import opset18 as op

    # Without annotations, which torch would interpret as ONNX types.
    def sort(self, stable=None, dim=-1, descending=False):
        length = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]), axis=0)
        return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)

    return sort
