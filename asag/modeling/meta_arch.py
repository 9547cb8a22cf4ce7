"""Meta-architectures: the detection pipeline and its registered variants.

images -> backbone -> neck -> proposal generator -> ROI heads -> detections (inference)
                                                             -> matcher -> criterion -> losses
                                                                (training)

`SparseDetector` combines any components; the named architectures at the end of this file require
the components of a paper.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_backbone,
)
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..config.rules import check_config
from ..structures import ImageSizes, Predictions, Queries, Targets
from .backbone import ZeroPadding
from .events import put_scalars
from .execution import apply_execution_switches
from .postprocess import select_detections, to_wanted_size
from .registry import build_component, build_criterion, build_matcher, build_neck

INFERENCE_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@META_ARCH_REGISTRY.register()
class SparseDetector(nn.Module):
    """Backbone, neck, proposal generator, ROI heads, matcher and criterion: the counterpart of
    Detectron2's `GeneralizedRCNN` for detectors with a few hundred queries."""

    requirements: ClassVar[dict[str, tuple[Any, ...]]] = {}
    SETTINGS: ClassVar[dict[str, str]] = {"MODEL.CLIP_BOXES": "clip_boxes"}

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: nn.Module | None = None,
        proposal_generator: nn.Module,
        roi_heads: nn.Module,
        matcher: nn.Module,
        criterion: nn.Module,
        num_classes: int,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        input_format: str = "RGB",
        top_k: int = 100,
        nms_threshold: float = 0.0,
        clip_boxes: bool = True,
        softmax: bool = False,
        zero_padding: ZeroPadding | None = None,
        inference_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            backbone: images -> feature maps.
            neck: `(features, sizes) -> features`; None if the backbone includes it (FPN).
            proposal_generator: `(features, sizes, targets) -> (Queries, losses)`.
            roi_heads: `(features, Queries, sizes) -> Predictions`.
            matcher: `(predictions, targets) -> assignment`.
            criterion: `(predictions, targets, assignment) -> losses`.
            num_classes: K.
            pixel_mean, pixel_std: of the image channels, in the order of `input_format`.
            input_format: "RGB" or "BGR", color order of the input tensors.
            top_k: detections an image.
            nms_threshold: IoU threshold of class-wise NMS on the detections; 0 is off.
            clip_boxes: clip detections to the image, and drop those of which nothing is left.
            softmax: class logits end with a background column.
            zero_padding: keeps padding at zero inside of this backbone; None lets it change.
            inference_dtype: autocast dtype outside of training; None leaves the precision to the
                caller.
        """
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.matcher = matcher
        self.criterion = criterion
        self.num_classes = num_classes
        self.input_format = input_format
        self.top_k = top_k
        self.nms_threshold = nms_threshold
        self.clip_boxes = clip_boxes
        self.softmax = softmax
        self.zero_padding = zero_padding
        self.inference_dtype = inference_dtype
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        check_config(cfg)
        cls.check_requirements(cfg)
        model, backbone = cfg.MODEL, build_backbone(cfg)
        shape = backbone.output_shape()
        neck = build_neck(cfg, shape)
        if neck is not None:
            shape = neck.output_shape()
        components = {
            "backbone": backbone,
            "neck": neck,
            "proposal_generator": build_component(
                PROPOSAL_GENERATOR_REGISTRY,
                "MODEL.PROPOSAL_GENERATOR.NAME",
                model.PROPOSAL_GENERATOR.NAME,
                cfg,
                shape,
            ),
            "roi_heads": build_component(
                ROI_HEADS_REGISTRY, "MODEL.ROI_HEADS.NAME", model.ROI_HEADS.NAME, cfg, shape
            ),
            "zero_padding": ZeroPadding(backbone) if model.EXACT_PADDING else None,
        }
        apply_execution_switches(cfg, **components)
        return {
            **components,
            "matcher": build_matcher(cfg),
            "criterion": build_criterion(cfg),
            "num_classes": model.ROI_HEADS.NUM_CLASSES,
            "pixel_mean": tuple(model.PIXEL_MEAN),
            "pixel_std": tuple(model.PIXEL_STD),
            "input_format": cfg.INPUT.FORMAT,
            "top_k": cfg.TEST.DETECTIONS_PER_IMAGE,
            "nms_threshold": model.NMS_THRESH_TEST,
            "clip_boxes": model.CLIP_BOXES,
            "softmax": model.CRITERION.CLASS_LOSS == "softmax",
            "inference_dtype": INFERENCE_DTYPES[model.INFERENCE_DTYPE],
        }

    @classmethod
    def check_requirements(cls, cfg: CfgNode) -> None:
        """Checks that a named architecture has the components of its paper.

        Raises:
            ValueError: a key has another value. The message names the allowed ones.
        """
        for key, allowed in cls.requirements.items():
            value: Any = cfg
            for part in key.split("."):
                value = value[part]
            if value not in allowed:
                raise ValueError(
                    f"{key} is {value!r}; it must be {' or '.join(map(repr, allowed))} with "
                    f"MODEL.META_ARCHITECTURE {cls.__name__!r}. For free combinations set "
                    "MODEL.META_ARCHITECTURE to 'SparseDetector'"
                )

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Computes losses in training mode, detections otherwise.

        Args:
            batched_inputs: Detectron2's format: `image` (3, H, W) in `input_format`, `instances`
                in training, `height` and `width` of the requested output.

        Returns:
            name -> scalar loss, or a list of `{"instances": Instances}` in the requested
            resolution.
        """
        images = self.preprocess_images(batched_inputs)
        sizes = ImageSizes.from_images(images)
        targets = self.read_targets(batched_inputs, sizes) if self.training else None
        with self._precision():
            predictions, losses = self.forward_stages(images.tensor, sizes, targets)
        if self.training:
            assignment = self.matcher(predictions, targets)
            put_scalars(getattr(self.matcher, "metrics", {}))
            return losses | self.criterion(predictions, targets, assignment)
        detections = select_detections(
            predictions,
            sizes.hw,
            top_k=self.top_k,
            softmax=self.softmax,
            nms_threshold=self.nms_threshold,
        )
        return [
            {"instances": to_wanted_size(result, x, clip=self.clip_boxes)}
            for x, result in zip(batched_inputs, detections, strict=True)
        ]

    def _precision(self) -> AbstractContextManager[None]:
        if self.training or self.inference_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.inference_dtype)

    def forward_stages(
        self, images: Tensor, sizes: ImageSizes, targets: Targets | None = None
    ) -> tuple[Predictions, dict[str, Tensor]]:
        """Runs the network up to the ROI heads.

        Args:
            images: (B, 3, H, W) normalized.
            sizes: of the B images.
            targets: padded ground truth in training; None in inference.

        Returns:
            Predictions of all stages, and the losses of the proposal generator.
        """
        with self.zero_padding(sizes) if self.zero_padding else nullcontext():
            features: dict[str, Tensor] = self.backbone(images)
        if self.neck is not None:
            features = self.neck(features, sizes)
        queries: Queries
        queries, losses = self.proposal_generator(features, sizes, targets)
        return self.roi_heads(features, queries, sizes), losses

    def preprocess_images(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalizes the images, pads them at the right and bottom with zeros, and batches them.

        Raises:
            ValueError: an image is not a (3, H, W) tensor. The message names the input.
        """
        for x in batched_inputs:
            image = x.get("image")
            if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
                actual = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(
                    f"image of input {_name(x)!r} must be a (3, H, W) tensor in "
                    f"{self.input_format} order, got {actual}"
                )
        moved = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        normalized = [(x - self.pixel_mean) / self.pixel_std for x in moved]
        return ImageList.from_tensors(normalized, self.backbone.size_divisibility)

    def read_targets(self, batched_inputs: list[dict[str, Any]], sizes: ImageSizes) -> Targets:
        """Reads and pads the ground truth of a training batch.

        Raises:
            ValueError: an input has no `instances`, or a label out of range.
        """
        instances: list[Instances] = []
        for x in batched_inputs:
            if "instances" not in x:
                raise ValueError(
                    f"training input {_name(x)!r} has no 'instances'; use the training mapper "
                    "(is_train=True)"
                )
            # The mapper leaves the labels on the host: checking them needs no synchronization.
            labels = x["instances"].gt_classes.numpy(force=True)
            wrong = labels[(labels < 0) | (labels >= self.num_classes)]
            if wrong.size:
                raise ValueError(
                    f"training input {_name(x)!r} has the label {int(wrong[0])}, but "
                    f"MODEL.ROI_HEADS.NUM_CLASSES is {self.num_classes}: labels are 0 to "
                    f"{self.num_classes - 1}. Set the key to the number of classes of the data"
                )
            instances.append(x["instances"])
        return Targets.from_instances(instances, sizes.whwh)


def _name(x: dict[str, Any]) -> Any:
    return x.get("file_name", x.get("image_id", "without a name"))


@META_ARCH_REGISTRY.register()
class SparseRCNN(SparseDetector):
    """Sparse R-CNN (Sun et al., CVPR 2021): learned proposals, stages with dynamic convolution,
    one-to-one matching."""

    requirements: ClassVar[dict[str, tuple[Any, ...]]] = {
        "MODEL.PROPOSAL_GENERATOR.NAME": ("LearnedProposals",),
        "MODEL.ROI_HEADS.NAME": ("DynamicConvHeads",),
        "MODEL.DECODER.SELF_ATTENTION": ("msa",),
        "MODEL.DECODER.DCW": (False,),
        "MODEL.DECODER.DISENTANGLE": ("none",),
        "MODEL.MATCHER.NAME": ("HungarianMatcher",),
    }


@META_ARCH_REGISTRY.register()
class DynamicSparseRCNN(SparseDetector):
    """Sparse R-CNN with dynamic label assignment and dynamic proposals (Hong et al., CVPR 2022)."""

    requirements: ClassVar[dict[str, tuple[Any, ...]]] = {
        "MODEL.PROPOSAL_GENERATOR.NAME": ("DynamicProposals",),
        "MODEL.ROI_HEADS.NAME": ("DynamicConvHeads",),
        "MODEL.DECODER.SELF_ATTENTION": ("msa",),
        "MODEL.DECODER.DCW": (False,),
        "MODEL.DECODER.DISENTANGLE": ("none",),
        "MODEL.MATCHER.NAME": ("OptimalTransportMatcher",),
    }


@META_ARCH_REGISTRY.register()
class IoUEnhancedSparseRCNN(SparseDetector):
    """Sparse R-CNN with IoU-enhanced attention and dynamic channel weighting (Zhao et al., ECCV
    2022)."""

    requirements: ClassVar[dict[str, tuple[Any, ...]]] = {
        "MODEL.PROPOSAL_GENERATOR.NAME": ("LearnedProposals",),
        "MODEL.ROI_HEADS.NAME": ("DynamicConvHeads",),
        "MODEL.DECODER.SELF_ATTENTION": ("iou_esa",),
        "MODEL.DECODER.DCW": (True,),
        "MODEL.DECODER.DISENTANGLE": ("none",),
        "MODEL.MATCHER.NAME": ("HungarianMatcher",),
    }


@META_ARCH_REGISTRY.register()
class ASAG(SparseDetector):
    """One decoder stage on adaptive sparse anchors, with Query Weighting (Fu et al., ICCV 2023).

    `MODEL.DECODER.STAGE` selects ASAG-A, -S or -D.
    """

    requirements: ClassVar[dict[str, tuple[Any, ...]]] = {
        "MODEL.PROPOSAL_GENERATOR.NAME": ("AdaptiveSparseAnchors",),
        "MODEL.ROI_HEADS.NAME": ("ParallelHeads",),
        "MODEL.DECODER.SELF_ATTENTION": ("msa",),
        "MODEL.DECODER.DCW": (False,),
        "MODEL.DECODER.DISENTANGLE": ("none",),
        "MODEL.MATCHER.NAME": ("HungarianMatcher",),
        "MODEL.CRITERION.NAME": ("QueryWeightingCriterion", "SetCriterion"),
    }


@META_ARCH_REGISTRY.register()
class DETR(SparseDetector):
    """Transformer encoder and decoder on one feature map, learned object queries (Carion et al.,
    ECCV 2020)."""

    requirements: ClassVar[dict[str, tuple[Any, ...]]] = {
        "MODEL.NECK.NAME": ("TransformerEncoder",),
        "MODEL.PROPOSAL_GENERATOR.NAME": ("ObjectQueries",),
        "MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS": ("none",),
        "MODEL.ROI_HEADS.NAME": ("DETRHeads",),
        "MODEL.DECODER.SELF_ATTENTION": ("msa",),
        "MODEL.DECODER.DCW": (False,),
        "MODEL.MATCHER.NAME": ("HungarianMatcher",),
    }


@META_ARCH_REGISTRY.register()
class ConditionalDETR(SparseDetector):
    """DETR with conditional cross-attention, whose spatial queries depend on a reference point and
    the embedding of the previous stage (Meng et al., ICCV 2021)."""

    requirements: ClassVar[dict[str, tuple[Any, ...]]] = {
        "MODEL.NECK.NAME": ("TransformerEncoder",),
        "MODEL.PROPOSAL_GENERATOR.NAME": ("ObjectQueries",),
        "MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS": ("predicted", "learned", "origin"),
        "MODEL.ROI_HEADS.NAME": ("ConditionalDETRHeads",),
        "MODEL.DECODER.SELF_ATTENTION": ("msa",),
        "MODEL.DECODER.DCW": (False,),
        "MODEL.MATCHER.NAME": ("HungarianMatcher",),
    }
