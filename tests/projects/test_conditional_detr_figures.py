"""Attention maps and convergence: their numbers follow from the model and the metrics."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from asag import load_config
from asag.structures import ImageSizes

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "projects" / "ConditionalDETR"
CONDITIONAL = ROOT / "configs/ConditionalDETR/conditional_detr_tiny.yaml"
PLAIN = ROOT / "configs/DETR/detr_tiny.yaml"
SPARSE = ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml"


def script(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(name, PROJECT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def attention_maps() -> Iterator[ModuleType]:
    yield from script("attention_maps")


@pytest.fixture(scope="module")
def convergence() -> Iterator[ModuleType]:
    yield from script("convergence")


def build(path: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(load_config(str(path), ["MODEL.DEVICE", "cpu"])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("stage", [0, 1, -1])
@pytest.mark.parametrize("path", [CONDITIONAL, PLAIN])
def test_combined_maps_are_the_attention(
    attention_maps: ModuleType, path: Path, stage: int
) -> None:
    model, image = build(path), torch.rand(3, 96, 128) * 255
    seen = attention_maps.explain(model, image, stage, query=4)
    weights = []
    attention = model.roi_heads.stages[stage].cross_attention
    hook = attention.register_forward_hook(lambda m, args, _: weights.append(m.weights(*args)))
    images = model.preprocess_images([{"image": image}])
    with torch.no_grad():
        model.forward_stages(images.tensor, ImageSizes.from_images(images))
    hook.remove()
    assert torch.allclose(seen.maps["combined"].flatten(1), weights[0][0, :, 4], atol=1e-5)
    for kind in attention_maps.KINDS:
        assert torch.allclose(seen.maps[kind].sum((1, 2)), torch.ones(4), atol=1e-5)
    # Of a product of exponentials, normalized: combined is spatial times content.
    product = seen.maps["spatial"] * seen.maps["content"]
    product /= product.sum((1, 2), keepdim=True)
    assert torch.allclose(seen.maps["combined"], product, atol=1e-5)
    assert (seen.point_xy is None) == (path == PLAIN)


def test_other_detectors_and_wrong_indices_are_refused(attention_maps: ModuleType) -> None:
    image = torch.rand(3, 64, 64)
    with pytest.raises(ValueError, match="DynamicConvHeads"):
        attention_maps.explain(build(SPARSE), image)
    model = build(CONDITIONAL)
    with pytest.raises(ValueError, match="no stage 3"):
        attention_maps.explain(model, image, stage=3)
    with pytest.raises(ValueError, match="no query 50"):
        attention_maps.explain(model, image, query=50)


def test_command_line_draws_maps(
    attention_maps: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    picture, output = tmp_path / "in.png", tmp_path / "new" / "maps.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(picture)
    given = ["--config", str(CONDITIONAL), "--image", str(picture), "--output", str(output)]
    assert attention_maps.main([*given, "--heads", "0", "2"]) == 0
    assert "query" in capsys.readouterr().out
    assert Image.open(output).size[0] > 200
    assert attention_maps.main([*given, "--heads", "9"]) == 1
    assert "no heads [9]" in capsys.readouterr().err


def metrics(path: Path, values: dict[int, float]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"iteration": i, "bbox/AP": v, "total_loss": 1.0}) for i, v in values.items()
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_levels_are_read_between_evaluations(convergence: ModuleType) -> None:
    points = [(100, 10.0), (200, 30.0), (300, 20.0), (400, 50.0)]
    assert convergence.reached(points, 5) == 100
    assert convergence.reached(points, 20) == 150
    assert convergence.reached(points, 40) == pytest.approx(366.67, abs=0.01)
    assert convergence.reached(points, 60) is None


def test_command_line_compares_runs(
    convergence: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fast = metrics(tmp_path / "fast/metrics.json", {100: 20.0, 200: 40.0})
    slow = metrics(tmp_path / "slow/metrics.json", {100: 5.0, 400: 20.0})
    output, losses = tmp_path / "curves.png", tmp_path / "losses.png"
    runs = [f"A={fast}", f"B={slow}", "--output", str(output)]
    status = convergence.main([*runs, "--losses", str(losses), "--levels", "20", "30"])
    printed = capsys.readouterr().out
    assert status == 0 and output.is_file() and losses.is_file()
    assert "| 20 | 100 | 400 (4.00x) |" in printed
    assert "| 30 | 150 | > 400 (> 2.67x) |" in printed
    assert "| best | 40.00 | 20.00 |" in printed
    assert convergence.main([f"A={fast}", f"B={slow}", "--output", str(output)]) == 0
    assert "| 18 |" in capsys.readouterr().out  # nine tenths of the weaker run


@pytest.mark.parametrize(
    ("runs", "message"),
    [(["nothing"], "NAME=metrics.json"), (["A=absent.json"], "absent.json")],
)
def test_wrong_runs_are_named(
    convergence: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    runs: list[str],
    message: str,
) -> None:
    assert convergence.main([*runs, "--output", str(tmp_path / "x.png")]) == 1
    assert message in capsys.readouterr().err


def test_an_unknown_figure_lists_what_there_is(
    convergence: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = metrics(tmp_path / "metrics.json", {1: 2.0})
    arguments = [f"A={file}", "--figure", "mMR", "--output", str(tmp_path / "x.png")]
    assert convergence.main(arguments) == 1
    assert "bbox/AP" in capsys.readouterr().err
