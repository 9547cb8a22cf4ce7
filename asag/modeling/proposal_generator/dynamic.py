"""Dynamic proposal generation: a mixture of experts with weights from the image (Dynamic Sparse
R-CNN, Section 3.3, Fig. 3).

B images, N queries, C channels, E experts, D side of the square map that describes an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from torch import Tensor, nn

from ...structures import ImageSizes, Queries, Targets
from ..layers.boxes import cxcywh_to_xyxy
from ..layers.init import xavier_init_matrices
from .learned import initial_boxes


class ImageDescriptor(nn.Module):
    """Converts a feature pyramid to one D x D map of the whole image, flattened.

    With the staircase, each level is halved by a depth-wise convolution and concatenated with the
    next coarser one, up to the coarsest resolution; without it, each level is resized by itself
    (Table 2). Channels are summed *before* resizing: both are linear, and one channel is resized
    instead of all.
    """

    def __init__(self, *, dim: int, num_levels: int, size: int, staircase: bool) -> None:
        """
        Args:
            dim: channels C of each level.
            num_levels: levels of the pyramid, each half the size of the one before.
            size: D.
            staircase: merge levels by convolutions, see above.
        """
        super().__init__()
        self.size = size
        widths = [dim * (i + 1) for i in range(num_levels - 1)] if staircase else []
        self.halve = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width) for width in widths
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Describes images by maps (B, C, H_l, W_l), finest first -> (B, D * D)."""
        if self.halve:
            stair = maps[0]
            for conv, coarser in zip(self.halve, maps[1:], strict=True):
                stair = torch.cat((conv(stair), coarser), dim=1)
            maps = [stair]
        return sum(self._resize(x.sum(dim=1, keepdim=True)) for x in maps).flatten(1)

    def _resize(self, x: Tensor) -> Tensor:
        size = (self.size, self.size)
        return F.interpolate(x.float(), size, mode="bilinear", align_corners=False)


@PROPOSAL_GENERATOR_REGISTRY.register()
class DynamicProposals(nn.Module):
    """E sets of learned proposals, mixed by a small network for each image (Eq. 3).

    The weights are a softmax over experts, separate for each of the N proposals. Its temperature
    falls linearly in training; the current value is part of the state dict, so that evaluation and
    resumed training use it. A checkpoint with one set of learned proposals (Sparse R-CNN) is loaded
    into all experts: the detector then starts with the predictions of the trained one.
    """

    @configurable
    def __init__(
        self,
        *,
        num_queries: int,
        num_experts: int,
        dim: int,
        in_features: Sequence[str],
        size: int = 30,
        hidden_dim: int = 1500,
        staircase: bool = True,
        box_init: str = "image",
        tau_init: float = 30.0,
        tau_final: float = 1.0,
        tau_steps: int = 73300,
    ) -> None:
        """
        Args:
            num_queries: N.
            num_experts: E.
            dim: channels C of features and queries.
            in_features: levels that describe the image, finest first.
            size: D.
            hidden_dim: width between the two linear layers of the weight network.
            staircase: see `ImageDescriptor`.
            box_init: see `initial_boxes`; random boxes are drawn for each expert.
            tau_init, tau_final: softmax temperature at the start and at the end of the annealing.
            tau_steps: forward passes of the annealing; 0 uses `tau_final` from the start.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.num_experts = num_experts
        self.tau_init, self.tau_final, self.tau_steps = tau_init, tau_final, tau_steps
        self.describe = ImageDescriptor(
            dim=dim, num_levels=len(in_features), size=size, staircase=staircase
        )
        self.weigh = nn.Sequential(
            nn.Linear(size * size, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, num_experts * num_queries),
        )
        for module in (self.describe, self.weigh):
            xavier_init_matrices(module)
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
        boxes = [initial_boxes(box_init, num_queries) for _ in range(num_experts)]
        self.expert_boxes_cxcywh = nn.Parameter(torch.stack(boxes))
        self.expert_features = nn.Parameter(torch.randn(num_experts, num_queries, dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("temperature", torch.tensor(tau_init if tau_steps else tau_final))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        dpg = cfg.MODEL.PROPOSAL_GENERATOR.DPG
        forwards = cfg.SOLVER.MAX_ITER * cfg.SOLVER.ACCUMULATE_STEPS
        return {
            "num_queries": cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES,
            "num_experts": dpg.NUM_EXPERTS,
            "dim": cfg.MODEL.DECODER.HIDDEN_DIM,
            "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "size": dpg.SIZE,
            "hidden_dim": dpg.FC_DIM,
            "staircase": dpg.STAIRCASE,
            "box_init": cfg.MODEL.PROPOSAL_GENERATOR.BOX_INIT,
            "tau_init": dpg.TAU_INIT,
            "tau_final": dpg.TAU_FINAL,
            "tau_steps": round(dpg.TAU_SHARE * forwards),
        }

    def forward(
        self,
        features: dict[str, Tensor],
        sizes: ImageSizes,
        targets: Targets | None = None,
    ) -> tuple[Queries, dict[str, Tensor]]:
        """Mixes the proposals of the experts.

        Args:
            features: name -> (B, C, H, W).
            sizes: of the B images.
            targets: not used.

        Returns:
            Queries (B, N) and no losses.
        """
        # Not by matrix products, which autocast would round to half precision.
        weights = self.expert_weights(features)[..., None]  # (B, E, N, 1)
        boxes_cxcywh = (weights * self.expert_boxes_cxcywh).sum(dim=1)
        content = (weights * self.expert_features).sum(dim=1)
        queries = Queries(
            content=content,
            valid=torch.ones(content.shape[:2], dtype=torch.bool, device=content.device),
            boxes_xyxy=cxcywh_to_xyxy(boxes_cxcywh) * sizes.whwh[:, None],
            all_valid=True,
        )
        return queries, {}

    def expert_weights(self, features: dict[str, Tensor]) -> Tensor:
        """Returns weights (B, E, N), float32, that sum to one over the experts of each proposal."""
        if self.training:
            self._anneal()
        scores = self.weigh(self.describe([features[f] for f in self.in_features]))
        scores = scores.float().view(scores.shape[0], self.num_experts, -1)
        return (scores / self.temperature).softmax(dim=1)

    @torch.no_grad()
    def _anneal(self) -> None:
        """Updates the temperature, on the device to avoid synchronization."""
        if self.tau_steps:
            progress = (self.steps / self.tau_steps).clamp(max=1)
            self.temperature.copy_(self.tau_init + (self.tau_final - self.tau_init) * progress)
        self.steps += 1

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for single, experts in (
            ("features", "expert_features"),
            ("boxes_cxcywh", "expert_boxes_cxcywh"),
        ):
            if prefix + single in state_dict and prefix + experts not in state_dict:
                value = state_dict.pop(prefix + single)
                state_dict[prefix + experts] = value.expand(self.num_experts, *value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
