#!/usr/bin/env python3
"""Checks the installation and prints what is wrong and how to fix it.

    python tools/doctor.py        (or: make doctor)

Every line starts with `ok`, `note` (works with a limitation) or `WRONG` (a required part does not
work); the remedy follows on the next line. The exit code is 1 if a line is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

MINIMUM_PYTHON = (3, 10)
TINY_CONFIG = "SparseRCNN/sparse_rcnn_tiny.yaml"  # of a checkout or an installed package

TESTED_DETECTRON2 = (
    "v0.5 (the compatibility wheel) and official main at 02b5c4e of 2026-06-06 (version 0.6)"
)
INSTALL_PACKAGE = "python -m pip install --no-build-isolation --no-deps -e ."
INSTALL_DETECTRON2 = "python tools/setup/install_detectron2.py"


class Line(NamedTuple):
    """One finding: `status` is "ok", "note" or "WRONG"; `remedy` is empty where none is needed."""

    status: str
    text: str
    remedy: str = ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Line]:
    """Checks the version of the interpreter."""
    text = f"Python {platform.python_version()} at {sys.executable}, {platform.platform()}"
    if sys.version_info[:2] < MINIMUM_PYTHON:
        yield Line("WRONG", text, "Python 3.10 or newer is needed: make setup PYTHON=python3.11")
    else:
        yield Line("ok", text)


def check_packages() -> Iterator[Line]:
    """Checks required and optional packages against the declared version ranges."""
    declared = importlib.metadata.requires("asag") if _version("asag") else None
    if declared is None:
        yield Line(
            "WRONG", "the package asag is not installed", f"in the checkout: {INSTALL_PACKAGE}"
        )
        return
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Line("WRONG", "packaging is missing", "python -m pip install packaging")
        return
    yield Line("ok", f"asag {_version('asag')}")
    for requirement in map(Requirement, declared):
        extra = _extra_of(requirement.marker)
        if extra == "dev":
            continue
        found = _version(requirement.name)
        if found and requirement.specifier.contains(found, prereleases=True):
            yield Line("ok", f"{requirement.name} {found}")
            continue
        required = f"{requirement.name}{requirement.specifier}"
        text = f"{requirement.name} {found or 'is missing'}" + (
            f", required is {required}" if found else ""
        )
        remedy = f"python -m pip install '{required}'"
        if extra:
            yield Line("note", f"{text} (optional, extra '{extra}')", remedy)
        else:
            yield Line("WRONG", text, remedy)


def _extra_of(marker: object) -> str:
    """Returns the extra in a marker such as `extra == "fast"`; empty for none."""
    left, _, right = str(marker or "").partition("extra ==")
    return right.strip().strip("\"'") if not left.strip() else ""


def check_torchvision() -> Iterator[Line]:
    """Checks that torchvision's compiled operators work with the installed PyTorch."""
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
    except Exception as error:
        yield Line(
            "WRONG",
            f"torchvision's operators do not work: {_brief(error)}",
            "install a matching pair, such as the one in requirements.txt",
        )
    else:
        pair = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
        yield Line("ok", f"torchvision's operators fit torch ({pair})")


def detectron2_origin(version: str | None, compiled: bool) -> str:
    """Describes the installed Detectron2.

    Args:
        version: of the installed distribution; None for a source tree.
        compiled: True if the module `_C` is a compiled extension.
    """
    if version is not None and "+purepy" in version:
        return "the compatibility wheel of v0.5, without compiled operators"
    if compiled:
        return "official build with compiled operators"
    return "official Python sources without compiled operators"


