"""Proposal generator of ASAG: adaptive sparse anchors and a proposal block (Fu et al., ICCV 2023,
Fig. 4).

B images, N queries, D denoising queries, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from torch import Tensor, nn

from ....structures import ImageSizes, Queries, Targets
from ...layers.boxes import at_least_float32, cxcywh_to_xyxy
from ...layers.loss_weights import QueryWeights
from ...matching.cost import MatchingCost
from ...registry import check_features
from .anchor_loss import AnchorCriterion
from .anchors import AdaptiveAnchorGenerator, GeneratedAnchors, ProbingRules
from .block import ProposalBlock, build_proposal_block
from .denoising import attendable_pairs, noised_boxes, noised_gt
from .network import AnchorNetwork
from .training_patches import PatchCompletion, Uniform, draw_uniform

ANCHOR_STRIDES = (8, 16, 32)
FAST_MIN_SELECTED, FAST_MAX_PATCHES = 3, 15  # the paper's fast inference, Section 4.1


@PROPOSAL_GENERATOR_REGISTRY.register()
class AdaptiveSparseAnchors(nn.Module):
    """Queries from a variable number of anchors an image, with content, class logits and boxes.

    The losses are those of the anchors; the predictions of the proposal block are passed on with
    the queries and supervised like those of a stage.
    """

    @configurable
    def __init__(
        self,
        *,
        generator: AdaptiveAnchorGenerator,
        block: ProposalBlock,
        criterion: AnchorCriterion,
        anchor_features: Sequence[str],
        block_features: Sequence[str],
        min_patches: int = 4,
        warmup_steps: int = 0,
        num_denoising: int = 0,
        noise: float = 0.4,
        noise_decay: float = 0.0,
        uniform: Uniform = draw_uniform,
    ) -> None:
        """
        Args:
            generator: features -> anchors.
            block: anchors -> queries.
            criterion: losses of the anchors.
            anchor_features: names of the feature maps of strides 8, 16 and 32.
            block_features: names of the feature maps of the block, finest first.
            min_patches: smallest number of training patches an image on P4 and on P3.
            warmup_steps: forward passes at the start of training without probing, on ground-truth
                patches.
            num_denoising: denoising queries D in training; 0 is off.
            noise: of their boxes, see `noised_boxes`.
            noise_decay: decrease of the noise a forward pass in training.
            uniform: source of randomness.
        """
        super().__init__()
        self.generator = generator
        self.block = block
        self.criterion = criterion
        self.anchor_features = tuple(anchor_features)
        self.block_features = tuple(block_features)
        self.min_patches = min_patches
        self.warmup_steps = warmup_steps
        self.num_denoising = num_denoising
        self.noise = noise
        self.noise_decay = noise_decay
        self.uniform = uniform
        # Number of forward passes in training, on the device to avoid synchronization.
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        asag, decoder, heads = cfg.MODEL.ASAG, cfg.MODEL.DECODER, cfg.MODEL.ROI_HEADS
        check_features("MODEL.ASAG.IN_FEATURES", asag.IN_FEATURES, input_shape, decoder.HIDDEN_DIM)
        check_features(
            "MODEL.ROI_HEADS.IN_FEATURES", heads.IN_FEATURES, input_shape, decoder.HIDDEN_DIM
        )
        strides = tuple(input_shape[f].stride for f in asag.IN_FEATURES)
        if strides != ANCHOR_STRIDES:
            raise ValueError(
                f"MODEL.ASAG.IN_FEATURES is {list(asag.IN_FEATURES)} with strides {strides}; it "
                f"must name features of the strides {ANCHOR_STRIDES}"
            )
        return {
            "generator": _anchor_generator(cfg),
            "block": build_proposal_block(cfg, input_shape),
            "criterion": _anchor_criterion(cfg),
            "anchor_features": asag.IN_FEATURES,
            "block_features": heads.IN_FEATURES,
            "min_patches": asag.MIN_TRAIN_PATCHES,
            "warmup_steps": asag.GT_WARMUP_ITERS,
            "num_denoising": asag.NUM_DENOISING,
            "noise": asag.DENOISING_NOISE,
            "noise_decay": asag.DENOISING_NOISE_DECAY,
        }

    @property
    def compilable(self) -> tuple[nn.Module, ...]:
        """Modules for `torch.compile`; the anchor generator only with fixed capacities, because
        data-dependent sizes would break its graph."""
        return (self.generator, self.block) if self.generator.static else (self.block,)

    def forward(
        self, features: dict[str, Tensor], sizes: ImageSizes, targets: Targets | None = None
    ) -> tuple[Queries, dict[str, Tensor]]:
        """Generates the queries.

        Args:
            features: name -> (B, C, H, W).
            sizes: of the B images.
            targets: padded ground truth in training; None in inference.

        Returns:
            Queries (B, N), or (B, D + N) with denoising, and the losses of the anchors.
        """
        generated = self.generate(features, sizes, targets)
        anchors = generated.anchors
        boxes_xyxy, valid = cxcywh_to_xyxy(anchors.boxes_cxcywh), anchors.valid
        attend = gt = None
        if targets is not None and self.num_denoising:
            gt, group = noised_gt(targets, self.num_denoising)
            noised = noised_boxes(targets, gt, self._current_noise(), self.uniform)
            attend = attendable_pairs(group, valid, ~targets.valid.any(dim=1))
            boxes_xyxy = torch.cat((noised, boxes_xyxy), dim=1)
            valid = torch.cat((gt >= 0, valid), dim=1)
        all_valid = attend is None and self._all_valid(valid.shape[0])
        mask = (None if all_valid else valid) if attend is None else attend
        content, logits, proposals_xyxy = self.block(
            [features[f] for f in self.block_features], boxes_xyxy, mask
        )
        queries = Queries(
            content=content,
            valid=valid,
            # The stages do not train the boxes that they start from.
            boxes_xyxy=proposals_xyxy.detach(),
            all_valid=all_valid,
            attend=attend,
            proposal_logits=logits,
            proposal_boxes_xyxy=proposals_xyxy,
            noised=gt,
        )
        if targets is None:
            return queries, {}
        losses = self.criterion(generated, targets)
        self.steps += 1
        return queries, losses

    def generate(
        self, features: dict[str, Tensor], sizes: ImageSizes, targets: Targets | None = None
    ) -> GeneratedAnchors:
        """Generates the anchors only, in full precision because of the thresholds on scores."""
        maps = [at_least_float32(features[f]) for f in self.anchor_features]
        completion = probing = None
        if targets is not None:
            warmup = self.steps < self.warmup_steps
            probing = ~warmup
            completion = PatchCompletion(
                targets,
                side=self.generator.network.side,
                minimum=self.min_patches,
                iou_threshold=self.generator.rules.eta_iou,
                warmup=warmup,
                capacity=self.generator.patch_capacity,
                uniform=self.uniform,
            )
        with torch.autocast(sizes.whwh.device.type, enabled=False):
            return self.generator(maps, sizes.whwh, completion, probing)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # Published weights have no count; they are past the warm-up.
        if prefix + "steps" not in state_dict and any(x.startswith(prefix) for x in state_dict):
            state_dict[prefix + "steps"] = torch.full_like(self.steps, self.warmup_steps)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _all_valid(self, batch: int) -> bool:
        """True for a single image, which needs no padding unless the number of slots is fixed."""
        return not self.generator.static and batch == 1 and self.generator.rules.min_anchors > 0

    def _current_noise(self) -> Tensor | float:
        if not self.noise_decay:
            return self.noise
        return (self.noise - self.noise_decay * self.steps).clamp(min=0)


def _anchor_generator(cfg: CfgNode) -> AdaptiveAnchorGenerator:
    asag = cfg.MODEL.ASAG
    rules = ProbingRules(
        eta_f=asag.ETA_F,
        eta_l=asag.ETA_L,
        eta_h=asag.ETA_H,
        eta_iou=asag.ETA_IOU,
        min_anchors=asag.MIN_ANCHORS,
        max_anchors=asag.MAX_ANCHORS,
        min_side=asag.MIN_SIDE,
        max_patches=asag.MAX_PATCHES,
        replace=asag.REPLACE,
    )
    inference = replace(rules, finest_level=asag.FINEST_LEVEL_TEST)
    if asag.FAST_TEST:
        inference = replace(inference, min_selected=FAST_MIN_SELECTED, max_patches=FAST_MAX_PATCHES)
    return AdaptiveAnchorGenerator(
        network=AnchorNetwork(
            dim=cfg.MODEL.DECODER.HIDDEN_DIM,
            channels=asag.COMPRESSED_DIM,
            fixed_anchors=asag.FIXED_ANCHORS,
            patch_anchors=asag.PATCH_ANCHORS,
            side=asag.PATCH_SIZE,
            anchor_init=asag.ANCHOR_INIT,
        ),
        rules=rules,
        inference_rules=inference,
        patch_capacity=asag.PATCH_CAPACITY,
        anchor_capacity=asag.ANCHOR_CAPACITY,
    )


def _anchor_criterion(cfg: CfgNode) -> AnchorCriterion:
    asag, criterion = cfg.MODEL.ASAG, cfg.MODEL.CRITERION
    return AnchorCriterion(
        cost=MatchingCost.from_config(cfg),
        weights=QueryWeights(criterion.SCORE_EXPONENT, criterion.IOU_EXPONENT),
        class_weight=asag.CLASS_WEIGHT,
        l1_weight=asag.L1_WEIGHT,
        giou_weight=asag.GIOU_WEIGHT,
        focal_gamma=criterion.FOCAL_GAMMA,
        nominal_patches=float(asag.MIN_TRAIN_PATCHES),
        released_flip=asag.RELEASED_FLIP,
    )
