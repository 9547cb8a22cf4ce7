"""Reference cases of the training of ASAG: patches, targets, weights, losses, denoising.

B images, N queries, D denoising queries, P patches, M padded ground truths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from asag.modeling.criterion import QueryWeightingCriterion
from asag.modeling.layers.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from asag.modeling.layers.loss_weights import QueryWeights, negative_probability
from asag.modeling.matching import HungarianMatcher, MatchingCost
from asag.modeling.proposal_generator.asag.anchor_loss import AnchorCriterion
from asag.modeling.proposal_generator.asag.anchors import Anchors, GeneratedAnchors, ProbedPatches
from asag.modeling.proposal_generator.asag.denoising import (
    attendable_pairs,
    noised_boxes,
    noised_gt,
)
from asag.modeling.proposal_generator.asag.patch_targets import (
    PatchTargets,
    probed_targets,
    quadrant_targets,
    whole_image_targets,
)
from asag.modeling.proposal_generator.asag.patches import centered_corners
from asag.modeling.proposal_generator.asag.training_patches import (
    PatchCompletion,
    PatchKind,
    Uniform,
)
from asag.structures import Predictions, Queries, Targets

from .common import Check

LOSS = 1e-5  # relative tolerance of losses and gradients
BOXES, BOXES_PX = 1e-5, 5e-4
SIDE = 15  # cells of a patch's side unless a case states it
CLASS, L1, GIOU = 2.0, 5.0, 2.0
ANCHOR_SHARES = (2.0, 1.0, 0.5)  # of class, L1 and GIoU in lambda_an
STAGES = ("proposal", "aux0", "aux1", "aux2", "final")


def constant(u: float) -> Uniform:
    """Returns a random source that always draws `u`."""
    return lambda shape, device: torch.full(shape, u, device=device)


def to_whwh(image_hw: Tensor) -> Tensor:
    """Converts (B, 2) height and width to (B, 4) float32."""
    return torch.as_tensor(image_hw).float().flip(1).repeat(1, 2)


def read_targets(targets: Sequence[dict[str, Tensor]], whwh: Tensor) -> Targets:
    """Converts normalized cxcywh boxes and labels to padded ground truth."""
    boxes = [cxcywh_to_xyxy(x["boxes"]) * size for x, size in zip(targets, whwh, strict=True)]
    return Targets.from_lists(boxes, [x["labels"] for x in targets], whwh)


def per_image(index: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Groups a flat list by image: (B, P) int64 positions, and bool of the valid ones."""
    rows = [(index == b).nonzero()[:, 0] for b in range(batch)]
    width = max(1, *(len(x) for x in rows))
    position, valid = torch.zeros(batch, width, dtype=torch.long), torch.zeros(batch, width)
    for b, own in enumerate(rows):
        position[b, : len(own)] = own
        valid[b, : len(own)] = 1
    return position, valid.bool()


def verify_training_patches(case: dict[str, Any]) -> Iterator[Check]:
    """Compares the completion of generated patches and their positions."""
    cases = case["cases"]
    for name, c in cases.items() if isinstance(cases, dict) else enumerate(cases):
        whwh = to_whwh(c["image_hw"])
        index = torch.as_tensor(c["generated_image_index"]).long()
        position, valid = per_image(index, len(whwh))
        generated = torch.as_tensor(c["generated_crop_pos_xy"]).long().view(-1, 2)
        generated = torch.cat((generated, generated.new_zeros(1, 2)))[position]
        for capacity in (0, 30):
            complete = PatchCompletion(
                read_targets(c["targets"], whwh),
                warmup=torch.tensor(c["epoch"] == 0),
                capacity=capacity,
                uniform=constant(c["u"]),
            )
            corner, exists, forward, kind = complete(c["stride"], generated, valid)
            title, expected = f"{name}.capacity{capacity}", c["expected"]
            image = torch.arange(len(whwh))[:, None].expand_as(exists)
            yield Check(f"{title}.corners", corner[exists], expected["crop_pos_xy"], 0)
            yield Check(f"{title}.images", image[exists], expected["image_index"], 0)
            yield Check(f"{title}.forward", forward[exists], expected["forward_anchors"], 0)
            made = (kind[exists] == PatchKind.GENERATED).sum()
            yield Check(f"{title}.generated", made, len(index), 0)
    position = case["crop_position"]
    whwh = to_whwh(position["image_hw"])
    for level in position["levels"]:
        corner = centered_corners(
            level["centers_xy_px"][:, None], whwh[level["image_index"]], level["stride"], SIDE
        )
        title = f"crop_position.stride{level['stride']}"
        yield Check(title, corner[:, 0], level["expected_crop_pos_xy"], 0)


