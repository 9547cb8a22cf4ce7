"""Detectors of every family on networks of timm: training, padding, folded norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from timm_support import (
    CONVNEXT,
    EFFICIENTNET,
    GRAY,
    LITE,
    RESNET,
    ROOT,
    network,
    with_statistics,
)
from torch import Tensor, nn

from asag import load_config
from asag.engine.optimizer import parameter_groups
from asag.inference.deploy import fold_batch_norms
from asag.modeling.backbone import ZeroPadding
from asag.structures import ImageSizes

# Padding and folding.


@pytest.mark.parametrize("name", [LITE, CONVNEXT, RESNET])
def test_exact_padding_gives_features_of_single_images(name: str) -> None:
    model = with_statistics(network(name)).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # scales of ConvNeXt's branches start near 0
            parameter.data.uniform_(0.5, 1.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    zero_padding = ZeroPadding(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    hw = [(70, 96), (128, 51)]
    images = [torch.randn(3, *size, dtype=torch.double) for size in hw]

    def framed(image: Tensor, height: int, width: int) -> Tensor:
        frame = image.new_zeros(3, height, width)
        frame[:, : image.shape[1], : image.shape[2]] = image
        return frame

    batch = torch.stack([framed(x, 128, 96) for x in images])
    with torch.no_grad():
        dirty = model(batch)
        with zero_padding(ImageSizes.from_hw(hw, (128, 96))):
            clean = model(batch)
        for b, (height, width) in enumerate(hw):
            frame = (-(-height // 32) * 32, -(-width // 32) * 32)
            with zero_padding(ImageSizes.from_hw(hw[b : b + 1], frame)):
                alone = model(framed(images[b], *frame)[None])
            for key, shape in model.output_shape().items():
                rows, columns = -(-height // shape.stride), -(-width // shape.stride)
                expected = alone[key][0, :, :rows, :columns]
                assert torch.allclose(clean[key][b, :, :rows, :columns], expected, atol=1e-9)
                assert not torch.allclose(dirty[key][b, :, :rows, :columns], expected, atol=1e-3)


@pytest.mark.parametrize("name", [EFFICIENTNET, "convnextv2_atto", "test_efficientnet_gn"])
def test_networks_that_see_the_whole_image_are_refused(name: str) -> None:
    """Squeeze and excitation, response normalization, group norm."""
    with pytest.raises(
        ValueError,
        match=rf"MODEL.EXACT_PADDING is True; .*MODEL.TIMM.NAME '{name}', whose features",
    ):
        ZeroPadding(network(name))


@pytest.mark.parametrize("norm", ["BN", "FrozenStatistics", "FrozenBN"])
@pytest.mark.parametrize(("name", "norms"), [(EFFICIENTNET, 12), (RESNET, 15), (LITE, 48)])
def test_folded_norms(name: str, norms: int, norm: str) -> None:
    model = with_statistics(network(name, norm=norm, freeze_at=2))
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norms(model.requires_grad_(False)) == norms
        assert not any(hasattr(m, "running_var") for m in model.modules())
        for key, value in model(x).items():
            assert torch.allclose(
                value, expected[key], atol=1e-4 * float(expected[key].abs().max())
            )


class Unfoldable(nn.Module):
    """A network in timm's shape whose norms stand where folding would change the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.twice, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.free = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> list[Tensor]:
        read_twice = self.conv(x)
        x = self.norm(read_twice) + read_twice
        x = self.norm2(self.twice(self.twice(x)))
        return [self.free(x + 1)]


def test_norms_that_cannot_be_folded_stay() -> None:
    model = network(RESNET, out_strides=(32,))
    model.body, model._positions = Unfoldable(), {1: 0}
    model._shapes = {"res0": ShapeSpec(channels=3, stride=1)}
    with_statistics(model)
    x = torch.rand(1, 3, 8, 8)
    expected = model(x)["res0"]
    assert fold_batch_norms(model) == 0
    assert torch.equal(model(x)["res0"], expected)


# Detectors.

