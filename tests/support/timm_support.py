"""Networks of timm for tests: tiny ones, and norms as training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asag.modeling.backbone import TimmBackbone

ROOT = Path(__file__).resolve().parents[2]
EFFICIENTNET, CONVNEXT, RESNET = "test_efficientnet", "test_convnext", "test_resnet"
LITE = "tf_efficientnet_lite0"  # padded as TensorFlow does it
TINY = (EFFICIENTNET, CONVNEXT, RESNET)
GRAY = {"MODEL.PIXEL_MEAN": "[127.5, 127.5, 127.5]", "MODEL.PIXEL_STD": "[127.5, 127.5, 127.5]"}


def network(name: str, **changes: Any) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(name, **changes)


def with_statistics(model: nn.Module) -> nn.Module:
    """Norms with values that training could have left."""
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.7, 1.3)
            module.bias.data.normal_(std=0.2)
    return model.eval()
