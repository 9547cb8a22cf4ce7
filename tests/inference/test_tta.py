"""Test-time augmentation: coordinates come back, sizes are filtered, clusters vote."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

from asag import get_asag_cfg, load_config
from asag.inference.tta import DetectorWithTTA, merge_by_nms, merge_by_vote

HEIGHT, WIDTH = 60, 100


class ColorDetector(nn.Module):
    """Reports the bounding box of all pure red pixels: a detector that is right at any size."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.sides: list[int] = []

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        self.batches.append(len(batched_inputs))
        return [{"instances": self._detect(x["image"])} for x in batched_inputs]

    def _detect(self, image: Tensor) -> Instances:
        self.sides.append(min(image.shape[1:]))
        ys, xs = (image[0].float() > 127).nonzero(as_tuple=True)
        box = torch.stack((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)).float()
        found = Instances(tuple(image.shape[1:]))
        found.pred_boxes = Boxes(box[None])
        found.scores = torch.tensor([0.5])
        found.pred_classes = torch.tensor([3])
        return found


def picture() -> np.ndarray:
    """Black, with a red box left of the middle, so that a flip that is not undone shows."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[20:40, 10:40, 0] = 255
    return image


def as_input(image: np.ndarray) -> dict[str, Any]:
    return {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}


def tta_cfg(*options: Any) -> Any:
    cfg = get_asag_cfg()
    sizes = ["TEST.AUG.MIN_SIZES", (60, 90, 120, 180), "TEST.AUG.MAX_SIZE", 1000]
    cfg.merge_from_list([*sizes, *options])
    return cfg


def wrapped(*options: Any) -> tuple[DetectorWithTTA, ColorDetector]:
    model = ColorDetector().eval()
    return DetectorWithTTA(tta_cfg(*options), model), model


EXPECTED = torch.tensor([[10.0, 20.0, 40.0, 40.0]])


@pytest.mark.parametrize("merge", ["nms", "vote"])
def test_boxes_of_all_sizes_and_flips_come_back_to_the_image(merge: str) -> None:
    detector, model = wrapped("TEST.AUG.MERGE", merge)
    found = detector([as_input(picture())])[0]["instances"]
    assert len(model.sides) == 8 and sorted(set(model.sides)) == [60, 90, 120, 180]
    assert found.image_size == (HEIGHT, WIDTH)
    best = found[0]
    # One pixel of blur at the borders of an enlarged box.
    torch.testing.assert_close(best.pred_boxes.tensor, EXPECTED, atol=0.75, rtol=0)
    assert best.pred_classes.tolist() == [3] and best.scores.tolist() == [0.5]


def test_output_resolution_is_the_wanted_one() -> None:
    detector, _ = wrapped("TEST.AUG.MERGE", "vote")
    x = as_input(picture()) | {"height": 2 * HEIGHT, "width": 3 * WIDTH}
    found = detector([x])[0]["instances"]
    assert found.image_size == (2 * HEIGHT, 3 * WIDTH)
    expected = EXPECTED * torch.tensor([3.0, 2.0, 3.0, 2.0])
    torch.testing.assert_close(found[0].pred_boxes.tensor, expected, atol=2.5, rtol=0)


def test_reads_the_file_when_there_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.fromarray(picture()).save(path)
    detector, _ = wrapped()
    from_file = detector([{"file_name": str(path)}])[0]["instances"]
    from_memory = detector([as_input(picture())])[0]["instances"]
    assert torch.equal(from_file.pred_boxes.tensor, from_memory.pred_boxes.tensor)


def test_batches_are_bounded_and_inputs_untouched() -> None:
    detector, model = wrapped("TEST.AUG.BATCH_SIZE", 3)
    x = as_input(picture())
    keys = set(x)
    detector([x, as_input(picture())])
    assert model.batches == [3, 3, 2] * 2
    assert set(x) == keys


def test_size_ranges_choose_the_copies_that_are_believed() -> None:
    # sqrt(area) of the red box is 24.5 times the magnification 1, 1.5, 2, 3.
    ranges = ((100, 1000), (100, 1000), (0, 100), (100, 1000))
    detector, _ = wrapped("TEST.AUG.SIZE_RANGES", ranges)
    only_third, _ = wrapped("TEST.AUG.MIN_SIZES", (120,))
    found = detector([as_input(picture())])[0]["instances"]
    expected = only_third([as_input(picture())])[0]["instances"]
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    nobody, _ = wrapped("TEST.AUG.SIZE_RANGES", ((500, 1000),) * 4)
    assert len(nobody([as_input(picture())])[0]["instances"]) == 0


def test_top_k_limits_the_answer_best_first() -> None:
    def many(found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.tensor([0.1, 0.9, 0.5])
        return EXPECTED.repeat(3, 1), scores, torch.tensor([0, 1, 2])

    cfg = tta_cfg()
    reference = DetectorWithTTA(cfg, ColorDetector().eval())
    detector = DetectorWithTTA(
        model=ColorDetector().eval(), augment=reference.augment, merge=many, top_k=2
    )
    found = detector([as_input(picture())])[0]["instances"]
    assert found.pred_classes.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("MERGE", "mean"),
        ("SIZE_RANGES", ((0, 10),)),
        ("MIN_SIZES", ()),
        ("SIZE_RANGES", (1, 2, 3, 4)),
        ("BATCH_SIZE", 0),
    ],
)
def test_wrong_values_name_their_key(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"TEST.AUG.{option}"):
        wrapped(f"TEST.AUG.{option}", value)


def test_training_mode_is_refused() -> None:
    detector, model = wrapped()
    model.train()
    with pytest.raises(RuntimeError, match="eval"):
        detector([as_input(picture())])


def test_the_mode_of_the_model_outlives_an_evaluation() -> None:
    for training in (True, False):
        model = ColorDetector().train(training)
        detector = DetectorWithTTA(tta_cfg(), model)
        before = detector.training
        detector.eval()
        assert not model.training
        detector.train(before)
        assert model.training is training


def iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(area) - width * height)


def vote_slowly(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, min_score: float
) -> list[tuple[int, float, list[float]]]:
    """Greedy clustering, one box after the other."""
    left = sorted(
        zip(scores.tolist(), boxes.tolist(), classes.tolist(), strict=True), key=lambda x: -x[0]
    )
    answer = []
    while left:
        best, box, label = left[0]
        cluster = [x for x in left if x[2] == label and iou(box, x[1]) >= threshold]
        left = [x for x in left if not any(x is y for y in cluster)]
        total = sum(x[0] for x in cluster)
        mean = [sum(x[0] * x[1][i] for x in cluster) / total for i in range(4)]
        answer.append((label, best, mean))
        for score, member, _ in cluster[1:]:
            again = score * (1 - iou(box, member))
            if again >= min_score:
                answer.append((label, again, member))
    return answer


def random_detections(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 30
    size = 20 + torch.rand(count, 2, generator=generator) * 30
    scores = 0.02 + 0.98 * torch.rand(count, generator=generator)
    classes = torch.randint(0, 3, (count,), generator=generator)
    return torch.cat((low, low + size), dim=1), scores, classes


@pytest.mark.parametrize("seed", range(8))
def test_vote_equals_greedy_clustering(seed: int) -> None:
    found = random_detections(seed, 60)
    boxes, scores, classes = merge_by_vote(found, 0.5, 0.05)
    actual = sorted(zip(classes.tolist(), scores.tolist(), boxes.tolist(), strict=True))
    expected = sorted(vote_slowly(*found, 0.5, 0.05))
    assert len(actual) == len(expected) < 2 * 60
    for ours, slow in itertools.zip_longest(actual, expected):
        assert ours[0] == slow[0] and ours[1] == pytest.approx(slow[1], abs=1e-5)
        assert ours[2] == pytest.approx(slow[2], abs=1e-3)


def test_vote_of_one_box_seen_often_is_that_box() -> None:
    found = (EXPECTED.repeat(5, 1), torch.linspace(0.1, 0.9, 5), torch.ones(5, dtype=torch.long))
    boxes, scores, classes = merge_by_vote(found, 0.65, 0.05)
    torch.testing.assert_close(boxes, EXPECTED)
    assert scores.tolist() == [pytest.approx(0.9)] and classes.tolist() == [1]


def test_merging_nothing_gives_nothing() -> None:
    nothing = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    for merged in (merge_by_vote(nothing, 0.65, 0.05), merge_by_nms(nothing, 0.65)):
        assert [tuple(x.shape) for x in merged] == [(0, 4), (0,), (0,)]


def test_scores_of_zero_do_not_break_the_vote() -> None:
    found = (EXPECTED.repeat(3, 1), torch.zeros(3), torch.zeros(3, dtype=torch.long))
    boxes, scores, _ = merge_by_vote(found, 0.65, 0.05)
    torch.testing.assert_close(boxes, EXPECTED)
    assert scores.tolist() == [0.0]


def test_nms_works_class_by_class() -> None:
    boxes = EXPECTED.repeat(3, 1)
    found = (boxes, torch.tensor([0.3, 0.8, 0.5]), torch.tensor([0, 0, 1]))
    _, scores, classes = merge_by_nms(found, 0.65)
    assert scores.tolist() == [pytest.approx(0.8), pytest.approx(0.5)]
    assert classes.tolist() == [0, 1]


def test_one_copy_of_the_same_size_changes_nothing() -> None:
    torch.manual_seed(0)
    config = Path(__file__).resolve().parents[2] / "configs/SparseRCNN/sparse_rcnn_tiny.yaml"
    one_copy = [
        "TEST.AUG.MIN_SIZES",
        "(64,)",
        "TEST.AUG.FLIP",
        "False",
        "TEST.AUG.MERGE_IOU",
        "1.0",
    ]
    cfg = load_config(str(config), ["MODEL.DEVICE", "cpu", *one_copy])
    model = build_model(cfg).eval()
    x = {"image": torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)}
    with torch.no_grad():
        expected = model([x])[0]["instances"]
    actual = DetectorWithTTA(cfg, model)([x])[0]["instances"]
    torch.testing.assert_close(actual.scores, expected.scores)
    torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(actual.pred_classes, expected.pred_classes)
