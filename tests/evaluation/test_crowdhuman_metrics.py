"""CrowdHuman metrics against hand calculation, the definition written slowly, golden figures."""

import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.evaluation.crowdhuman_metrics import (
    MISS_RATE_FPPI,
    CrowdImage,
    crowdhuman_metrics,
    crowdhuman_metrics_from_coco,
)


def image(boxes, detections, *, ignored=None, size=(100, 100), name="a"):
    """boxes (x1, y1, x2, y2); detections (x1, y1, x2, y2, score); size (width, height)."""
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    detections = np.array(detections, dtype=np.float64).reshape(-1, 5)
    ignored = np.zeros(len(boxes), dtype=bool) if ignored is None else np.array(ignored, dtype=bool)
    return CrowdImage(
        boxes, ignored, detections[:, :4], detections[:, 4], size[1], size[0], name=name
    )


def slow_metrics(images):
    """The definition, detection by detection and box by box; returns AP, mMR, Recall."""
    ranked = []  # (score, is a true positive)
    num_boxes = 0
    for im in images:

        def clip(box, im=im):
            x1, y1, x2, y2 = (float(v) for v in box)
            w, h = im.width, im.height
            return (
                min(max(x1, 0.0), w - 1),
                min(max(y1, 0.0), h - 1),
                min(max(x2, 0.0), w),
                min(max(y2, 0.0), h),
            )

        def area(box):
            return (box[2] - box[0]) * (box[3] - box[1])

        def intersection(a, b):
            width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
            height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
            return width * height

        real = [clip(b) for b, ig in zip(im.boxes_xyxy, im.ignored, strict=True) if not ig]
        regions = [clip(b) for b, ig in zip(im.boxes_xyxy, im.ignored, strict=True) if ig]
        num_boxes += len(real)
        taken = [False] * len(real)
        order = sorted(range(len(im.scores)), key=lambda i: im.scores[i], reverse=True)
        for i in order:
            detection = clip(im.detections_xyxy[i])
            best, best_iou = None, 0.5
            for j, box in enumerate(real):
                inter = intersection(detection, box)
                iou = inter / (area(detection) + area(box) - inter + 1e-6)
                if not taken[j] and iou > best_iou:
                    best, best_iou = j, iou
            if best is not None:
                taken[best] = True
                ranked.append((im.scores[i], True))
            elif not any(
                intersection(detection, region) / (area(detection) + 1e-6) > 0.5
                for region in regions
            ):
                ranked.append((im.scores[i], False))
    ranked.sort(key=lambda entry: entry[0], reverse=True)  # stable, also with reverse

    curve = []
    tp = fp = 0
    for _, hit in ranked:
        tp, fp = tp + hit, fp + (not hit)
        curve.append((tp / num_boxes, tp / (tp + fp), fp / len(images)))
    if not curve:
        return 0.0, 1.0, 0.0
    ap = 0.0
    for (r0, p0, _), (r1, p1, _) in itertools.pairwise(curve):
        ap += (r1 - r0) * (p1 + p0) / 2
    logs = []
    for point in MISS_RATE_FPPI:
        recall = next((r for r, _, fppi in curve if fppi >= point), curve[-1][0])
        logs.append(np.log(max(1 - recall, 1e-10)))
    return ap, float(np.exp(np.mean(logs))), curve[-1][0]


def random_images(rng, num_images, *, num_boxes=12, num_detections=30, ignored=0.3, decimals=1):
    """Crowded images: boxes that overlap, detections around them, tied scores, parts outside."""
    images = []
    for i in range(num_images):
        size = rng.integers(40, 200, 2)
        n = int(rng.integers(1, num_boxes + 1))
        center = rng.uniform(0, 1, (n, 2)) * size
        side = rng.uniform(0.1, 0.8, (n, 2)) * size
        boxes = np.concatenate((center - side / 2, center + side / 2), axis=1).round()
        d = int(rng.integers(0, num_detections + 1))
        of = rng.integers(0, n, d)
        noise = rng.normal(0, 1, (d, 4)) * np.tile(side[of], 2) * rng.choice([0, 0.08, 0.3], (d, 1))
        detections = (boxes[of] + noise).round(decimals)
        scores = rng.uniform(0, 1, d).round(decimals)
        images.append(
            image(
                boxes,
                np.column_stack((detections, scores)),
                ignored=rng.random(n) < ignored,
                size=size,
                name=str(i),
            )
        )
    if all(im.ignored.all() for im in images):
        images[0].ignored[0] = False
    return images


