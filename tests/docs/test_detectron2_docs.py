"""The code in docs/detectron2.md runs."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from engine_support import register_tiny_shapes

from asag.modeling import SparseDetector

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/detectron2.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def block(mark: str) -> str:
    (found,) = [text for text in BLOCKS if mark in text]
    return found


def options(folder: Path, **changes: object) -> list[str]:
    values = {
        "OUTPUT_DIR": folder,
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        "DATASETS.TRAIN": "('engine_shapes_train',)",
        "DATASETS.TEST": "('engine_shapes_val',)",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 3,
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
    } | changes
    return [str(word) for pair in values.items() for word in pair]


def run_script(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict:
    script = folder / "train.py"
    script.write_text(block("# train.py"), encoding="utf-8")
    config = ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml"
    words = [str(script), "--config-file", str(config), *arguments, *options(folder)]
    monkeypatch.setattr(sys, "argv", words)
    return runpy.run_path(str(script), run_name="__main__")


def test_the_script_trains_resumes_and_evaluates(tmp_path, monkeypatch):
    assert len(block("# train.py").splitlines()) <= 50
    register_tiny_shapes()
    module = run_script(tmp_path, monkeypatch)
    assert (tmp_path / "model_final.pth").is_file()
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 2
    run_script(tmp_path, monkeypatch, "--resume")
    parse = module["default_argument_parser"]().parse_args
    config = str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
    weights = {"MODEL.WEIGHTS": tmp_path / "model_final.pth"}
    arguments = parse(["--config-file", config, "--eval-only", *options(tmp_path, **weights)])
    assert "AP" in module["main"](arguments)["bbox"]


def test_components_for_other_projects():
    names: dict = {}
    exec(compile(block("OptimalTransportMatcher(cost"), "detectron2.md", "exec"), names)
    assert names["assignment"].shape == (6, 2, 100)
    assert (names["assignment"][:, 0] >= 0).any() and (names["assignment"][:, 1] == -1).all()
    assert names["predictions"].logits.grad.isfinite().all()


def test_lazy_config_builds_a_detector():
    names: dict = {"__name__": "lazy_model"}
    exec(compile(block("LazyCall as L"), "detectron2.md", "exec"), names)
    lazy = names["model"]
    lazy.roi_heads.num_stages = 2
    model = instantiate(lazy).eval()
    assert isinstance(model, SparseDetector) and len(model.roi_heads.stages) == 2
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])
    assert 0 < len(output["instances"]) <= 100
