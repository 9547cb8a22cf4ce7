"""Activation checkpointing changes what is kept, and no number."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from asag import load_config
from asag.modeling.layers.buffers import training_buffers
from asag.modeling.layers.checkpointing import Recomputed, recompute

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.DECODER.DROPOUT": 0.3,
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": 12,
}
SWIN = {
    "MODEL.BACKBONE.NAME": "build_swin_fpn_backbone",
    "MODEL.SWIN.EMBED_DIM": 12,
    "MODEL.SWIN.DEPTHS": "(1, 1, 1, 1)",
    "MODEL.SWIN.NUM_HEADS": "(1, 2, 3, 6)",
    "MODEL.FPN.IN_FEATURES": "['stage1', 'stage2', 'stage3', 'stage4']",
}
TIMM = {
    "MODEL.TIMM.NAME": "tf_efficientnet_lite0",
    "MODEL.TIMM.DROP_PATH_RATE": 0.2,
    "MODEL.PIXEL_MEAN": "[127.5, 127.5, 127.5]",
    "MODEL.PIXEL_STD": "[127.5, 127.5, 127.5]",
}
DEFORMABLE = {
    "MODEL.DECODER.STAGE": "deformable",
    "MODEL.BACKBONE.NAME": "build_slim_resnet",
    "MODEL.NECK.NAME": "DeformableEncoder",
    "MODEL.DEFORMABLE_ENCODER.NUM_LAYERS": 2,
    "MODEL.ROI_HEADS.IN_FEATURES": "['p3', 'p4', 'p5', 'p6']",
}
FAMILIES = {
    "sparse": ("SparseRCNN/sparse_rcnn_tiny.yaml", {}),
    "iou": ("IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml", {}),
    "dynamic": ("DynamicSparseRCNN/dynamic_sparse_rcnn_tiny.yaml", {}),
    "asag-s": ("ASAG/asag_tiny.yaml", {}),
    "asag-a": ("ASAG/asag_tiny.yaml", {"MODEL.DECODER.STAGE": "adamixer"}),
    "asag-d": ("ASAG/asag_tiny.yaml", DEFORMABLE),
    "detr": ("DETR/detr_tiny.yaml", {}),
    "detr-padding": ("DETR/detr_tiny.yaml", {"MODEL.EXACT_PADDING": True}),
    "conditional": ("ConditionalDETR/conditional_detr_tiny.yaml", {}),
    "swin": ("SparseRCNN/sparse_rcnn_tiny.yaml", SWIN),
    "timm": (
        "SparseRCNN/sparse_rcnn_tiny.yaml",
        TIMM | {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone"},
    ),
    "timm-padding": (
        "DETR/detr_tiny.yaml",
        TIMM | {"MODEL.BACKBONE.NAME": "build_timm_backbone", "MODEL.EXACT_PADDING": True},
    ),
}


def make_model(file: str, changes: dict, checkpointing: bool) -> nn.Module:
    options = SMALL | changes | {"MODEL.ACTIVATION_CHECKPOINTING": checkpointing}
    words = [str(word) for pair in options.items() for word in pair]
    torch.manual_seed(1)
    return build_model(load_config(str(CONFIGS / file), words)).train()


def make_batch(sizes: tuple[tuple[int, int], ...] = ((64, 96), (60, 70))) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    batch = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 6, 40, 50], [20, 8, 60, 44]]))
        instances.gt_classes = torch.tensor([0, 1])
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def train_pass(model: nn.Module, amp: bool = False) -> tuple[dict, dict, list]:
    """Losses, gradients and buffers of one pass."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model(make_batch())
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, training_buffers(model)


def numbers(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}


def assert_same(plain: nn.Module, other: nn.Module, amp: bool = False) -> None:
    losses, gradients, buffers = train_pass(plain, amp)
    other_losses, other_gradients, other_buffers = train_pass(other, amp)
    assert numbers(losses) == numbers(other_losses)
    assert gradients.keys() == other_gradients.keys() and gradients
    for name, value in gradients.items():
        torch.testing.assert_close(other_gradients[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for value, other_value in zip(buffers, other_buffers, strict=True):
        assert torch.equal(value, other_value)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_statistics_are_the_same(family):
    plain, other = (make_model(*FAMILIES[family], flag) for flag in (False, True))
    assert not any(isinstance(m, Recomputed) for m in plain.modules())
    again = [m for m in other.modules() if isinstance(m, Recomputed)]
    expected = len(other.roi_heads.stages) + 4 + len(getattr(other.neck, "layers", ()))
    assert len(again) >= expected - 1, "decoder stages, encoder layers and backbone stages"
    assert list(plain.state_dict()) == list(other.state_dict())
    assert_same(plain, other)


def test_autocast_is_that_of_the_first_pass():
    plain, other = (make_model(*FAMILIES["detr"], flag) for flag in (False, True))
    assert_same(plain, other, amp=True)


def test_copies_of_a_model_compute_with_their_own_weights():
    model = make_model(*FAMILIES["sparse"], True)
    before = train_pass(copy.deepcopy(model))[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert numbers(train_pass(twin)[0]) == numbers(before)


def test_compiling_as_well_is_refused():
    with pytest.raises(
        ValueError, match=r"ACTIVATION_CHECKPOINTING and MODEL\.COMPILE are both on"
    ):
        make_model("DETR/detr_tiny.yaml", {"MODEL.COMPILE": True}, True)


def test_less_is_kept_for_the_backward_pass():
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            losses = model(make_batch())
        assert losses
        return sum(sizes.values())

    file, changes = FAMILIES["sparse"]
    plain, other = (make_model(file, changes, flag) for flag in (False, True))
    assert kept(other) < kept(plain) / 2


def test_forward_runs_once_more_while_training_and_not_otherwise():
    calls = []

    class Layer(nn.Linear):
        def forward(self, x):
            calls.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    layer = Layer(2, 2)
    recompute(layer)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.ones(1, 2))
    out.sum().backward()
    assert calls == [True, True]
    layer.eval()(torch.ones(1, 2))
    layer.train()
    with torch.no_grad():
        layer(torch.ones(1, 2))
    assert len(calls) == 4
