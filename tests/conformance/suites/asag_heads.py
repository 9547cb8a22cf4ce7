"""Reference cases of ASAG's proposal block, its decoders, and the whole detector.

B images, N queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone
from torch import Tensor

from asag.modeling.layers.attention import SelfAttention
from asag.modeling.layers.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from asag.modeling.layers.deformable_attention import MultiScaleMemory
from asag.modeling.layers.roi_align import PyramidRoIAlign
from asag.modeling.layers.xyzr import boxes_to_xyzr, xyzr_to_boxes
from asag.modeling.postprocess import select_detections
from asag.modeling.proposal_generator.asag.anchors import (
    AdaptiveAnchorGenerator,
)
from asag.modeling.proposal_generator.asag.block import ProposalBlock
from asag.modeling.roi_heads import AdaMixerStage, DynamicConvStage, ParallelHeads, RoIReader
from asag.modeling.roi_heads.asag.deformable import DeformableStage
from asag.modeling.roi_heads.asag.heads import read_maps
from asag.modeling.roi_heads.sparse_rcnn.dynamic_conv import DynamicInteraction
from asag.structures import ImageSizes, Predictions, Queries

from .asag_generator import aligned, anchor_rows, load, make_network, make_rules
from .asag_training import to_whwh
from .common import Check

BOXES_PX, LOGITS, BOXES = 5e-4, 1e-4, 1e-5  # absolute tolerances; BOXES of normalized boxes
STRIDES = (4, 8, 16, 32)


def make_pooler(strides: Sequence[int] = STRIDES) -> PyramidRoIAlign:
    """Builds a pooler with the legacy alignment that the authors use."""
    return PyramidRoIAlign(strides=strides, aligned=False, level_eps=1e-6)


def make_block(config: dict[str, Any], num_classes: int) -> ProposalBlock:
    """Builds the proposal block of a case."""
    return ProposalBlock(
        pooler=make_pooler(),
        dim=config["d_model"],
        num_logits=num_classes,
        num_heads=config["num_heads"],
        ffn_dim=config["ffn_dim"],
        activation=config["activation"],
    )


def make_heads(config: dict[str, Any], kind: str) -> ParallelHeads:
    """Builds all parallel copies of the decoder stage of a case."""
    common = {"dim": config["d_model"], "num_logits": config["num_classes"]}

    def adamixer() -> AdaMixerStage:
        return AdaMixerStage(
            **common,
            strides=STRIDES,
            num_heads=config["num_heads"],
            ffn_dim=config["ffn_dim"],
            groups=config["n_groups"],
            in_points=config["in_points"],
            out_points=config["out_points"],
            activation=config["activation"],
        )

    def dynamic() -> DynamicConvStage:
        return DynamicConvStage(
            **common,
            attention=SelfAttention(dim=config["d_model"], num_heads=config["num_heads"]),
            interaction=DynamicInteraction(
                dim=config["d_model"],
                dynamic_dim=config["dim_dynamic"],
                ffn_dim=config["ffn_dim"],
                num_positions=49,
                activation=config["activation"],
            ),
            activation=config["activation"],
        )

    return ParallelHeads(
        make_stage=adamixer if kind == "A" else dynamic,
        reader=read_maps if kind == "A" else RoIReader(make_pooler()),
        dim=config["d_model"],
        in_features=("p2", "p3", "p4", "p5"),
        num_auxiliary=config["num_heads_parallel"] - 1,
    )


def visible_pairs(case: dict[str, Any], num_heads: int) -> Tensor:
    """Returns (B, N, N) bool from the stored mask, which repeats for every head."""
    blocked = case["attn_mask"]
    return ~blocked.view(-1, num_heads, *blocked.shape[1:])[:, 0]


def to_boxes(boxes: Tensor, kind: str, whwh: Tensor) -> Tensor:
    """Converts the input boxes of a decoder kind to xyxy in pixels."""
    return xyzr_to_boxes(boxes) if kind == "A" else cxcywh_to_xyxy(boxes) * whwh[:, None]


def verify_block(case: dict[str, Any]) -> Iterator[Check]:
    """Compares the step from anchors to proposals."""
    config, inputs = case["config"], case["inputs"]
    block = make_block(config, config["num_classes"])
    load(block, case["state_dict"], "rpn.", "proposal_generator.block.")
    whwh = to_whwh(inputs["image_hw"])
    for name, c in case["cases"].items():
        anchors = cxcywh_to_xyxy(c["anchors_cxcywh_px"])
        valid, expected = c["valid_mask"], c["expected"]
        for title, mask in (("", valid), (".pairs", visible_pairs(c, config["num_heads"]))):
            with torch.no_grad():
                content, logits, boxes = block(
                    [inputs[f"p{i}"] for i in (2, 3, 4, 5)], anchors, mask
                )
            normalized = xyxy_to_cxcywh(boxes) / whwh[:, None]
            kind = c["decoder_type"]
            handed = boxes_to_xyzr(boxes) if kind == "A" else normalized
            for key, actual, atol in (
                ("query_content", content, LOGITS),
                ("cls_logits", logits, LOGITS),
                ("proposals_cxcywh_norm", normalized, BOXES),
                ("query_boxes", handed, LOGITS if kind == "A" else BOXES),
            ):
                yield Check(
                    f"{name}{title}.{key}", actual[valid], expected[key][valid], atol, BOXES
                )


def verify_decoder(case: dict[str, Any]) -> Iterator[Check]:
    """Compares the copies of an A or S stage, in parallel and each as the main copy."""
    config, inputs, kind = case["config"], case["inputs"], case["decoder_type"]
    heads = make_heads(config, kind)
    load(heads, case["state_dict"], "decoder.", "roi_heads.")
    features = {name: x for name, x in inputs.items() if name.startswith("p")}
    whwh = to_whwh(inputs["image_hw"])
    sizes = ImageSizes.from_hw([tuple(x) for x in inputs["image_hw"].tolist()])
    for name, c in case["cases"].items():
        valid = c["valid_mask"]
        queries = Queries(
            content=c["query_content"],
            valid=valid,
            boxes_xyxy=to_boxes(c["query_boxes"], kind, whwh),
        )
        expected = c["expected_per_parallel_head"]
        with torch.no_grad():
            everything = heads.train()(features, queries, sizes)
            heads.eval()
            for k in range(len(expected)):
                heads.main = k
                alone = heads(features, queries, sizes)
                for title, logits, boxes in (
                    ("together", everything.logits[k], everything.boxes_xyxy[k]),
                    ("alone", alone.logits[-1], alone.boxes_xyxy[-1]),
                ):
                    normalized = xyxy_to_cxcywh(boxes) / whwh[:, None]
                    for key, actual, atol in (
                        ("cls_logits", logits, LOGITS),
                        ("boxes_cxcywh_norm", normalized, BOXES),
                    ):
                        yield Check(
                            f"{name}.{k}.{title}.{key}",
                            actual[valid],
                            expected[k][key][valid],
                            atol,
                            BOXES,
                        )
            heads.main = len(expected) - 1


DEFORMABLE_NAMES = (
    ("layer.cross_attn.sampling_offsets.", "layer.cross_attention.offsets."),
    ("layer.cross_attn.attention_weights.", "layer.cross_attention.weights."),
    ("layer.cross_attn.value_proj.", "layer.cross_attention.value_proj."),
    ("layer.cross_attn.output_proj.", "layer.cross_attention.out_proj."),
    ("layer.self_attn.in_proj_", "layer.self_attention.in_proj."),
    ("layer.self_attn.out_proj.", "layer.self_attention.out_proj."),
    ("layer.norm1.", "layer.cross_residual.norm."),
    ("layer.norm2.", "layer.self_residual.norm."),
    ("layer.norm3.", "layer.ffn.norm."),
    ("layer.linear", "layer.ffn.linear"),
    ("bbox_embed.layers.0.", "box_deltas.0."),
    ("bbox_embed.layers.1.", "box_deltas.2."),
    ("bbox_embed.layers.2.", "box_deltas.4."),
    ("class_embed.", "class_logits."),
)


def verify_deformable(case: dict[str, Any]) -> Iterator[Check]:
    """Compares a decoder layer of Deformable DETR and its predictors."""
    config = case["config"]
    stage = DeformableStage(
        dim=config["d_model"],
        num_logits=config["num_classes"],
        num_heads=config["num_heads"],
        num_levels=config["num_levels"],
        num_points=config["num_points"],
        ffn_dim=config["ffn_dim"],
        activation=config["activation"],
    )
    state = {}
    for name, value in case["state_dict"].items():
        theirs, ours = next(x for x in DEFORMABLE_NAMES if name.startswith(x[0]))
        state[ours + name.removeprefix(theirs)] = value
    # The cases contain the query position, not the layer that computes it.
    missing = stage.load_state_dict(state, strict=False).missing_keys
    yield Check("parameters without weights", sum("position" not in x for x in missing), 0, 0)
    stage.eval()
    shapes = tuple((int(h), int(w)) for h, w in case["spatial_shapes_hw"])
    for name, c in case["cases"].items():
        boxes, expected = c["reference_boxes_cxcywh_norm"], c["expected"]
        memory = MultiScaleMemory(
            values=c.get("memory", case["memory"]),
            shapes_hw=shapes,
            valid=~c["padding_mask"],
            valid_ratios=c["valid_ratios_wh"],
            whwh=torch.ones(len(boxes), 4),
        )
        reference = boxes[:, :, None] * memory.valid_ratios.repeat(1, 1, 2)[:, None]
        with torch.no_grad():
            attended = stage.layer.cross_attention(c["query"] + c["query_pos"], reference, memory)
            query = stage.layer(c["query"], c["query_pos"], boxes, memory, None)
            logits, refined = stage.refine_boxes(query, boxes)
        for key, actual, atol in (
            ("cross_attention_of_query_plus_pos", attended, LOGITS),
            ("layer_output", query, LOGITS),
            ("cls_logits", logits, LOGITS),
            ("boxes_cxcywh_norm", refined, BOXES),
        ):
            yield Check(f"{name}.{key}", actual, expected[key], atol)


class _Maps(Backbone):
    """Replaces the residual network: its input is returned as the feature maps."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.shapes = {
            f"res{i + 2}": ShapeSpec(channels=c, stride=s)
            for i, (c, s) in enumerate(zip(channels, STRIDES, strict=True))
        }

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self.shapes


