"""RoIAlign over the pyramid against Detectron2's ROIPooler."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from asag import load_config
from asag.modeling.layers.roi_align import PyramidRoIAlign

TINY = Path(__file__).resolve().parents[3] / "configs/SparseRCNN/sparse_rcnn_tiny.yaml"

STRIDES = (4, 8, 16, 32)
METHODS = ["gather", "kernel"]


def make_features(batch=2, channels=3, height=128, width=160, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            batch, channels, height // s, width // s, generator=generator, dtype=dtype
        ).requires_grad_()
        for s in STRIDES
    ]


def make_boxes():
    """All levels, boxes across the border and outside, and degenerate ones; (2, 10, 4)."""
    first = [
        [3.0, 5, 20, 30], [0, 0, 160, 128], [-40, -30, 30, 40], [100, 90, 300, 260],
        [500, 500, 540, 530], [-90, -90, -20, -10], [50, 50, 50, 50], [20, 20, 19, 80],
        [-300, -300, 500, 600], [-20.3, -31.7, 262.9, 264.1],
    ]  # fmt: skip
    second = [[x1 + 7.5, y1 - 3.25, x2 + 7.5, y2 - 3.25] for x1, y1, x2, y2 in first]
    return torch.tensor([first, second])


def reference(features, boxes, **options):
    pooler = ROIPooler(
        7, [1 / s for s in STRIDES], 2, "ROIAlignV2" if options.get("aligned", True) else "ROIAlign"
    )
    return pooler(features, [Boxes(x) for x in boxes])


@pytest.mark.parametrize("method", [*METHODS, None])
@pytest.mark.parametrize("aligned", [True, False])
def test_forward_and_gradients_equal_roi_pooler(method, aligned):
    # ROIPooler's level of a box of negative area is undefined; those have a test of their own.
    boxes = make_boxes()[:, [0, 1, 2, 3, 4, 5, 6, 8, 9]]
    ours, theirs = make_features(), make_features()
    pooler = PyramidRoIAlign(strides=STRIDES, aligned=aligned)
    pooled = pooler(pooler.prepare(ours, method), boxes)
    expected = reference(theirs, boxes, aligned=aligned)
    assert pooled.shape == (18, 3, 7, 7)
    assert torch.allclose(pooled, expected, atol=2e-6)
    probe = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    for x, y in zip(
        torch.autograd.grad((pooled * probe).sum(), ours),
        torch.autograd.grad((expected * probe).sum(), theirs),
        strict=True,
    ):
        assert torch.allclose(x, y, atol=1e-5)


def test_boxes_of_the_test_reach_every_level():
    levels = PyramidRoIAlign(strides=STRIDES).assign_levels(make_boxes())
    assert set(levels.flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gather_equals_kernel(dtype):
    results = []
    for method in METHODS:
        features = make_features(dtype=dtype)
        pooler = PyramidRoIAlign(strides=STRIDES)
        pooled = pooler(pooler.prepare(features, method), make_boxes())
        results.append((pooled, *torch.autograd.grad(pooled.pow(2).sum(), features)))
    for a, b in zip(*results, strict=True):
        assert a.dtype is dtype
        assert torch.allclose(a, b, atol=1e-5 if dtype is torch.float32 else 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_images_do_not_mix(method):
    features, boxes = make_features(), make_boxes()
    pooler = PyramidRoIAlign(strides=STRIDES)
    together = pooler(pooler.prepare(features, method), boxes)
    for b in range(2):
        single = pooler.prepare([x[b : b + 1] for x in features], method)
        alone = pooler(single, boxes[b : b + 1])
        assert torch.equal(alone, together.view(2, -1, *together.shape[1:])[b])


@pytest.mark.parametrize("method", METHODS)
def test_outside_degenerate_and_infinite_boxes_stay_finite(method):
    boxes = make_boxes()
    boxes[0, 0] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    features = make_features()
    pooler = PyramidRoIAlign(strides=STRIDES)
    pooled = pooler(pooler.prepare(features, method), boxes)
    assert pooled.isfinite().all()
    assert torch.equal(pooled[4], torch.zeros_like(pooled[4]))  # wholly outside
    gradients = torch.autograd.grad(pooled.sum(), features)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("method", METHODS)
def test_every_level_gets_a_gradient_even_without_boxes(method):
    features = make_features()
    boxes = torch.tensor([[[0.0, 0, 10, 10]]] * 2)  # finest level only
    pooler = PyramidRoIAlign(strides=STRIDES)
    pooled = pooler(pooler.prepare(features, method), boxes)
    gradients = torch.autograd.grad(pooled.sum(), features, allow_unused=True)
    assert all(g is not None for g in gradients)
    assert gradients[0].abs().sum() > 0 and not any(g.any() for g in gradients[1:])


def test_level_rule():
    pooler = PyramidRoIAlign(strides=STRIDES)
    sides = torch.tensor([0.0, 1, 55, 56, 111, 112, 223, 224, 447, 448, 5000])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), dim=-1)
    # A box just at a power of two belongs to the coarser level (level 4 begins at 224).
    assert pooler.assign_levels(boxes).tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert pooler.assign_levels(torch.tensor([9.0, 9, 5, 20])) == 0


def test_half_precision_features_pool_in_float32():
    features = [x.detach().half() for x in make_features()]
    pooled = PyramidRoIAlign(strides=STRIDES)(features, make_boxes())
    assert pooled.dtype is torch.float32
    exact = PyramidRoIAlign(strides=STRIDES)([x.float() for x in features], make_boxes())
    assert torch.equal(pooled, exact)


def test_boxes_get_no_gradient():
    boxes = make_boxes().requires_grad_()
    PyramidRoIAlign(strides=STRIDES)(make_features(), boxes).sum().backward()
    assert boxes.grad is None


@pytest.mark.parametrize("strides", [(4, 16), (8, 4), (3, 6), (4, 4)])
def test_strides_must_double(strides):
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.IN_FEATURES"):
        PyramidRoIAlign(strides=strides)


@pytest.mark.parametrize("method", METHODS)
def test_nan_boxes_do_not_raise_here(method):
    # The matcher says what went wrong; pooling must let the predictions get that far.
    boxes = torch.full((2, 3, 4), float("nan"))
    pooler = PyramidRoIAlign(strides=STRIDES)
    assert pooler(pooler.prepare(make_features(), method), boxes).shape == (6, 3, 7, 7)


@pytest.mark.parametrize(
    ("kind", "aligned", "eps"), [("ROIAlignV2", True, 1e-8), ("ROIAlign", False, 1e-6)]
)
def test_heads_of_sparse_rcnn_read_the_pooler_type(kind, aligned, eps):
    cfg = load_config(str(TINY), ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind, "MODEL.DEVICE", "cpu"])
    pooler = build_model(cfg).roi_heads.reader.pooler
    assert (pooler.aligned, pooler.level_eps) == (aligned, eps)


def test_heads_of_sparse_rcnn_refuse_an_unknown_pooler_type():
    cfg = load_config(str(TINY), ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"])
    with pytest.raises(ValueError, match="POOLER_TYPE is 'ROIPool'; it must be one of"):
        build_model(cfg)