def verify_patch_targets(case: dict[str, Any]) -> Iterator[Check]:
    """Compares the objects of every patch in its coordinates."""
    targets = read_targets(case["targets"], to_whwh(case["image_hw"]))
    side, expected = case["patch_size"], case["expected"]
    yield from _compare(
        "p6_true", whole_image_targets(targets, True), expected["p6_train_true_flip"], targets
    )
    released = whole_image_targets(targets, True, released_flip=True)
    yield from _compare("p6_released", released, expected["p6_train_released_flip"], targets)
    yield from _compare(
        "p6_eval", whole_image_targets(targets, False), expected["p6_eval"], targets
    )
    yield from _compare("p5", quadrant_targets(targets), expected["p5"], targets)
    start = 0
    for level in case["patch_levels"]:
        index = level["image_index"]
        position, valid = per_image(index, len(targets.counts))
        found = probed_targets(targets, level["crop_pos_xy"][position], level["stride"], side)
        boxes = torch.empty(len(index), 1, *found.boxes_cxcywh.shape[2:])
        mask = torch.empty(len(index), 1, found.valid.shape[2], dtype=torch.bool)
        boxes[position[valid], 0] = found.boxes_cxcywh[valid]
        mask[position[valid], 0] = found.valid[valid]
        gt = expected["patches"][start : start + len(index)]
        start += len(index)
        title = f"stride{level['stride']}"
        yield from _compare(title, PatchTargets(boxes, mask), gt, targets, index.tolist())


def _compare(
    name: str,
    found: PatchTargets,
    expected: Sequence[dict[str, Tensor]],
    targets: Targets,
    images: Sequence[int] | None = None,
) -> Iterator[Check]:
    boxes, valid = found.boxes_cxcywh.flatten(0, 1), found.valid.flatten(0, 1)
    patches = found.valid.shape[1]
    for i, gt in enumerate(expected):
        image = images[i] if images is not None else i // patches
        yield Check(f"{name}.{i}.boxes", boxes[i][valid[i]], gt["boxes"].view(-1, 4), BOXES)
        labels = targets.labels[image][valid[i]]
        yield Check(f"{name}.{i}.labels", labels, gt["labels"], 0)


def verify_query_weights(case: dict[str, Any]) -> Iterator[Check]:
    """Compares the weights by score and IoU."""
    config = case["config"]
    weights = QueryWeights(config["gamma1"], config["gamma2"])
    score, iou = case["score"][:, None], case["iou"][None]
    yield Check("w_pos", weights.positive(score, iou), case["w_pos"], BOXES)
    yield Check("w_neg", weights.negative(score, iou), case["w_neg"], BOXES)
    yield Check("anchor_box_weight", weights.positive(score, iou), case["anchor_box_weight"], BOXES)
    yield Check("p_neg", negative_probability(case["p_neg_x"]), case["p_neg"], BOXES)


def verify_denoising(cases: dict[str, Any]) -> Iterator[Check]:
    """Compares the noised boxes, their targets and the attention mask."""
    for name, c in cases.items() if isinstance(cases, dict) else enumerate(cases):
        whwh = to_whwh(c["image_hw"])
        targets, slots, expected = read_targets(c["targets"], whwh), c["num_dn"], c["expected"]
        gt, group = noised_gt(targets, slots)
        boxes = noised_boxes(targets, gt, c["box_noise_scale"], constant(c["u"]))
        stored = expected["all_boxes_cxcywh_px"][:, :slots]
        yield Check(f"{name}.boxes", xyxy_to_cxcywh(boxes), stored, BOXES_PX)
        for b, labels in enumerate(expected["dn_target_labels"]):
            own = gt[b][gt[b] >= 0]
            yield Check(f"{name}.{b}.labels", targets.labels[b][own], labels, 0)
            clean = xyxy_to_cxcywh(targets.boxes_xyxy[b][own] / whwh[b])
            stored = expected["dn_target_boxes"][b].view(-1, 4)
            yield Check(f"{name}.{b}.target_boxes", clean, stored, BOXES)
        seen = attendable_pairs(group, c["valid_mask"], ~targets.valid.any(dim=1))
        yield Check(f"{name}.mask", ~seen, expected["attn_mask_per_image"], 0)