@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 6),
    ignored=st.sampled_from([0.0, 0.3, 0.9]),
    decimals=st.sampled_from([0, 1, 6]),
)
@settings(max_examples=150, deadline=None)
def test_agrees_with_the_slow_definition(seed, num_images, ignored, decimals):
    images = random_images(
        np.random.default_rng(seed), num_images, ignored=ignored, decimals=decimals
    )
    fast = crowdhuman_metrics(images)
    np.testing.assert_allclose(fast[:3], slow_metrics(images), rtol=0, atol=1e-12)
    assert np.isfinite(fast[:3]).all()


def test_long_chains_of_displaced_detections_agree_with_the_slow_definition():
    # many near copies of the same box: every detection overlaps every box
    rng = np.random.default_rng(0)
    boxes = np.array([10, 10, 90, 90]) + rng.normal(0, 2, (40, 4))
    detections = np.array([10, 10, 90, 90]) + rng.normal(0, 2, (120, 4))
    scores = rng.permutation(120) / 120
    images = [image(boxes, np.column_stack((detections, scores)))]
    np.testing.assert_allclose(
        crowdhuman_metrics(images)[:3], slow_metrics(images), rtol=0, atol=1e-12
    )


def test_hand_computed_curve():
    boxes = [[0, 0, 10, 10], [20, 20, 40, 40]]
    detections = [
        [0, 0, 10, 10, 0.9],  # hit: recall 1/2, precision 1
        [60, 60, 70, 70, 0.8],  # miss: recall 1/2, precision 1/2
        [20, 20, 40, 40, 0.7],  # hit: recall 1, precision 2/3
    ]
    metrics = crowdhuman_metrics([image(boxes, detections)])
    assert metrics.ap == pytest.approx(0.5 * (1 / 2 + 2 / 3) / 2)
    assert metrics.recall == 1.0
    # false positives an image jump from 0 to 1 at the second rank, so all points read its miss rate
    assert metrics.mmr == pytest.approx(0.5)
    assert metrics[3:] == (1, 2, 0, 3)


def test_perfect_detections_leave_out_the_first_piece_of_the_curve():
    boxes = [[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 90, 90], [5, 60, 25, 95]]
    detections = [[*box, 1 - i / 10] for i, box in enumerate(boxes)]
    metrics = crowdhuman_metrics([image(boxes, detections)])
    assert metrics.ap == pytest.approx(3 / 4)
    assert metrics.recall == 1.0
    assert metrics.mmr == pytest.approx(1e-10)


def test_ignored_region_absorbs_any_number_of_detections():
    boxes = [[0, 0, 10, 10], [50, 50, 100, 100]]
    inside = [[55, 55, 65, 65, 0.9], [70, 70, 80, 80, 0.8], [60, 60, 90, 90, 0.7]]
    hit = [0, 0, 10, 10, 0.5]
    with_region = crowdhuman_metrics([image(boxes, [*inside, hit], ignored=[False, True])])
    alone = crowdhuman_metrics([image(boxes[:1], [hit])])
    assert with_region[:3] == alone[:3]
    assert (with_region.num_boxes, with_region.num_ignored) == (1, 1)


def test_real_box_comes_before_ignored_region():
    # the region overlaps the detection more, but the real box is consumed
    boxes = [[0, 0, 50, 50], [0, 0, 40, 50]]
    metrics = crowdhuman_metrics([image(boxes, [[0, 0, 50, 50, 0.9]], ignored=[True, False])])
    assert metrics.recall == 1.0


def test_second_detection_of_a_box_is_a_false_positive():
    boxes = [[0, 0, 10, 10], [20, 20, 40, 40]]
    twice = [[0, 0, 10, 10, 0.9], [0, 0, 10, 10, 0.8], [20, 20, 40, 40, 0.7]]
    metrics = crowdhuman_metrics([image(boxes, twice)])
    assert metrics.ap == pytest.approx(0.5 * (1 / 2 + 2 / 3) / 2)
    assert metrics.mmr == pytest.approx(0.5)


def test_equal_overlaps_take_the_box_annotated_first():
    # the best detection overlaps both boxes alike, the second one only the left box
    left, right = [0, 0, 20, 20], [4, 0, 24, 20]
    between, only_left = [2, 0, 22, 20, 0.9], [0, 0, 13, 20, 0.8]
    assert crowdhuman_metrics([image([left, right], [between, only_left])]).recall == 0.5
    assert crowdhuman_metrics([image([right, left], [between, only_left])]).recall == 1.0


def test_threshold_is_strict():
    # intersection 50, union 100, plus the epsilon: just below one half
    half = image([[0, 0, 10, 10]], [[0, 0, 10, 5, 0.9]])
    above = image([[0, 0, 10, 10]], [[0, 0, 10, 5.1, 0.9]])
    assert crowdhuman_metrics([half]).recall == 0.0
    assert crowdhuman_metrics([above]).recall == 1.0


