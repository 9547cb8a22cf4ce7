"""Reference cases of MMDetection: a published checkpoint, and the output of the whole detector.

A case is a file `<case>_ref.pt` with images and expected outputs and, beside it, `<case>.pth`, the
checkpoint; further files `<case>_*.pth` hold the same weights under other names. Sizes are read
from the weights, what cannot be seen there from the case. The checkpoint is loaded as a user would
load it, so that recognition, names and settings are part of what is compared.

B images, N queries, S stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from asag import get_asag_cfg
from asag.checkpoint.loading import load_weights
from asag.checkpoint.reading import read_checkpoint
from asag.modeling.layers.boxes import xyxy_to_cxcywh
from asag.structures import ImageSizes, Predictions

from .common import Check, MissingCheckpoint, UnknownCase

SUITE = "mmdet"
REFERENCE = "_ref.pt"
LOGITS, SHARES, PIXELS, BOX_SIZE = 1e-4, 1e-5, 0.02, 1e-5
# Float32 noise of the reference itself, times this, is allowed as well.
NOISE = 5
DEPTHS = {2: 18, 6: 50, 23: 101, 36: 152}
DEFAULT_HEADS = 8


def claims(path: Path) -> bool:
    """Returns True for a case of this suite in a folder that names no suite."""
    return any(path.parent.glob(f"*{REFERENCE}"))


def verify(path: Path) -> Iterator[Check]:
    """Yields the comparisons of a case with each of its checkpoints; ignores other files.

    Raises:
        MissingCheckpoint: there is none beside it.
        UnknownCase: the file is no reference of this suite.
    """
    if not path.name.endswith(REFERENCE):
        return
    case = torch.load(path, weights_only=True)
    if not isinstance(case, dict) or not {"family", "config", "images", "runs"} <= case.keys():
        raise UnknownCase("is not a dict with family, config, images and runs")
    if case["family"] not in CONFIGURE:
        raise UnknownCase(f"no model of the family {case['family']!r}")
    files = checkpoints(path)
    if not files:
        name = path.name.removesuffix(REFERENCE)
        raise MissingCheckpoint(f"there is no {name}.pth beside it")
    for file in files:
        yield from verify_checkpoint(case, file)


def checkpoints(path: Path) -> list[Path]:
    """Finds the checkpoints of a case: files whose names start with its name."""
    name = path.name.removesuffix(REFERENCE)
    longer = sorted(path.parent.glob(f"{name}_*.pth"))
    return [
        x
        for x in (path.with_name(f"{name}.pth"), *longer)
        if x.is_file() and (x.stem == name or not x.with_name(x.stem + REFERENCE).exists())
    ]


def verify_checkpoint(case: Mapping[str, Any], file: Path) -> Iterator[Check]:
    """Compares logits and boxes of the stages, and detections, for every run of a case."""
    model = build(case, file)
    images = [x.permute(2, 0, 1) for x in case["images"]]
    for run, expected in case["runs"].items():
        chosen = images if run == "batch" else [images[int(run.removeprefix("image"))]]
        noise = {key: NOISE * x for key, x in case["tolerance"][run].items()}
        prefix = f"{file.stem}.{run}"
        yield from verify_run(prefix, model, chosen, expected, noise)


@torch.no_grad()
def verify_run(
    prefix: str,
    model: nn.Module,
    images: list[Tensor],
    expected: Mapping[str, Any],
    noise: Mapping[str, float],
) -> Iterator[Check]:
    """One batch of images.

    Args:
        prefix: of the names of the comparisons.
        model: with the weights of the case.
        images: (3, H, W) uint8 RGB at network size.
        expected: of the case.
        noise: allowed errors of "logits" and "boxes", if they exceed the fixed ones.
    """
    inputs = [{"image": x} for x in images]
    batch = model.preprocess_images(inputs)
    sizes = ImageSizes.from_images(batch)
    predictions, _ = model.forward_stages(batch.tensor, sizes)
    logits = max(LOGITS, noise["logits"])
    pixels = "stage_deltas" in expected
    boxes = max(PIXELS if pixels else SHARES, noise["boxes"])
    yield Check(f"{prefix}.stage_logits", predictions.logits, expected["stage_logits"], logits)
    yield Check(
        f"{prefix}.stage_boxes",
        stage_boxes(predictions, sizes, pixels),
        expected["stage_boxes"],
        boxes,
        BOX_SIZE * pixels,
    )
    for b, (output, wanted) in enumerate(zip(model(inputs), expected["detections"], strict=True)):
        # Boxes of detections are in pixels everywhere.
        scale = 1.0 if pixels else float(sizes.whwh.max())
        yield from detection_checks(
            f"{prefix}.detections{b}", output["instances"], wanted, logits, boxes * scale
        )


def stage_boxes(predictions: Predictions, sizes: ImageSizes, pixels: bool) -> Tensor:
    """Returns (S, B, N, 4) in the form of the case: xyxy in pixels, or normalized cxcywh."""
    if pixels:
        return predictions.boxes_xyxy
    return xyxy_to_cxcywh(predictions.boxes_xyxy / sizes.whwh[:, None])


def detection_checks(
    name: str, found: Instances, wanted: Mapping[str, Tensor], scores: float, boxes: float
) -> Iterator[Check]:
    """Compares detections as sets, since those of similar scores may be swapped."""
    number = len(wanted["scores"])
    yield Check(f"{name}.number", float(len(found)), float(number), 0)
    if len(found) != number:
        return
    ours = torch.cat((found.pred_boxes.tensor, found.scores[:, None]), dim=1)
    theirs = torch.cat((wanted["boxes"], wanted["scores"][:, None]), dim=1)
    differs = found.pred_classes[:, None] != wanted["labels"]
    distance = torch.cdist(ours.double(), theirs.double()) + 1e6 * differs
    rows, columns = linear_sum_assignment(distance.numpy())
    found = found[torch.as_tensor(rows)]
    wanted = {key: value[torch.as_tensor(columns)] for key, value in wanted.items()}
    yield Check(f"{name}.labels", found.pred_classes, wanted["labels"], 0)
    yield Check(f"{name}.scores", found.scores, wanted["scores"], scores)
    yield Check(f"{name}.boxes", found.pred_boxes.tensor, wanted["boxes"], boxes, BOX_SIZE)


# Models of a case.


def build(case: Mapping[str, Any], file: Path) -> nn.Module:
    """Builds a model with the sizes and weights of a checkpoint."""
    shapes = {name: tuple(x.shape) for name, x in read_checkpoint(file)["model"].items()}
    cfg = get_asag_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.DECODER.NUM_HEADS = case["config"].get("num_heads", DEFAULT_HEADS)
    cfg.TEST.DETECTIONS_PER_IMAGE = case["config"]["max_per_img"]
    resnet = cfg.MODEL.RESNETS
    width = shapes["backbone.conv1.weight"][0]
    resnet.DEPTH = DEPTHS[count(shapes, "backbone.layer3.{}.conv1.weight")]
    resnet.STEM_OUT_CHANNELS, resnet.WIDTH_PER_GROUP = width, width
    resnet.RES2_OUT_CHANNELS = 4 * width
    CONFIGURE[case["family"]](cfg, shapes)
    model = build_model(cfg).eval()
    load_weights(model, str(file))
    return model


def count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """Counts the names of a pattern with a running number."""
    number = 0
    while pattern.format(number) in shapes:
        number += 1
    return number


def configure_sparse_rcnn(cfg: CfgNode, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Sets the sizes of Sparse R-CNN."""
    head = "roi_head.bbox_head.0."
    queries, dim = shapes["rpn_head.init_proposal_features.weight"]
    model, decoder = cfg.MODEL, cfg.MODEL.DECODER
    model.META_ARCHITECTURE = "SparseRCNN"
    model.BACKBONE.NAME = "build_resnet_fpn_backbone"
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.OUT_CHANNELS = decoder.HIDDEN_DIM = dim
    model.PROPOSAL_GENERATOR.NAME = "LearnedProposals"
    model.PROPOSAL_GENERATOR.NUM_QUERIES = queries
    model.ROI_HEADS.NAME = "DynamicConvHeads"
    model.ROI_HEADS.NUM_CLASSES = shapes[f"{head}fc_cls.weight"][0]
    decoder.NUM_STAGES = count(shapes, "roi_head.bbox_head.{}.fc_cls.weight")
    decoder.FFN_DIM = shapes[f"{head}ffn.layers.0.0.weight"][0]
    interaction = f"{head}instance_interactive_conv."
    decoder.DYNAMIC_DIM = shapes[f"{interaction}dynamic_layer.weight"][0] // (2 * dim)
    cells = shapes[f"{interaction}fc_layer.weight"][1] // dim
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = round(cells**0.5)
    for key, tower in (("NUM_CLS_LAYERS", "cls_fcs"), ("NUM_REG_LAYERS", "reg_fcs")):
        parts = [x for x, s in shapes.items() if x.startswith(f"{head}{tower}.") and len(s) == 2]
        decoder[key] = len(parts)


