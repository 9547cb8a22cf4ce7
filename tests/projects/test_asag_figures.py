"""The figures of ASAG, on a detector that has learned nothing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from engine_support import register_tiny_shapes
from PIL import Image

PROJECT = Path(__file__).resolve().parents[2] / "projects" / "ASAG"
TINY = Path(__file__).resolve().parents[2] / "configs" / "ASAG" / "asag_tiny.yaml"
sys.path.insert(0, str(PROJECT))

import anchor_observations  # noqa: E402

OPTIONS = ["MODEL.DEVICE", "cpu", "MODEL.ASAG.ETA_H", "1.0"]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch):
    """The command line; other projects have a module of the same name."""
    monkeypatch.syspath_prepend(str(PROJECT))
    monkeypatch.delitem(sys.modules, "figures", raising=False)
    import figures

    register_tiny_shapes()
    yield figures.main
    sys.modules.pop("figures", None)


def arguments(command: str, output: Path, *more: str, config: Path = TINY) -> list[str]:
    given = [command, "--config", str(config), "--weights", "", "--output", str(output)]
    return [*given, "--dataset", "engine_shapes_val", *more, *OPTIONS]


@pytest.mark.parametrize("command", ["anchors", "maps"])
def test_pictures(command: str, main, tmp_path: Path) -> None:
    output = tmp_path / "new" / "x.png"
    assert main(arguments(command, output, "--threshold", "0", "--image", "0", "3", "--")) == 0
    with Image.open(output) as picture:
        assert min(picture.size) > 200


def test_statistics(main, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments("statistics", tmp_path / "x.png", "--images", "4")) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert found["images"] == 4 and found["anchors"] > 0
    assert found["share_p5"] + found["share_p4"] + found["share_p3"] == pytest.approx(1)
    assert (tmp_path / "x.png").is_file()


def test_what_is_wrong_is_said(main, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments("maps", tmp_path / "x.png", "--image", "99", "--")) == 1
    assert "no image 99" in capsys.readouterr().err
    other = TINY.parents[1] / "SparseRCNN" / "sparse_rcnn_tiny.yaml"
    assert main(arguments("maps", tmp_path / "x.png", "--image", "0", "--", config=other)) == 1
    assert "AdaptiveSparseAnchors" in capsys.readouterr().err


def test_statistics_of_known_observations() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])

    def seen(objects: int, anchors: int, patches: dict[int, int]):
        return anchor_observations.Observation(
            image_rgb=None,
            objects=box.expand(objects, 4),
            anchors=box.expand(anchors, 4) + 50,
            proposals=box.expand(anchors, 4),
            detections=box,
            patches={level: box.expand(n, 4) for level, n in patches.items()},
            maps={},
        )

    found = anchor_observations.collect(
        [seen(1, 10, {}), seen(2, 20, {4: 3, 3: 0}), seen(3, 30, {4: 2, 3: 4})]
    )
    summary = found.summary()
    assert found.finest_level == [5, 4, 3]
    assert summary["correlation"] == pytest.approx(1)
    assert summary["patches_p4"] == pytest.approx(5 / 3)
    assert summary["AR_proposals"] == 100 and summary["AR_anchors"] == 0
    assert math.isnan(anchor_observations.collect([seen(1, 1, {})]).correlation())