def verify_losses(cases: dict[str, Any]) -> Iterator[Check]:
    """Compares matches, losses and gradients of whole steps for both variants of flipping."""
    for name, c in cases.items():
        for flip in ("true", "released"):
            step = LossCase(c, released_flip=flip == "released")
            for check in step.checks(c[f"expected_{flip}_flip"]):
                yield check._replace(name=f"{name}.{flip}_flip.{check.name}")


class LossCase:
    """Stored predictions as leaf tensors, and our losses for them."""

    def __init__(self, case: dict[str, Any], released_flip: bool) -> None:
        config = case["config"]
        self.targets = read_targets(case["targets"], to_whwh(case["image_hw"]))
        self.leaves = {
            key: value.clone().requires_grad_()
            for key, value in case["predictions"].items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        for x in case["predictions"]["anchor_patches"]:
            self.leaves[f"anchor_{x['level']}"] = x["raw"].clone().requires_grad_()
        self.patches = case["predictions"]["anchor_patches"]
        weights = QueryWeights(config["gamma1"], config["gamma2"])
        cost = MatchingCost(CLASS, L1, GIOU, box_format="cxcywh", area_weight=config["area_weight"])
        self.matcher = HungarianMatcher(cost=cost)
        self.criterion = QueryWeightingCriterion(
            weights=weights, area_weight=config["area_weight"], l1_format="cxcywh"
        )
        coefficients = [x * config["lambda_an"] for x in ANCHOR_SHARES]
        self.anchor_criterion = AnchorCriterion(
            cost=cost,
            weights=weights,
            class_weight=coefficients[0],
            l1_weight=coefficients[1],
            giou_weight=coefficients[2],
            released_flip=released_flip,
        )
        self.stages = [s for s in STAGES if f"{s}_logits" in self.leaves]
        self.noised = self._noised(case) if "dn" in case else None
        self.valid = case["predictions"]["valid_mask"]

    def _noised(self, case: dict[str, Any]) -> Tensor:
        """Returns (B, D) int64: complete groups of all objects, then padding."""
        gt = torch.full((len(case["targets"]), case["dn"]["num_dn"]), -1)
        for b, copies in enumerate(case["dn"]["targets"]):
            count = len(copies["labels"])
            gt[b, :count] = torch.arange(count) % max(self.targets.counts[b], 1)
        return gt

    def generated(self) -> GeneratedAnchors:
        """Returns the stored anchors by image."""
        probed = []
        for x in self.patches:
            position, valid = per_image(x["image_index"], len(self.targets.counts))
            raw = self.leaves[f"anchor_{x['level']}"][position]
            probed.append(
                ProbedPatches(
                    level=int(x["level"].removeprefix("P")),
                    side=SIDE,
                    corner=x["crop_pos_xy"][position],
                    valid=valid,
                    forward=valid,
                    raw=raw,
                    num_selected=valid.sum(dim=1),
                    kind=position,
                )
            )
        nothing = torch.empty(len(self.targets.counts), 0)
        anchors = Anchors(nothing[..., None].expand(-1, -1, 4), nothing, nothing.bool())
        return GeneratedAnchors(anchors, self.leaves["anchor_p6"], self.leaves["anchor_p5"], probed)

    def predictions(self) -> Predictions:
        """Returns the stored predictions of all stages."""
        scale = self.targets.image_whwh[:, None]
        valid = self.valid
        if self.noised is not None:
            valid = torch.cat((self.noised >= 0, valid), dim=1)
        queries = Queries(content=valid, valid=valid, noised=self.noised)
        return Predictions.from_stages(
            queries,
            [self.leaves[f"{s}_logits"] for s in self.stages],
            [cxcywh_to_xyxy(self.leaves[f"{s}_boxes"]) * scale for s in self.stages],
        )

    def checks(self, expected: dict[str, Any]) -> Iterator[Check]:
        """Compares all tensors stored for one variant of flipping."""
        generated, predictions = self.generated(), self.predictions()
        assignment = self.matcher(predictions, self.targets)
        losses = self.anchor_criterion(generated, self.targets)
        losses |= self.criterion(predictions, self.targets, assignment)
        yield from self.matches(assignment, generated, expected["matching"])
        compared = set()
        for key, value in expected["losses_unweighted"].items():
            ours = self.translate(key)
            compared.add(ours)
            # Denoising terms have the weights of the corresponding terms of the detector.
            published = key.removeprefix("dn_")
            published = published if key == published else published.rsplit("_", 1)[0]
            weight = expected["weights"].get(key, expected["weights"].get(published))
            yield Check(key, losses[ours], value * weight, 1e-6, LOSS)
        yield Check("losses nobody compared", len(losses.keys() - compared), 0, 0)
        total = sum(losses.values())
        yield Check("total", total, expected["total"], 1e-6, LOSS)
        total.backward()
        for key, grad in expected["grads"].items():
            actual = self.leaves[key].grad
            atol = LOSS * max(float(grad.abs().max()), 1e-3)
            yield Check(f"grad.{key}", actual, grad, atol, LOSS)

    def translate(self, key: str) -> str:
        """Translates a published loss name; the authors number auxiliary heads, we all stages."""
        if key.endswith("_anchor"):
            return key
        last = len(self.stages) - 1
        if key.startswith("dn_"):
            _, _, term, stage = key.split("_")
            return f"loss_dn_{term}" + ("" if int(stage) == last else f"_{stage}")
        _, term, *stage = key.split("_")
        if not stage:
            return key
        return f"loss_{term}_{0 if stage[0] == 'rpn' else int(stage[0]) + 1}"

    def matches(
        self, assignment: Tensor, generated: GeneratedAnchors, expected: dict[str, Any]
    ) -> Iterator[Check]:
        """Compares the matches in every stage and image, and in every patch."""
        for s, stage in enumerate(self.stages):
            for b, pair in enumerate(expected[stage]):
                yield Check(f"match.{stage}.{b}", *_as_rows(assignment[s, b], pair), 0)
        groups = self.anchor_criterion.groups(generated, self.targets)
        p6, p5, *probed = self.anchor_criterion.match(groups)
        flat = {"anchor_p6": p6.flatten(0, 1), "anchor_p5": p5.flatten(0, 1)}
        rows = []
        for x, match in zip(self.patches, probed, strict=True):
            position, valid = per_image(x["image_index"], len(self.targets.counts))
            ordered = torch.empty(len(x["image_index"]), match.shape[2], dtype=torch.long)
            ordered[position[valid]] = match[valid]
            rows += list(ordered)
        flat["anchor_patches"] = rows
        valids = {
            "anchor_p6": groups[0].targets.valid.flatten(0, 1),
            "anchor_p5": groups[1].targets.valid.flatten(0, 1),
        }
        for key, found in flat.items():
            for i, pair in enumerate(expected.get(key, ())):
                actual, gt = found[i], pair
                objects = valids[key][i] if key in valids else self._objects(groups, i)
                # Stored target indices count the objects of the patch.
                own = objects.nonzero()[:, 0]
                gt = {"pred": pair["pred"], "target": own[pair["target"]]}
                yield Check(f"match.{key}.{i}", *_as_rows(actual, gt), 0)

    def _objects(self, groups: Sequence[Any], patch: int) -> Tensor:
        """Returns (M,) bool, the objects of a probed patch over all levels."""
        for x, group in zip(self.patches, groups[2:], strict=True):
            count = len(x["image_index"])
            if patch < count:
                position, valid = per_image(x["image_index"], len(self.targets.counts))
                return group.targets.valid[valid & (position == patch)][0]
            patch -= count
        raise IndexError(patch)


def _as_rows(actual: Tensor, pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    expected = torch.full_like(actual, -1)
    expected[pair["pred"]] = pair["target"]
    return actual, expected
