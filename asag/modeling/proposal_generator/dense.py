"""Dense proposals: queries from the best boxes of a region proposal network.

The dense counterpart of adaptive sparse anchors: boxes are predicted for every cell of every map,
the best ones are kept, and features pooled at these boxes are the content (Zhang et al.,
"Featurized Query R-CNN", arXiv 2206.06258; "densely initialized" in ASAG, Section 2).

B images, N queries, C channels, K classes, M padded ground truths.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from ...structures import ImageSizes, Queries, Targets
from ..registry import check_features
from .asag.block import ProposalBlock, build_proposal_block


@PROPOSAL_GENERATOR_REGISTRY.register()
class DenseProposals(nn.Module):
    """Boxes of Detectron2's region proposal network (`MODEL.RPN`, `MODEL.ANCHOR_GENERATOR`), with
    content, class and refined box by the proposal block of ASAG.

    Only the source of the boxes differs from `AdaptiveSparseAnchors`. The losses of the network are
    added to those of the detector, predictions of the block are supervised like those of a stage,
    and no gradient flows from block or stages to the network through the boxes.

    Non-maximum suppression and the sampling of anchors are Detectron2's, which loop over the images
    and synchronize several times an image. As in Detectron2, anchors also cover the padding of a
    batch, so the proposals of an image may depend slightly on its batch.
    """

    @configurable
    def __init__(
        self,
        *,
        rpn: nn.Module,
        block: ProposalBlock,
        block_features: Sequence[str],
        num_queries: int,
    ) -> None:
        """
        Args:
            rpn: `(ImageList, features, instances) -> (proposals of each image, losses)`; proposals
                have `proposal_boxes`, the best first.
            block: boxes -> queries.
            block_features: names of the feature maps of the block, finest first.
            num_queries: N.
        """
        super().__init__()
        self.rpn = rpn
        self.block = block
        self.block_features = tuple(block_features)
        self.num_queries = num_queries

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        model = cfg.MODEL
        for key, names in (
            ("MODEL.RPN.IN_FEATURES", model.RPN.IN_FEATURES),
            ("MODEL.ROI_HEADS.IN_FEATURES", model.ROI_HEADS.IN_FEATURES),
        ):
            check_features(key, names, input_shape, model.DECODER.HIDDEN_DIM)
        _check_anchors(cfg)
        _check_limits(cfg)
        return {
            "rpn": RPN(cfg, input_shape),
            "block": build_proposal_block(cfg, input_shape),
            "block_features": model.ROI_HEADS.IN_FEATURES,
            "num_queries": model.PROPOSAL_GENERATOR.NUM_QUERIES,
        }

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        """Modules for `torch.compile`."""
        return self.rpn.rpn_head, self.block

    def forward(
        self, features: dict[str, Tensor], sizes: ImageSizes, targets: Targets | None = None
    ) -> tuple[Queries, dict[str, Tensor]]:
        """Generates the queries.

        Args:
            features: name -> (B, C, H, W).
            sizes: of the B images.
            targets: padded ground truth in training; None in inference.

        Returns:
            Queries (B, N), the best proposal first, padding last; and, in training mode, the losses
            `loss_rpn_cls` and `loss_rpn_loc`.

        Raises:
            ValueError: `targets` is None in training mode.
        """
        if self.training and targets is None:
            raise ValueError(
                "DenseProposals needs targets in training mode; call .eval() to detect"
            )
        boxes_xyxy, counts, losses = self.propose(features, sizes, targets)
        all_valid = min(counts) == self.num_queries
        slot = torch.arange(self.num_queries)
        valid = (slot < torch.tensor(counts)[:, None]).to(boxes_xyxy.device, non_blocking=True)
        content, logits, proposals_xyxy = self.block(
            [features[f] for f in self.block_features], boxes_xyxy, None if all_valid else valid
        )
        queries = Queries(
            content=content,
            valid=valid,
            # The stages do not train the boxes that they start from.
            boxes_xyxy=proposals_xyxy.detach(),
            all_valid=all_valid,
            proposal_logits=logits,
            proposal_boxes_xyxy=proposals_xyxy,
        )
        return queries, losses

    def propose(
        self, features: dict[str, Tensor], sizes: ImageSizes, targets: Targets | None = None
    ) -> tuple[Tensor, list[int], dict[str, Tensor]]:
        """Generates the boxes only.

        Returns:
            Boxes (B, N, 4) xyxy in pixels without gradient, the best first; the number of proposals
            of each image, at least 1; the losses of the network. Slots without a proposal hold the
            whole image, which is the only proposal of an image without any.
        """
        # The network reads only the sizes of the images: a view without memory replaces them.
        canvas = sizes.whwh.new_zeros(()).expand(len(sizes), 1, *sizes.padded_hw)
        gt = None if targets is None else _instances(targets, sizes)
        with _event_storage():
            proposals, losses = self.rpn(ImageList(canvas, list(sizes.hw)), features, gt)
        best = [x.proposal_boxes.tensor[: self.num_queries].detach() for x in proposals]
        corner = torch.zeros_like(sizes.whwh[:, :2])
        whole_image = torch.cat((corner, sizes.whwh[:, 2:]), dim=1)  # (B, 4)
        padding = whole_image[:, None].expand(-1, self.num_queries, -1)
        boxes_xyxy = torch.stack(
            [torch.cat((x.to(p.dtype), p[len(x) :])) for x, p in zip(best, padding, strict=True)]
        )
        return boxes_xyxy, [max(len(x), 1) for x in best], losses


def _instances(targets: Targets, sizes: ImageSizes) -> list[Instances]:
    """Returns the ground truth boxes as Detectron2 instances; the network reads no labels."""
    return [
        Instances(hw, gt_boxes=Boxes(boxes[:count]))
        for hw, boxes, count in zip(sizes.hw, targets.boxes_xyxy, targets.counts, strict=True)
    ]


def _event_storage() -> AbstractContextManager[Any]:
    """Returns a context with an event storage: the network logs to it and fails without one."""
    try:
        get_event_storage()
    except AssertionError:
        return EventStorage()
    return nullcontext()


def _check_anchors(cfg: CfgNode) -> None:
    levels = len(cfg.MODEL.RPN.IN_FEATURES)
    for key in ("SIZES", "ASPECT_RATIOS"):
        lists = cfg.MODEL.ANCHOR_GENERATOR[key]
        if len(lists) not in (1, levels):
            raise ValueError(
                f"MODEL.ANCHOR_GENERATOR.{key} is {lists}; it must hold one list for each of the "
                f"{levels} features of MODEL.RPN.IN_FEATURES, or a single one for all"
            )


def _check_limits(cfg: CfgNode) -> None:
    queries = cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES
    for key in ("POST_NMS_TOPK_TRAIN", "POST_NMS_TOPK_TEST"):
        if cfg.MODEL.RPN[key] < queries:
            raise ValueError(
                f"MODEL.RPN.{key} is {cfg.MODEL.RPN[key]}; it must be at least "
                f"MODEL.PROPOSAL_GENERATOR.NUM_QUERIES ({queries})"
            )