def verify_end_to_end(case: dict[str, Any]) -> Iterator[Check]:
    """Compares pyramid, generator, proposal block, every copy of the decoder, and detections."""
    config, kind = case["config"], case["config"]["decoder_type"]
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in case["state_dict"].items():
        part, rest = name.split(".", 1)
        parts.setdefault(part, {})[rest] = value
    bottom_up = _Maps(config["in_channels"])
    pyramid = FPN(bottom_up, list(bottom_up.shapes), config["d_model"])
    load(pyramid, parts["neck"], "neck.", "backbone.")
    generator = AdaptiveAnchorGenerator(
        network=make_network(config, parts["anchor_generator"]),
        rules=make_rules(case["thresholds"]),
    )
    block = make_block(config, config["num_classes"])
    load(block, parts["rpn"], "rpn.", "proposal_generator.block.")
    heads = make_heads(config, kind)
    load(heads, parts["decoder"], "decoder.", "roi_heads.")
    for name, c in case["cases"].items():
        with torch.no_grad():
            yield from _end_to_end(name, c, pyramid, generator, block, heads)


def _end_to_end(
    name: str,
    case: dict[str, Any],
    pyramid: FPN,
    generator: AdaptiveAnchorGenerator,
    block: ProposalBlock,
    heads: ParallelHeads,
) -> Iterator[Check]:
    inputs, expected = case["inputs"], case["expected"]
    sizes = ImageSizes.from_hw([tuple(x) for x in inputs["image_hw"].tolist()])
    features = pyramid({f"res{i}": inputs[f"c{i}"] for i in (2, 3, 4, 5)})
    for key, mean in expected["pyramid"].items():
        level = key.split("_")[0]
        yield Check(f"{name}.{key}", features[level].abs().mean(), mean, LOGITS)
    found = generator([features[x] for x in ("p3", "p4", "p5")], sizes.whwh)
    counts = torch.tensor([int(x.valid.sum()) for x in found.probed])
    yield Check(f"{name}.patches", counts, torch.as_tensor(expected["patch_counts"]), 0)
    valid = expected["valid_mask"]
    yield Check(f"{name}.counts", found.anchors.valid.sum(dim=1), valid.sum(dim=1), 0)
    # Anchors in the stored order, so that all later tensors can be compared row by row.
    anchors = expected["anchors_cxcywh_px"].clone()
    for b, own in enumerate(valid):
        rows = aligned(anchor_rows(found, b)[:, :4], anchors[b][own])
        yield Check(f"{name}.{b}.anchors", rows, anchors[b][own], BOXES_PX)
        anchors[b][own] = rows
    maps = [features[x] for x in heads.in_features]
    content, logits, boxes = block(maps, cxcywh_to_xyxy(anchors), valid)
    scale = sizes.whwh[:, None]
    queries = Queries(content=content, valid=valid, boxes_xyxy=boxes)
    outputs = [
        ("proposals", logits, boxes, expected["proposal_logits"], expected["proposal_boxes"])
    ]
    for k, gt in enumerate(expected["heads"]):
        heads.main = k
        answer = heads(features, queries, sizes)
        outputs.append((f"head{k}", *_last(answer), gt["cls_logits"], gt["boxes_cxcywh_norm"]))
        if expected.get("detections_per_head"):
            yield from _detections(f"{name}.head{k}", answer, sizes, case, k)
    for title, logits, boxes, true_logits, true_boxes in outputs:
        normalized = xyxy_to_cxcywh(boxes) / scale
        yield Check(f"{name}.{title}.logits", logits[valid], true_logits[valid], LOGITS, BOXES)
        yield Check(f"{name}.{title}.boxes", normalized[valid], true_boxes[valid], BOXES, BOXES)


def _last(predictions: Predictions) -> tuple[Tensor, Tensor]:
    return predictions.logits[-1], predictions.boxes_xyxy[-1]


def _detections(
    name: str, predictions: Predictions, sizes: ImageSizes, case: dict[str, Any], head: int
) -> Iterator[Check]:
    gt = case["expected"]["detections_per_head"][head]
    found = select_detections(predictions, sizes.hw, top_k=len(gt["scores"]))[0]
    scale = case["original_hw"][0] / torch.tensor(sizes.hw[0])
    boxes = found.pred_boxes.tensor * scale.flip(0).repeat(2)
    yield Check(f"{name}.scores", found.scores, gt["scores"], LOGITS)
    # Scores that are equal up to rounding may come in either order.
    rows = torch.cat((boxes, found.pred_classes[:, None].float()), dim=1)
    stored = torch.cat((gt["boxes"], gt["labels"][:, None].float()), dim=1)
    yield Check(f"{name}.boxes_and_labels", aligned(rows, stored), stored, 10 * BOXES_PX)
