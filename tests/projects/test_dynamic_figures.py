"""The figures of Dynamic Sparse R-CNN: their numbers follow from the model, and they are drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from engine_support import register_tiny_shapes, tiny_cfg, tiny_options, write_coco_folder
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "projects" / "DynamicSparseRCNN"))

import figures  # noqa: E402
import observations  # noqa: E402

CONFIG = str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
DYNAMIC = {
    "MODEL__META_ARCHITECTURE": "DynamicSparseRCNN",
    "MODEL__PROPOSAL_GENERATOR__NAME": "DynamicProposals",
    "MODEL__PROPOSAL_GENERATOR__DPG__SIZE": 4,
    "MODEL__PROPOSAL_GENERATOR__DPG__FC_DIM": 8,
    "MODEL__PROPOSAL_GENERATOR__DPG__TAU_SHARE": 0.0,
    "MODEL__MATCHER__NAME": "OptimalTransportMatcher",
    "MODEL__MATCHER__OT__FIXED_K": 2,
    "MODEL__MATCHER__OT__UNIT_STEP": 1.0,
    "DATASETS__TEST": "('engine_shapes_val',)",
}


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list, list[str]]:
    """A detector, three samples of the validation set, and the words that name both."""
    register_tiny_shapes()
    folder = tmp_path_factory.mktemp("figures")
    cfg = tiny_cfg(folder, **DYNAMIC)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        model.proposal_generator.expert_boxes_cxcywh.uniform_(0.2, 0.6)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    samples = list(figures.read_samples(cfg, "engine_shapes_val", range(3)))
    words = ["--config", CONFIG, "--weights", str(folder / "model.pth")]
    return model, samples, [*words, *tiny_options(folder, **DYNAMIC)]


@torch.no_grad()
def test_positives_follow_from_the_matcher(detector: tuple) -> None:
    model, samples, _ = detector
    sample = max(samples, key=lambda x: len(x["instances"]))
    found = observations.find_positives(model, sample)
    objects = len(sample["instances"])
    assert found.boxes_xyxy.shape == (2, 6, 4) and found.assignment.shape == (2, 6)
    assert torch.equal(found.gt_xyxy, sample["instances"].gt_boxes.tensor)
    for s in range(2):
        for m in range(objects):
            assert found.counts[s, m] == sum(int(x) == m for x in found.assignment[s])
    assert int(found.counts[0].sum()) == objects  # 2 units less 1 for the stage that is to come
    assert found.counts[1].sum() == min(2 * objects, int(0.8 * 6))
    figure = figures.draw_positives(found)
    panels = [axes for axes in figure.axes if axes.images]
    assert [len(panel.patches) for panel in panels] == [
        objects + int(found.counts[s].sum()) for s in range(2)
    ]
    heights = sorted(patch.get_height() for patch in figure.axes[-1].patches)
    assert heights == sorted(found.counts.flatten().tolist())


@torch.no_grad()
def test_expert_weights_of_a_data_set(detector: tuple) -> None:
    model, samples, _ = detector
    weights = observations.collect_expert_weights(model, samples)
    assert weights.shape == (3, 4, 6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3, 6))
    numbers = observations.expert_statistics(weights)
    assert sum(x["mean"] for x in numbers) == pytest.approx(1)
    own = weights[:, 2].numpy()
    assert numbers[2]["mean"] == pytest.approx(own.mean(), rel=1e-5)
    assert numbers[2]["over images"] == pytest.approx(own.std(axis=0).mean(), rel=1e-4)
    assert numbers[2]["over proposals"] == pytest.approx(own.mean(axis=0).std(), rel=1e-4)
    assert len(figures.draw_experts(weights, 1.0).axes) == 2


@torch.no_grad()
def test_proposals_of_two_images(detector: tuple) -> None:
    model, samples, _ = detector
    one, other = (observations.find_proposals(model, x) for x in samples[:2])
    boxes, content = observations.proposal_changes(one, other)
    n = int(content.argmax())
    assert float(boxes[n]) == pytest.approx(
        100 * float((one.boxes[n] - other.boxes[n]).abs().mean()), rel=1e-4
    )
    assert content.min() > 0
    same = observations.proposal_changes(one, one)
    assert not same[0].any() and not same[1].any()
    assert len(figures.draw_proposals(one, other).axes) == 3
    one.boxes = one.boxes[:3]
    with pytest.raises(ValueError, match="3 and 6 proposals"):
        observations.proposal_changes(one, other)


@pytest.mark.parametrize("command", ["positives", "experts", "proposals"])
def test_command_line_writes_a_picture(detector: tuple, tmp_path: Path, command: str) -> None:
    output = tmp_path / "new" / "x.png"
    words = detector[2]
    assert figures.main([command, "--output", str(output), *words[:4], *words[4:]]) == 0
    with Image.open(output) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 300 and pixels.std() > 10


def test_data_of_ones_own(detector: tuple, tmp_path: Path) -> None:
    folder, output = write_coco_folder(tmp_path / "mine"), tmp_path / "x.png"
    command = ["positives", "--output", str(output), "--data", str(folder), "--image", "1"]
    assert figures.main([*command, *detector[2]]) == 0
    assert output.is_file()


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        (["positives", "--image", "99"], {}, "no image 99: engine_shapes_val has 6"),
        (["positives"], {"DATASETS__TEST": "()"}, "DATASETS.TEST is empty"),
        (["positives", "--dataset", "shapes_vla"], {}, "shapes_vla"),
        (
            ["experts"],
            {
                "MODEL__META_ARCHITECTURE": "SparseDetector",
                "MODEL__PROPOSAL_GENERATOR__NAME": "LearnedProposals",
            },
            "LearnedProposals; experts need",
        ),
    ],
)
def test_mistakes_end_with_a_sentence(
    tmp_path: Path,
    detector: tuple,
    capsys: pytest.CaptureFixture,
    command: list,
    changes: dict,
    message: str,
) -> None:
    words = ["--config", CONFIG, "--weights", "", "--output", str(tmp_path / "x.png")]
    options = tiny_options(tmp_path, **(DYNAMIC | changes))
    assert figures.main([*command, *words, *options]) == 1
    assert message in capsys.readouterr().err


def results(*aps: list[float]) -> dict:
    return {str(seed): {"per_stage": [{"AP": x} for x in ap]} for seed, ap in enumerate(aps)}


def test_accuracy_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = {"crowd": {"plain": results([1, 2, 3], [3, 4, 7]), "old": {"0": {"metrics": {}}}}}
    (axes,) = figures.draw_stages(found).axes
    (line,) = axes.lines
    assert line.get_xdata().tolist() == [1, 2, 3] and line.get_ydata().tolist() == [2, 3, 5]
    (tmp_path / "results.json").write_text(json.dumps({"crowd": {"old": {"0": {"metrics": {}}}}}))
    command = ["stages", str(tmp_path / "results.json"), "--output", str(tmp_path / "x.png")]
    assert figures.main(command) == 1
    assert "per_stage: true" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert figures.main(command) == 0 and (tmp_path / "x.png").is_file()
    found = {"crowd": {name: results([1, 2, 3]) for name in ("plain", "DPG", "DLA")}}
    (axes,) = figures.draw_stages(found, ["DLA", "plain"]).axes
    assert [line.get_label() for line in axes.lines] == ["DLA (1)", "plain (1)"]
    assert figures.main([*command, "--variants", "DLB"]) == 1
    assert "no variant 'DLB'; there are ['old', 'plain']" in capsys.readouterr().err


def test_curves_of_a_study(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for data, variant, seed in (("a", "x", 2), ("a", "y", 2), ("a", "y", 1), ("b", "x", 2)):
        folder = tmp_path / data / variant / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    assert set(figures.study_metrics(tmp_path, "a", 2)) == {"x", "y"}
    assert set(figures.study_metrics(tmp_path, None, None)) == {"y"}  # seed 1 of a comes first
    output = tmp_path / "x.png"
    assert figures.main(["curves", str(tmp_path), "--data", "b", "--output", str(output)]) == 0
    assert output.is_file()
    absent = ["curves", str(tmp_path), "--output", str(output), "--variants", "z"]
    assert figures.main(absent) == 1 and "no variant 'z'" in capsys.readouterr().err
    assert figures.main(["curves", str(tmp_path), "--seed", "5", "--output", str(output)]) == 1
    assert "'a seed 1', 'a seed 2', 'b seed 2'" in capsys.readouterr().err
