"""Reference cases of Conditional DETR and DETR: inference, training, and single components.

B images, N queries, L = H' x W' cells of the feature map, S stages, K classes, C channels. The
reference rounds cells at the border of padding as the authors do, so EXACT_PADDING is off here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from asag import get_asag_cfg
from asag.checkpoint import CONDITIONAL_DETR, DETR
from asag.modeling.backbone import build_dc5_resnet_backbone
from asag.modeling.criterion import SetCriterion
from asag.modeling.layers.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from asag.modeling.layers.position_encoding import (
    FeaturePositions,
    cell_mask,
    embed_cells,
    inverse_sigmoid,
    sine_embedding,
    valid_cells,
)
from asag.modeling.matching import HungarianMatcher, MatchingCost
from asag.modeling.neck import TransformerEncoder
from asag.modeling.postprocess import select_detections
from asag.modeling.proposal_generator import ObjectQueries
from asag.modeling.roi_heads import ConditionalDETRHeads, DETRHeads
from asag.structures import ImageSizes, Predictions, Targets

from .common import Check, UnknownCase

SUITE = "conditional_detr"
EXACT, LAYERS, LOSS, GRAD = 1e-5, 1e-4, 1e-3, 2e-3
# Deep random networks amplify rounding.
DEEP = 10.0
DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def verify(path: Path) -> Iterator[Check]:
    """Yields the comparisons of one file; raises UnknownCase if it is no case of this suite."""
    case = torch.load(path, weights_only=True) if path.suffix == ".pt" else {}
    if not isinstance(case, dict):
        raise UnknownCase("is not a dict of tensors")
    if {"config", "state_dict", "pred_logits"} <= case.keys():
        yield from ModelCase(case).checks()
    elif case.keys() & {"position_embedding", "mask_downsample", "postprocess", "matching"}:
        yield from component_checks(case)
    else:
        raise UnknownCase(f"keys {sorted(case)} fit neither a model nor components")


class ModelCase:
    """Our components with the weights of a case, and their output for its images or features."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.conditional = any("ref_point_head" in name for name in case["state_dict"])
        self.table = CONDITIONAL_DETR if self.conditional else DETR
        self.deep = DEEP if "images_uint8_rgb" in case else 1.0
        self.dtype = case["pred_logits"].dtype
        self.sizes = self.read_sizes()
        cfg = configure(case, self.conditional)
        self.model = build_components(cfg, case)
        state = {k: v.to(self.dtype) for k, v in case["state_dict"].items()}
        self.model.load_state_dict(self.table.to_ours(state), strict=True)
        self.model.to(self.dtype).eval()
        loss = case["loss_weights"]
        weights = [loss[f"loss_{name}"] for name in ("ce", "bbox", "giou")]
        self.matcher, self.criterion = matcher_and_criterion(weights, self.conditional)

    def read_sizes(self) -> ImageSizes:
        """Returns the image sizes; for a case without images a cell counts as a pixel."""
        if "padded_pixel_mask" in self.case:
            return sizes_of_mask(self.case["padded_pixel_mask"], self.dtype)
        return sizes_of_mask(self.case["mask"], self.dtype)

    def features(self) -> dict[str, Tensor]:
        """Returns the input map of the encoder: stored, or computed from the images."""
        if "images_uint8_rgb" not in self.case:
            return {"res5": self.case["feature"].to(self.dtype)}
        mean, std = (
            torch.tensor(x, dtype=self.dtype)[:, None, None]
            for x in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
        )
        height, width = self.sizes.padded_hw
        images = [
            F.pad((x - mean) / std, (0, width - x.shape[-1], 0, height - x.shape[-2]))
            for x in self.case["images_uint8_rgb"]
        ]
        return self.model.backbone(torch.stack(images))

    def predict(self) -> tuple[Predictions, dict[str, Any]]:
        """Returns predictions and intermediate tensors."""
        seen: dict[str, Any] = {"layers": [], "weights": [], "scale": []}

        def record_stage(stage: nn.Module, _args: tuple, output: tuple) -> None:
            seen["layers"].append(output[2])

        def record_attention(attention: nn.Module, args: tuple, _output: Tensor) -> None:
            with torch.no_grad():
                seen["weights"].append(attention.weights(*args).mean(dim=1))

        def record_scale(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            seen["scale"].append(output)

        model = self.model
        handles = [x.register_forward_hook(record_stage) for x in model.roi_heads.stages]
        handles += [
            x.cross_attention.register_forward_hook(record_attention)
            for x in model.roi_heads.stages
        ]
        if self.conditional:
            transformation = model.roi_heads.spatial_query.transformation
            handles.append(transformation.register_forward_hook(record_scale))
        try:
            seen["features"] = self.features()
            seen["memory"] = model.neck(seen["features"], self.sizes)
            seen["queries"], _ = model.proposal_generator(seen["memory"], self.sizes)
            predictions = model.roi_heads(seen["memory"], seen["queries"], self.sizes)
        finally:
            for handle in handles:
                handle.remove()
        return predictions, seen

    def checks(self) -> Iterator[Check]:
        """Compares every tensor of the case."""
        case, tolerance = self.case, LAYERS * self.deep
        with torch.no_grad():
            predictions, seen = self.predict()
        yield from self.embeddings(seen)
        memory = seen["memory"]["memory"].flatten(2).transpose(1, 2)
        valid = ~case["mask"].flatten(1)[..., None]
        yield Check("memory", memory * valid, case["memory"] * valid, tolerance)
        for s, expected in enumerate(case["decoder_out_before_final_norm"]):
            yield Check(f"stage{s}.embedding", seen["layers"][s], expected, tolerance)
            expected = case["cross_attn_weights_headmean"][s]
            yield Check(f"stage{s}.attention", seen["weights"][s], expected, tolerance)
            logits = predictions.logits[s]
            yield Check(f"stage{s}.logits", logits, case["pred_logits"][s], tolerance)
            boxes = xyxy_to_cxcywh(predictions.boxes_xyxy[s] / self.sizes.whwh[:, None])
            yield Check(f"stage{s}.boxes", boxes, case["pred_boxes"][s], tolerance)
            if s and self.conditional:
                scale, expected = seen["scale"][s - 1], case["query_scale"][s - 1]
                yield Check(f"stage{s}.query_scale", scale, expected, tolerance)
        for i, train in enumerate(case["loss_cases"]):
            yield from self.training(f"loss{i}", train)

    def embeddings(self, seen: dict[str, Any]) -> Iterator[Check]:
        """Compares feature map, mask, position embedding and reference points."""
        case = self.case
        feature = seen["features"]["res5"]
        yield Check("feature", feature, case["feature"], LAYERS * self.deep, LAYERS * self.deep)
        height, width = case["mask"].shape[-2:]
        cells = valid_cells(self.sizes, (height, width), None)
        valid = cell_mask(cells, (height, width))
        yield Check("mask", ~valid, case["mask"], 0)
        dim = case["config"]["hidden"]
        embedding = (
            embed_cells(valid, dim, self.dtype).transpose(1, 2).unflatten(2, valid.shape[1:])
        )
        yield Check("pos_embed", embedding, case["pos_embed"], EXACT)
        used, _ = FeaturePositions(dim=dim)(feature, self.sizes)
        expected = case["pos_embed"].flatten(2).transpose(1, 2)
        yield Check("pos_embed.used", used.expand_as(expected), expected, EXACT)
        if self.conditional:
            points = seen["queries"].points_xy.expand_as(case["reference_points"])
            yield Check("reference_points", points, case["reference_points"], EXACT)
            logits = case["reference_logits"]
            yield Check("reference_logits", points.logit(), logits, LAYERS, LAYERS)

    def training(self, name: str, train: dict[str, Any]) -> Iterator[Check]:
        """Compares matches, losses and gradients for one set of targets."""
        targets = targets_of(train["targets"], self.sizes.whwh)
        self.model.zero_grad(set_to_none=True)
        predictions, _ = self.predict()
        assignment = self.matcher(predictions, targets)
        for s, indices in enumerate(train["indices_per_layer"]):
            expected = assignment_of(indices, assignment[s])
            yield Check(f"{name}.match.stage{s}", assignment[s], expected, 0)
        losses = self.criterion(predictions, targets, assignment)
        yield from loss_checks(name, losses, train, self.case["loss_weights"], LOSS * self.deep)
        sum(losses.values()).backward()
        ours = self.table.to_theirs(
            {
                k: torch.full_like(p, float("nan")) if p.grad is None else p.grad
                for k, p in self.model.named_parameters()
            }
        )
        without = {k for k, grad in ours.items() if bool(grad.isnan().all())}
        missing = without ^ set(train["params_without_grad"])
        yield Check(f"{name}.params_without_grad", float(len(missing)), 0.0, 0)
        scale = max((float(x) for x in train["grad_l2_norm"].values()), default=0.0)
        for key, norm in train["grad_l2_norm"].items():
            if key not in without:
                atol = 1e-6 + 1e-5 * self.deep * scale
                yield Check(
                    f"{name}.grad_norm.{key}", ours[key].norm(), norm, atol, GRAD * self.deep
                )
        for key, grad in train["grads"].items():
            # Small entries of a large gradient have the rounding error of the large ones.
            atol = GRAD * self.deep * float(grad.abs().max()) + 1e-6
            yield Check(f"{name}.grad.{key}", ours[key], grad, atol, GRAD * self.deep)


def configure(case: dict[str, Any], conditional: bool) -> CfgNode:
    """Returns our configuration with the sizes of a case."""
    sizes = case["config"]
    cfg = get_asag_cfg()
    d = cfg.MODEL.DECODER
    d.HIDDEN_DIM, d.NUM_HEADS, d.FFN_DIM = sizes["hidden"], sizes["heads"], sizes["ffn"]
    d.NUM_STAGES, d.PRE_NORM = sizes["dec"], bool(sizes.get("pre_norm", False))
    cfg.MODEL.ENCODER.NUM_LAYERS = sizes["enc"]
    cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES = sizes["queries"]
    cfg.MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS = "predicted" if conditional else "none"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["memory"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = sizes["classes"]
    cfg.MODEL.CRITERION.CLASS_LOSS = "focal" if conditional else "softmax"
    if "resnet_blocks" in sizes:
        r, divisor = cfg.MODEL.RESNETS, sizes["resnet_width_divisor"]
        r.DEPTH = depth_of(sizes["resnet_blocks"])
        r.STEM_OUT_CHANNELS, r.WIDTH_PER_GROUP = 64 // divisor, 64 // divisor
        r.RES2_OUT_CHANNELS = 256 // divisor
        r.RES5_DILATION = 2 if sizes.get("dilation_c5") else 1
        r.OUT_FEATURES = ["res5"]
    return cfg


def depth_of(blocks: list[int]) -> int:
    """Returns the depth of the ResNet with these numbers of blocks."""
    if tuple(blocks) not in DEPTHS:
        raise UnknownCase(f"no ResNet has {list(blocks)} blocks")
    return DEPTHS[tuple(blocks)]


def build_components(cfg: CfgNode, case: dict[str, Any]) -> nn.Module:
    """Builds backbone (if the case has one), neck, proposal generator and heads."""
    model = nn.Module()
    shapes = {"res5": ShapeSpec(channels=case["config"]["in_channels"], stride=32)}
    if "images_uint8_rgb" in case:
        model.backbone = build_dc5_resnet_backbone(cfg, ShapeSpec(channels=3))
        shapes = model.backbone.output_shape()
    model.neck = TransformerEncoder(cfg, shapes)
    model.proposal_generator = ObjectQueries(cfg, shapes)
    offsets = cfg.MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS != "none"
    heads = ConditionalDETRHeads if offsets else DETRHeads
    model.roi_heads = heads(cfg, model.neck.output_shape())
    return model


def sizes_of_mask(padding: Tensor, dtype: torch.dtype) -> ImageSizes:
    """Returns the sizes of images whose padding mask (B, H, W) is True at the right and bottom.

    Raises:
        UnknownCase: the padding is not of that form.
    """
    valid = ~padding
    hw = [(int(x.any(1).sum()), int(x.any(0).sum())) for x in valid]
    if not torch.equal(cell_mask(hw, tuple(valid.shape[1:])), valid):
        raise UnknownCase("padding that is not at the right and bottom")
    return ImageSizes.from_hw(hw, tuple(valid.shape[1:]), dtype=dtype)


def targets_of(targets: list[dict[str, Tensor]], whwh: Tensor) -> Targets:
    """Converts normalized cxcywh boxes to padded pixel targets."""
    boxes = [
        cxcywh_to_xyxy(x["boxes"].to(whwh.dtype)) * size
        for x, size in zip(targets, whwh, strict=True)
    ]
    return Targets.from_lists(boxes, [x["labels"] for x in targets], whwh)


def assignment_of(indices: list[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Returns the assignment (B, N) for one pair (queries, objects) of each image."""
    expected = torch.full_like(like, -1)
    for b, (queries, objects) in enumerate(indices):
        expected[b, queries] = objects
    return expected


def matcher_and_criterion(
    weights: list[float], conditional: bool
) -> tuple[HungarianMatcher, SetCriterion]:
    """Builds matcher and criterion with the same weights of class, L1 and GIoU."""
    kind = "focal" if conditional else "softmax"
    cost = MatchingCost(*weights, class_cost=kind, box_format="cxcywh")
    class_weight, l1_weight, giou_weight = weights
    criterion = SetCriterion(
        class_loss=kind,
        class_weight=class_weight,
        l1_weight=l1_weight,
        giou_weight=giou_weight,
        l1_format="cxcywh",
    )
    return HungarianMatcher(cost=cost), criterion


def loss_checks(
    name: str,
    losses: dict[str, Tensor],
    train: dict[str, Any],
    weights: dict[str, float],
    rtol: float,
) -> Iterator[Check]:
    """Compares unweighted losses and their weighted sum; logged values have no weight."""
    for key, weight in weights.items():
        yield Check(f"{name}.{key}", losses[key] / weight, train["losses"][key], 1e-6, rtol)
    yield Check(f"{name}.total", sum(losses.values()), train["total_weighted"], 1e-6, rtol)


def component_checks(case: dict[str, Any]) -> Iterator[Check]:
    """Compares embeddings, mask resize, postprocessing, matching and losses separately."""
    for i, x in enumerate(case.get("position_embedding", [])):
        expected = x["embedding"]
        actual = embed_cells(~x["mask"], x["hidden"], expected.dtype)
        actual = actual.transpose(1, 2).reshape(expected.shape)
        yield Check(f"position_embedding.{i}", actual, expected, EXACT)
    for i, x in enumerate(case.get("mask_downsample", [])):
        size = tuple(int(n) for n in x["size"])
        sizes = sizes_of_mask(x["pixel_mask"], torch.float32)
        actual = ~cell_mask(valid_cells(sizes, size, None), size)
        yield Check(f"mask_downsample.{i}", actual, x["mask"], 0)
    if "reference_sine" in case:
        x = case["reference_sine"]
        for key, expected in x.items():
            if key.startswith("embedding_"):
                actual = sine_embedding(x["points_xy"], expected.shape[-1])
                yield Check(f"reference_sine.{key}", actual, expected, EXACT)
    if "inverse_sigmoid" in case:
        x = case["inverse_sigmoid"]
        yield Check("inverse_sigmoid", inverse_sigmoid(x["x"]), x["y"], EXACT)
    # Softmax heads have a background column, focal loss has none.
    if "postprocess" in case:
        yield from postprocess_checks(case["postprocess"], is_focal(case))
    for i, x in enumerate(case.get("matching", [])):
        yield from matching_checks(f"matching.{i}", x)


def is_focal(case: dict[str, Any]) -> bool:
    """Returns True if a component file belongs to Conditional DETR.

    Its postprocessing may return a query several times; that of DETR returns each one once.
    """
    x = case["postprocess"]
    queries, columns = x["pred_logits"].shape[1:]
    kept = len(x["results"][0]["scores"])
    if kept != queries:
        return True
    top = x["pred_logits"][0].softmax(-1)[:, : columns - 1].max(-1).values
    return not torch.allclose(top, x["results"][0]["scores"], atol=1e-5)


def postprocess_checks(x: dict[str, Any], focal: bool) -> Iterator[Check]:
    """Compares the detections of each image in descending order of score."""
    hw = [tuple(size) for size in x["target_sizes_hw"].tolist()]
    sizes = ImageSizes.from_hw(hw, dtype=x["pred_boxes"].dtype)
    predictions = Predictions(
        x["pred_logits"][None],
        cxcywh_to_xyxy(x["pred_boxes"])[None] * sizes.whwh[:, None],
        torch.ones(x["pred_logits"].shape[:2], dtype=torch.bool),
    )
    kept = len(x["results"][0]["scores"])
    found = select_detections(predictions, hw, top_k=kept, softmax=not focal)
    for b, (ours, expected) in enumerate(zip(found, x["results"], strict=True)):
        order = expected["scores"].argsort(descending=True, stable=True)
        name = f"postprocess.{b}"
        yield Check(f"{name}.scores", ours.scores, expected["scores"][order], EXACT)
        yield Check(f"{name}.labels", ours.pred_classes, expected["labels"][order], 0)
        boxes = expected["boxes"][order]
        yield Check(f"{name}.boxes", ours.pred_boxes.tensor, boxes, 1e-4, EXACT)


def matching_checks(name: str, x: dict[str, Any]) -> Iterator[Check]:
    """Compares pairs, losses, and gradients with respect to logits and boxes."""
    focal = x["pred_logits"].shape[-1] == x["num_classes"]
    weights = [float(x["loss_weights"][f"loss_{k}"]) for k in ("ce", "bbox", "giou")]
    matcher, criterion = matcher_and_criterion(weights, focal)
    logits = x["pred_logits"].clone().requires_grad_()
    boxes = x["pred_boxes"].clone().requires_grad_()
    batch, queries = logits.shape[:2]
    # Any size is valid, because losses are normalized by it.
    whwh = torch.tensor([[640.0, 480.0, 640.0, 480.0]], dtype=boxes.dtype).expand(batch, 4)
    predictions = Predictions(
        logits[None],
        cxcywh_to_xyxy(boxes)[None] * whwh[:, None],
        torch.ones(batch, queries, dtype=torch.bool),
    )
    targets = targets_of(x["targets"], whwh)
    assignment = matcher(predictions, targets)
    yield Check(f"{name}.match", assignment[0], assignment_of(x["indices"], assignment[0]), 0)
    losses = criterion(predictions, targets, assignment)
    yield from loss_checks(name, losses, x, x["loss_weights"], LOSS)
    sum(losses.values()).backward()
    for key, leaf in (("grad_logits", logits), ("grad_boxes", boxes)):
        atol = GRAD * float(x[key].abs().max()) + 1e-6
        yield Check(f"{name}.{key}", leaf.grad, x[key], atol, GRAD)