def configure_detr(cfg: CfgNode, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Sets the sizes of DETR from the names of any version."""
    _configure_transformer(cfg, shapes)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME = "DETR", "DETRHeads"
    cfg.MODEL.CRITERION.CLASS_LOSS = "softmax"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES -= 1  # the background column


def configure_conditional_detr(cfg: CfgNode, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Sets the sizes of Conditional DETR."""
    _configure_transformer(cfg, shapes)
    cfg.MODEL.META_ARCHITECTURE = "ConditionalDETR"
    cfg.MODEL.ROI_HEADS.NAME = "ConditionalDETRHeads"
    cfg.MODEL.PROPOSAL_GENERATOR.REFERENCE_POINTS = "predicted"


def _configure_transformer(cfg: CfgNode, shapes: Mapping[str, tuple[int, ...]]) -> None:
    prefix = "" if "query_embedding.weight" in shapes else "bbox_head."
    layers = f"{prefix}transformer." if prefix else ""
    queries, dim = shapes[f"{prefix}query_embedding.weight"]
    model, decoder = cfg.MODEL, cfg.MODEL.DECODER
    model.BACKBONE.NAME, model.NECK.NAME = "build_dc5_resnet_backbone", "TransformerEncoder"
    model.RESNETS.OUT_FEATURES = ["res5"]
    model.PROPOSAL_GENERATOR.NAME = "ObjectQueries"
    model.PROPOSAL_GENERATOR.NUM_QUERIES = queries
    model.ROI_HEADS.IN_FEATURES = ["memory"]
    model.ROI_HEADS.NUM_CLASSES = shapes["bbox_head.fc_cls.weight"][0]
    decoder.HIDDEN_DIM = dim
    model.ENCODER.NUM_LAYERS = count(shapes, layers + "encoder.layers.{}.norms.0.weight")
    decoder.NUM_STAGES = count(shapes, layers + "decoder.layers.{}.norms.0.weight")
    decoder.FFN_DIM = next(
        shape[0]
        for name, shape in shapes.items()
        if name.endswith("layers.0.ffn.layers.0.0.weight")
        or name.endswith("layers.0.ffns.0.layers.0.0.weight")
    )


CONFIGURE = {
    "sparse_rcnn": configure_sparse_rcnn,
    "detr": configure_detr,
    "conditional_detr": configure_conditional_detr,
}