def check_detectron2() -> Iterator[Line]:
    """Checks that the parts of Detectron2 that this library uses can be imported."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        yield Line("WRONG", "detectron2 is not installed", INSTALL_DETECTRON2)
        return
    folder = Path(spec.origin).parent
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    compiled = any(path.name.endswith(suffixes) for path in folder.glob("_C*"))
    version = _version("detectron2")
    text = f"detectron2 {version or '(version unknown)'}: {detectron2_origin(version, compiled)}"
    try:
        for name in ("config", "modeling", "data", "engine", "evaluation", "checkpoint"):
            importlib.import_module(f"detectron2.{name}")
        if compiled:
            importlib.import_module("detectron2._C")
    except Exception as error:
        yield Line(
            "WRONG",
            f"{text}, in {folder}, does not import: {_brief(error)}",
            "rebuild it against the installed torch, or remove it "
            f"(python -m pip uninstall detectron2) and run {INSTALL_DETECTRON2}",
        )
        return
    yield Line("ok", f"{text}, in {folder}")
    if version and version.split("+")[0] in ("0.5", "0.6"):
        yield Line("ok", f"the tests of asag pass on {TESTED_DETECTRON2}")
    else:
        yield Line(
            "note",
            f"this Detectron2 was not tested; the tests of asag pass on {TESTED_DETECTRON2}",
            "python -m pytest tests/detectron2_host/test_detectron2_host.py",
        )
    zoo = folder / "model_zoo" / "model_zoo.py"
    needs_pkg_resources = zoo.is_file() and "import pkg_resources" in zoo.read_text()
    if needs_pkg_resources and importlib.util.find_spec("pkg_resources") is None:
        yield Line(
            "note",
            f"detectron2.model_zoo cannot be imported with setuptools {_version('setuptools')} "
            "(asag does not use it)",
            "where your own code does: python -m pip install 'setuptools<82'",
        )


def check_devices() -> Iterator[Line]:
    """Checks CPU threads and GPUs, with a computation on every GPU."""
    try:
        import torch
    except Exception as error:
        yield Line("WRONG", f"torch does not import: {_brief(error)}", "make setup")
        return
    yield Line("ok", f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU torch"
        )
        if driver:
            yield Line(
                "note",
                f"driver {driver} is there but torch sees no GPU ({built})",
                "update the driver, or install the torch build for it; check CUDA_VISIBLE_DEVICES",
            )
        else:
            yield Line("note", f"no GPU ({built}): everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = (
            f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability "
            f"{gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}, driver {driver or 'unknown'}"
        )
        try:
            torch.ones(64, 64, device=f"cuda:{index}").mm(
                torch.ones(64, 64, device=f"cuda:{index}")
            )
            torch.cuda.synchronize(index)
        except Exception as error:
            yield Line(
                "WRONG",
                f"{text}, cannot compute: {_brief(error)}",
                "install a torch build for this GPU, or hide the GPU with CUDA_VISIBLE_DEVICES",
            )
        else:
            bf16 = "bf16" if gpu.major >= 8 else "no native bf16: train with fp16 or fp32"
            yield Line("ok", f"{text}, {bf16}")


def _nvidia_driver() -> str | None:
    """Returns the driver version that nvidia-smi reports; None without a working driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.split()[0] if result.returncode == 0 and result.stdout.strip() else None


def check_step(config: Path | str = TINY_CONFIG) -> Iterator[Line]:
    """Runs one training step and one inference of a tiny Sparse R-CNN."""
    try:
        from asag import load_config
        from asag.config import find_config

        import torch

        cfg = load_config(str(find_config(str(config))))
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
        losses, detections = _train_and_detect(cfg)
    except Exception as error:
        yield Line(
            "WRONG",
            f"one step of {config} fails: {_brief(error)}",
            "fix the lines above first; for the full traceback: python -m pytest tests -x",
        )
        return
    total = sum(losses.values())
    yield Line(
        "ok",
        f"one training step on {cfg.MODEL.DEVICE} (loss {total:.2f} of {len(losses)} terms) "
        f"and one inference ({detections} detections)",
    )


def _train_and_detect(cfg: object) -> tuple[dict[str, float], int]:
    """Runs one SGD step and one inference.

    Returns:
        The losses, and the number of detections.

    Raises:
        ArithmeticError: a loss, a gradient or a detected box is not finite.
    """
    import torch
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances

    model = build_model(cfg)
    instances = Instances((96, 128))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 60.0, 72.0]]))
    instances.gt_classes = torch.tensor([0])
    image = {"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)}

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = model.train()([{**image, "instances": instances}])
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients or not all(torch.isfinite(g).all() for g in gradients):
        raise ArithmeticError("no gradients, or gradients that are not finite")
    optimizer.step()
    with torch.no_grad():
        (output,) = model.eval()([{**image, "height": 96, "width": 128}])
    boxes = output["instances"].pred_boxes.tensor
    if not torch.isfinite(boxes).all():
        raise ArithmeticError("detected boxes are not finite")
    return {name: float(loss) for name, loss in losses.items()}, len(boxes)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


CHECKS: dict[str, Callable[[], Iterator[Line]]] = {
    "Python": check_python,
    "Packages": check_packages,
    "Compiled operators": check_torchvision,
    "Detectron2": check_detectron2,
    "Devices": check_devices,
    "A real step": check_step,
}


def main() -> int:
    """Runs all checks; returns the exit code."""
    warnings.filterwarnings("ignore")
    wrong = 0
    for title, check in CHECKS.items():
        print(f"\n{title}")
        for line in check():
            wrong += line.status == "WRONG"
            print(f"  {line.status:<6} {line.text}")
            if line.remedy:
                print(f"         -> {line.remedy}")
    print(f"\n{wrong} line(s) wrong" if wrong else "\nAll required parts work")
    return 1 if wrong else 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help alone
    sys.exit(main())
