"""Detectors of any shipped configuration, shrunk for a step on a CPU, and their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from asag import load_config

DECODER = "MODEL.DECODER."

# Whatever a configuration is about, small enough for a step on a CPU.
SMALL = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.WEIGHTS",
    "",
    "MODEL.SLIM_RESNET.WIDTH",
    8,
    "MODEL.SWIN.EMBED_DIM",
    12,
    "MODEL.SWIN.DEPTHS",
    (1, 2, 1, 1),
    "MODEL.FPN.OUT_CHANNELS",
    16,
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES",
    7,
    "TEST.DETECTIONS_PER_IMAGE",
    7,
    DECODER + "NUM_STAGES",
    2,
    DECODER + "HIDDEN_DIM",
    16,
    DECODER + "NUM_HEADS",
    2,
    DECODER + "FFN_DIM",
    32,
    DECODER + "DYNAMIC_DIM",
    4,
]


def load(path: Path, *options: Any) -> CfgNode:
    return load_config(str(path), [str(x) for x in options])


def small(path: Path, *options: Any) -> nn.Module:
    cfg = load(path, *SMALL, *options)
    if "resnet" in cfg.MODEL.BACKBONE.NAME:
        cfg.MODEL.BACKBONE.NAME = "build_slim_resnet_fpn_backbone"
    return build_model(cfg)


def count(path: Path, *options: Any) -> int:
    """Parameters of a model that exists in name only."""
    cfg = load(path, "MODEL.DEVICE", "meta", *options)
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters())


def training_inputs(num_classes: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for height, width in ((64, 96), (96, 64)):
        objects = Instances((height, width))
        objects.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 20.0, 60.0, 60.0]]))
        objects.gt_classes = torch.tensor([0, num_classes - 1])
        image = torch.rand(3, height, width, generator=generator) * 255
        inputs.append({"image": image, "instances": objects})
    return inputs