FPN_BACKBONE = {
    "MODEL.BACKBONE.NAME": "build_timm_fpn_backbone",
    "MODEL.FPN.IN_FEATURES": "['res2', 'res3', 'res4', 'res5']",
}
PLAIN_BACKBONE = {"MODEL.BACKBONE.NAME": "build_timm_backbone"}
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 1,
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": 10,
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
}
ONE_MAP = {
    "MODEL.TIMM.OUT_STRIDES": "(32,)",
    "MODEL.ENCODER.IN_FEATURE": "res5",
    "MODEL.EXACT_PADDING": True,
}
DEFORMABLE = {
    "MODEL.DECODER.STAGE": "deformable",
    "MODEL.NECK.NAME": "DeformableEncoder",
    "MODEL.TIMM.OUT_STRIDES": "(8, 16, 32)",
    "MODEL.DEFORMABLE_ENCODER.NUM_LAYERS": 1,
    "MODEL.ROI_HEADS.IN_FEATURES": "['p3', 'p4', 'p5', 'p6']",
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sparse": ("SparseRCNN/sparse_rcnn_tiny.yaml", LITE, FPN_BACKBONE),
    "iou": ("IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml", CONVNEXT, FPN_BACKBONE),
    "dynamic": ("DynamicSparseRCNN/dynamic_sparse_rcnn_tiny.yaml", RESNET, FPN_BACKBONE),
    "asag-s": ("ASAG/asag_tiny.yaml", EFFICIENTNET, FPN_BACKBONE),
    "asag-d": ("ASAG/asag_tiny.yaml", RESNET, PLAIN_BACKBONE | DEFORMABLE),
    "detr": ("DETR/detr_tiny.yaml", LITE, PLAIN_BACKBONE | ONE_MAP),
    "conditional": (
        "ConditionalDETR/conditional_detr_tiny.yaml",
        CONVNEXT,
        PLAIN_BACKBONE | ONE_MAP,
    ),
}


def detector(family: str, **changes: Any) -> tuple[nn.Module, CfgNode]:
    file, name, backbone = FAMILIES[family]
    options = SMALL | backbone | {"MODEL.TIMM.NAME": name} | (GRAY if name != EFFICIENTNET else {})
    options |= {k.replace("__", "."): v for k, v in changes.items()}
    words = [str(word) for pair in options.items() for word in pair]
    cfg = load_config(str(ROOT / "configs" / file), words)
    torch.manual_seed(1)
    return build_model(cfg), cfg


def batch(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    inputs = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 6, 40, 50], [20, 8, 60, 44]]))
        instances.gt_classes = torch.tensor([0, 1])
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_detectors_train_and_detect(family: str) -> None:
    model, cfg = detector(family)
    losses = model.train()(batch((64, 96), (60, 70)))
    assert losses and all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    learned = {
        k: p for k, p in model.named_parameters() if p.requires_grad and k.startswith("backb")
    }
    assert learned and all(p.grad is not None for p in learned.values())
    groups = parameter_groups(
        model.named_parameters(),
        base_lr=1.0,
        weight_decay=0.0,
        backbone_multiplier=cfg.SOLVER.BACKBONE_MULTIPLIER,
    )
    slow = {id(p) for g in groups if g["lr"] == 0.1 for p in g["params"]}
    assert slow == {id(p) for k, p in learned.items() if ".body." in k}
    with torch.no_grad():
        (found,) = model.eval()(batch((64, 90))[:1])
    assert len(found["instances"]) and found["instances"].pred_boxes.tensor.isfinite().all()


@pytest.mark.parametrize("family", ["detr", "conditional"])
def test_detections_do_not_depend_on_the_batch(family: str) -> None:
    model, _ = detector(family)
    with_statistics(model)
    inputs = batch((64, 90), (70, 128))
    with torch.no_grad():
        together = model(inputs)[0]["instances"]
        alone = model(inputs[:1])[0]["instances"]
    assert torch.allclose(together.scores, alone.scores, atol=1e-5)
    assert torch.allclose(together.pred_boxes.tensor, alone.pred_boxes.tensor, atol=1e-2)
