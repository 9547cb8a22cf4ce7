"""The pipeline as a whole: what must not change the detections, and what a step must not do."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from asag import load_config
from asag.diagnostics.profiling import host_waits
from asag.modeling.layers.roi_align import PyramidRoIAlign
from asag.structures import ImageSizes, Queries

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
CONFIGS = sorted(p for p in ROOT.glob("configs/*/*.yaml") if not p.name.startswith("Base"))


# What the tests below count on, whatever the tiny recipe says.
FIFTY = (
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", "50",
    "MODEL.DECODER.HIDDEN_DIM", "64",
    "MODEL.FPN.OUT_CHANNELS", "64",
    "MODEL.FPN.NORM", "",
)  # fmt: skip


def build(*options, path=TINY):
    torch.manual_seed(0)
    return build_model(load_config(path, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *options]))


@pytest.fixture(scope="module")
def detector():
    """Evaluation mode, with boxes that differ from one another and scores that do as well."""
    model = build(*FIFTY).eval()
    boxes = model.proposal_generator.boxes_cxcywh
    with torch.no_grad():
        boxes[:, :2] = 0.2 + 0.6 * torch.rand(len(boxes), 2)
        boxes[:, 2:] = 0.1 + 0.4 * torch.rand(len(boxes), 2)
        for stage in model.roi_heads.stages:
            stage.class_logits.bias.zero_()
    return model


def image(height=64, width=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=g)


def sample(objects=3, seed=0, size=(64, 96)):
    g = torch.Generator().manual_seed(seed)
    low = 30 * torch.rand(objects, 2, generator=g)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.cat((low, low + 20), dim=1))
    instances.gt_classes = torch.randint(5, (objects,), generator=g)
    return {"image": image(*size, seed=seed), "instances": instances, "file_name": f"{seed}.jpg"}


def raw(model, images):
    """Last-stage logits and boxes."""
    batch = model.preprocess_images([{"image": x} for x in images])
    with torch.no_grad():
        predictions, _ = model.forward_stages(batch.tensor, ImageSizes.from_images(batch))
    return predictions.logits[-1], predictions.boxes_xyxy[-1]


def test_batched_images_equal_single_ones(detector):
    images = [image(seed=1), image(seed=2), image(seed=3)]
    together = raw(detector, images)
    for b, single in enumerate(images):
        for batched, alone in zip(together, raw(detector, [single]), strict=True):
            assert torch.allclose(batched[b], alone[0], atol=1e-3, rtol=1e-4)


def test_order_of_the_batch_does_not_matter(detector):
    one, two = image(seed=1), image(40, 70, seed=2)
    for a, b in zip(raw(detector, [one, two]), raw(detector, [two, one]), strict=True):
        assert torch.allclose(a, b.flip(0), atol=1e-3, rtol=1e-4)


def test_a_larger_neighbor_changes_only_what_lies_at_the_border():
    # Convolutions see the padding, the boxes' scale must not: they are in pixels of the own image.
    init = ["MODEL.PROPOSAL_GENERATOR.BOX_INIT", "image"]
    model = build("MODEL.DECODER.NUM_STAGES", "1", *init).eval()
    batch = model.preprocess_images([{"image": image(32, 32)}, {"image": image(128, 160)}])
    sizes = ImageSizes.from_images(batch)
    queries, _ = model.proposal_generator({}, sizes)
    assert torch.equal(queries.boxes_xyxy[0, 0], torch.tensor([0.0, 0, 32, 32]))
    assert torch.equal(queries.boxes_xyxy[1, 0], torch.tensor([0.0, 0, 160, 128]))
    assert not batch.tensor[0, :, 32:].any() and not batch.tensor[0, :, :, 32:].any()


def test_permuted_proposals_give_the_same_detections(detector):
    logits, boxes = raw(detector, [image()])
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    generator = detector.proposal_generator
    before = [p.detach().clone() for p in generator.parameters()]
    with torch.no_grad():
        for p in generator.parameters():
            p.copy_(p[order])
    permuted = raw(detector, [image()])
    with torch.no_grad():
        for p, old in zip(generator.parameters(), before, strict=True):
            p.copy_(old)
    assert torch.allclose(permuted[0], logits[:, order], atol=1e-3, rtol=1e-4)
    assert torch.allclose(permuted[1], boxes[:, order], atol=1e-2, rtol=1e-4)


def test_padded_queries_add_nothing(detector):
    batch = detector.preprocess_images([{"image": image()}, {"image": image(seed=5)}])
    sizes = ImageSizes.from_images(batch)
    with torch.no_grad():
        features = detector.backbone(batch.tensor)
        queries, _ = detector.proposal_generator(features, sizes)
        plain = detector.roi_heads(features, queries, sizes)
        junk = torch.full((2, 4, 64), 50.0)
        padded = Queries(
            content=torch.cat((queries.content, junk), dim=1),
            valid=(torch.arange(54) < 50).expand(2, -1),
            boxes_xyxy=torch.cat((queries.boxes_xyxy, queries.boxes_xyxy[:, :4]), dim=1),
        )
        longer = detector.roi_heads(features, padded, sizes)
    assert torch.allclose(longer.logits[:, :, :50], plain.logits, atol=1e-3, rtol=1e-4)
    assert torch.allclose(longer.boxes_xyxy[:, :, :50], plain.boxes_xyxy, atol=1e-2, rtol=1e-4)
    assert torch.equal(longer.valid, padded.valid)


def test_detections_come_in_the_wanted_resolution(detector):
    inputs = {"image": image()}
    with torch.no_grad():
        (same,) = detector([inputs])
        (double,) = detector([inputs | {"height": 128, "width": 192}])
    same, double = same["instances"], double["instances"]
    assert same.image_size == (64, 96) and double.image_size == (128, 192)
    assert len(same) > 0 and torch.equal(same.scores, double.scores)
    ours, theirs = same.pred_boxes.tensor, double.pred_boxes.tensor
    assert torch.allclose(2 * ours, theirs, atol=1e-3)
    assert ours.min() >= 0 and ours[:, 2].max() <= 96 and ours[:, 3].max() <= 64


def test_evaluation_is_repeatable_and_asks_for_no_labels(detector):
    first, second = raw(detector, [image()]), raw(detector, [image()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_parameter_is_trained():
    model = build().train()
    losses = model([sample(3, 0), sample(0, 1)])
    assert len(losses) == 9 and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_boxes_are_detached_between_stages_and_queries_are_not():
    model = build().train()
    losses = model([sample()])
    stages = model.roi_heads.stages
    weights = (stages[0].box_deltas.weight, stages[-1].box_deltas.weight, stages[0].norm.weight)
    gradients = torch.autograd.grad(losses["loss_bbox"] + losses["loss_giou"], weights)
    assert [bool(g.any()) for g in gradients] == [False, True, True]


def pool_as_on_a_gpu(pooler, features):
    return list(features)


def test_a_training_step_copies_to_the_host_once(monkeypatch):
    # A GPU pools by its kernel; preprocessing only reads sizes that are on the host.
    monkeypatch.setattr(PyramidRoIAlign, "prepare", pool_as_on_a_gpu)
    model = build().train()
    inputs = [sample(3, 0), sample(1, 1)]
    images = model.preprocess_images(inputs)
    monkeypatch.setattr(model, "preprocess_images", lambda _: images)

    def step():
        sum(model(inputs).values()).backward()

    assert host_waits(step) == {"cpu": 1}


def test_a_forward_pass_to_raw_predictions_copies_nothing_to_the_host(monkeypatch, detector):
    monkeypatch.setattr(PyramidRoIAlign, "prepare", pool_as_on_a_gpu)
    batch = detector.preprocess_images([{"image": image()}])
    sizes = ImageSizes.from_images(batch)
    with torch.no_grad():
        assert host_waits(lambda: detector.forward_stages(batch.tensor, sizes)) == {}


@pytest.mark.parametrize(
    "bad, found",
    [
        ({"file_name": "gray.png", "image": torch.zeros(1, 8, 8)}, r"gray\.png.*\(1, 8, 8\)"),
        ({"image_id": 7, "image": None}, "7.*NoneType"),
        ({"image": torch.zeros(2, 3, 8, 8)}, r"without a name.*\(2, 3, 8, 8\)"),
    ],
)
def test_a_wrong_image_is_named(detector, bad, found):
    with pytest.raises(ValueError, match=found):
        detector([{"image": image()}, bad])


def test_training_without_labels_names_the_image():
    model = build().train()
    with pytest.raises(ValueError, match=r"'a\.jpg' has no 'instances'"):
        model([{"image": image(), "file_name": "a.jpg"}])


SHRUNK = (
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", "8",
    "MODEL.DECODER.NUM_STAGES", "2",
    "MODEL.DECODER.FFN_DIM", "32",
    "MODEL.DECODER.DYNAMIC_DIM", "4",
    "MODEL.DECODER.HIDDEN_DIM", "32",
    "MODEL.DECODER.NUM_HEADS", "4",
    "MODEL.FPN.OUT_CHANNELS", "32",
    "MODEL.DECODER.MIXER_IN_POINTS", "4",
    "MODEL.DECODER.MIXER_OUT_POINTS", "8",
    "MODEL.ASAG.FFN_DIM", "32",
    "MODEL.ROI_HEADS.NUM_CLASSES", "5",
)  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_trains_a_step(path):
    model = build(*SHRUNK, path=str(path)).train()
    # The group norms behind the coarsest map of a deformable encoder want more than one cell.
    side = 128 if "asag_d" in path.stem else 64
    losses = model([sample(2, 0, (side, side))])
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values())
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_without_a_class_names_image_label_and_key(label):
    model, batch = build().train(), [sample(seed=1), sample(seed=2)]
    batch[1]["instances"].gt_classes[1] = label
    message = rf"'2\.jpg' has the label {label}, but MODEL\.ROI_HEADS\.NUM_CLASSES is 5"
    with pytest.raises(ValueError, match=message):
        model(batch)