def test_boxes_are_clipped_to_the_image_before_matching():
    # inside the image both cover the same 10 x 100 strip
    outside = image([[-90, 0, 10, 100]], [[0, 0, 10, 100, 0.9]])
    assert crowdhuman_metrics([outside]).recall == 1.0


def test_equal_scores_keep_the_order_given():
    hit, miss = [0, 0, 10, 10, 0.5], [60, 60, 70, 70, 0.5]
    box = [[0, 0, 10, 10], [20, 20, 30, 30]]
    last = [20, 20, 30, 30, 0.1]
    hit_first = crowdhuman_metrics([image(box, [hit, miss, last])])
    miss_first = crowdhuman_metrics([image(box, [miss, hit, last])])
    assert hit_first.ap == pytest.approx(0.5 * (1 / 2 + 2 / 3) / 2)
    assert miss_first.ap == pytest.approx(0.5 * (0 + 1 / 2) / 2 + 0.5 * (1 / 2 + 2 / 3) / 2)


def test_without_detections():
    metrics = crowdhuman_metrics([image([[0, 0, 10, 10]], [])])
    assert metrics[:3] == (0.0, 1.0, 0.0)


def test_all_detections_absorbed():
    boxes = [[0, 0, 10, 10], [50, 50, 100, 100]]
    metrics = crowdhuman_metrics([image(boxes, [[60, 60, 70, 70, 0.9]], ignored=[False, True])])
    assert metrics[:3] == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one real"),
        ([image([[0, 0, 9, 9]], [], ignored=[True])], "at least one real"),
        ([image([], [[0, 0, 9, 9, 0.5]], name="x.jpg")], r"x\.jpg has no annotation"),
        ([image([[0, 0, 9, 9]], [[0, 0, np.nan, 9, 0.5]], name="x.jpg")], r"x\.jpg.*detections_x"),
        ([image([[0, 0, 9, 9]], [[0, 0, 9, 9, np.nan]], name="x.jpg")], r"x\.jpg: scores"),
        ([image([[0, 0, 9, 9]], [], size=(0, 5), name="x.jpg")], r"x\.jpg: size 0x5"),
        ([image([[0, 0, 9, 9]], [])._replace(scores=np.zeros(3))], r"scores has shape \(3,\)"),
        ([image([[0, 0, 9, 9]], [])._replace(ignored=np.zeros(2))], r"ignored has shape \(2,\)"),
    ],
)
def test_bad_input_is_named(images, message):
    with pytest.raises(ValueError, match=message):
        crowdhuman_metrics(images)


def test_coco_lists_with_unknown_images_are_refused():
    gt = {
        "images": [{"id": 1, "width": 20, "height": 20}],
        "annotations": [{"image_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0}],
    }
    result = {"image_id": 7, "bbox": [0, 0, 10, 10], "score": 0.5}
    with pytest.raises(ValueError, match="result with image_id 7"):
        crowdhuman_metrics_from_coco(gt, [result])


def test_detections_on_images_without_annotations_are_skipped():
    gt = {
        "images": [{"id": i, "width": 20, "height": 20} for i in (1, 2)],
        "annotations": [{"image_id": 1, "bbox": [0, 0, 10, 10]}],
    }
    results = [{"image_id": i, "bbox": [0, 0, 10, 10], "score": i / 3} for i in (1, 2)]
    metrics = crowdhuman_metrics_from_coco(gt, results)
    assert metrics.num_detections == 1
    assert metrics.recall == 1.0


def test_golden_figures(golden_dir):
    files = sorted((golden_dir / "crowdhuman").glob("*.json"))
    assert files
    for path in files:
        case = json.loads(path.read_text())
        metrics = crowdhuman_metrics_from_coco(case["ground_truth"], case["results"])
        expected = case["expected"]
        want = [expected[key] for key in ("AP", "mMR", "Recall")]
        np.testing.assert_allclose(metrics[:3], want, rtol=0, atol=1e-6, err_msg=path.name)
        counts = (metrics.num_boxes, metrics.num_ignored)
        assert counts == (expected["real_boxes"], expected["ignored_boxes"])


def test_hundreds_of_crowded_images_take_seconds():
    rng = np.random.default_rng(0)
    images = random_images(rng, 400, num_boxes=50, num_detections=10, decimals=6)
    crowded = []
    for im in images:
        near = im.boxes_xyxy[rng.integers(0, len(im.boxes_xyxy), 500)] + rng.normal(0, 4, (500, 4))
        crowded.append(im._replace(detections_xyxy=near, scores=rng.random(500)))
    start = time.process_time()
    metrics = crowdhuman_metrics(crowded)
    assert metrics.num_detections == 400 * 500
    assert time.process_time() - start < 5
