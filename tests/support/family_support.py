"""One tiny detector of each family, and a batch for it."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from asag import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
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
