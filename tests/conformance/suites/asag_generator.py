"""Reference cases of ASAG's anchor generator.

B images, N anchors, P patches, A anchors of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from asag.checkpoint.asag import ASAG_A, ASAG_S
from asag.modeling.proposal_generator.asag.anchors import (
    AdaptiveAnchorGenerator,
    GeneratedAnchors,
    ProbingRules,
)
from asag.modeling.proposal_generator.asag.network import AnchorNetwork
from asag.modeling.proposal_generator.asag.training_patches import PatchCompletion, PatchKind

from .asag_training import constant, read_targets, to_whwh
from .common import Check

BOXES_PX, LOGITS = 5e-4, 1e-4  # absolute tolerances
FAST = {"min_selected": 3, "max_patches": 15}
KINDS = {"generated": PatchKind.GENERATED, "gt": PatchKind.GROUND_TRUTH, "random": PatchKind.RANDOM}


def load(module: nn.Module, state: dict[str, Tensor], theirs: str, ours: str) -> None:
    """Loads a part of a published state dict with prefix `theirs` into one with prefix `ours`."""
    table = ASAG_S if any(name.startswith("head_series.") for name in state) else ASAG_A
    renamed = table.to_ours({theirs + name: value for name, value in state.items()})
    module.load_state_dict({name.removeprefix(ours): value for name, value in renamed.items()})
    module.eval()


def aligned(actual: Tensor, expected: Tensor) -> Tensor:
    """Reorders the rows of `actual` (k, d) to match `expected` (k, d)."""
    if actual.shape != expected.shape or not len(actual):
        return actual
    cost = torch.cdist(actual.double(), expected.double(), p=1)
    rows, columns = linear_sum_assignment(cost.numpy())
    result = torch.empty_like(actual)
    result[torch.from_numpy(columns)] = actual[torch.from_numpy(rows)]
    return result


def make_network(config: dict[str, Any], state: dict[str, Tensor]) -> AnchorNetwork:
    """Builds the network of a case with its weights."""
    network = AnchorNetwork(
        dim=config["d_model"],
        channels=config["compress_dim"],
        fixed_anchors=config["num_pred_anchor1"],
        patch_anchors=config["num_pred_anchor2"],
        side=config["patch_size"],
    )
    load(network, state, "anchor_generator.", "proposal_generator.generator.network.")
    return network


def make_rules(thresholds: dict[str, Any], **changes: int) -> ProbingRules:
    """Reads the thresholds of a case."""
    level = int(thresholds["finest_level"].removeprefix("P"))
    return ProbingRules(**{**thresholds, "finest_level": level, **changes})


def verify_generator(case: dict[str, Any]) -> Iterator[Check]:
    """Compares every case twice: with data-dependent sizes and with fixed capacities."""
    for name, c in case["cases"].items():
        network = make_network(
            case["config"], {**case["state_dict"], **c.get("state_dict_override", {})}
        )
        rules = make_rules(c["thresholds"], **(FAST if c["mode"] == "fast" else {}))
        inputs = case["inputs"][c["input"]]
        images = c.get("images", list(range(len(inputs["image_hw"]))))
        maps = [inputs[level][images] for level in ("p3", "p4", "p5")]
        whwh = to_whwh(inputs["image_hw"][images])
        for title, slots in (("variable", 0), ("fixed", 100)):
            completion = probing = None
            if c["mode"] == "train":
                warmup = torch.tensor(c["epoch"] == 0)
                completion, probing = (
                    PatchCompletion(
                        read_targets(c["targets"], whwh),
                        side=network.side,
                        iou_threshold=rules.eta_iou,
                        warmup=warmup,
                        capacity=slots,
                        uniform=constant(c["u"]),
                    ),
                    ~warmup,
                )
            generator = AdaptiveAnchorGenerator(
                network=network,
                rules=rules,
                patch_capacity=slots,
                anchor_capacity=rules.max_anchors if slots else 0,
            )
            with torch.no_grad():
                found = generator(maps, whwh, completion, probing)
            check = _fast_checks if c["mode"] == "fast" else _batch_checks
            yield from check(f"{name}.{title}", found, c["expected"], rules, bool(slots))


def anchor_rows(found: GeneratedAnchors, image: int) -> Tensor:
    """Returns the anchors of an image as (k, 5): boxes cxcywh and scores."""
    anchors = found.anchors
    rows = torch.cat((anchors.boxes_cxcywh, anchors.scores[..., None]), dim=-1)
    return rows[image][anchors.valid[image]]


def _batch_checks(
    name: str, found: GeneratedAnchors, expected: dict, rules: ProbingRules, fixed: bool
) -> Iterator[Check]:
    if not fixed:
        yield Check(f"{name}.slots", found.anchors.valid.shape[1], expected["num_slots"], 0)
    for b, levels in enumerate(expected["per_image"]):
        gt = torch.cat(list(levels))
        gt = gt[gt[:, 4].argsort(descending=True)[: rules.max_anchors]]
        rows = anchor_rows(found, b)
        yield Check(f"{name}.{b}.anchors", aligned(rows, gt), gt, BOXES_PX)
        gt = expected["padded_anchors"][b][expected["valid_mask"][b]]
        yield Check(f"{name}.{b}.padded", aligned(rows[:, :4], gt), gt, BOXES_PX)
    probed = {f"P{x.level}": x for x in found.probed}
    for level in expected["levels"]:
        key, raw = level["level"], level["raw"]
        if key in ("P6", "P5"):
            yield Check(f"{name}.{key}", found.p6 if key == "P6" else found.p5, raw, LOGITS)
            continue
        patches = probed.pop(key)
        for b in range(len(patches.valid)):
            mine, own = level["image_index"] == b, patches.valid[b]
            title = f"{name}.{key}.{b}"
            yield Check(f"{title}.corners", patches.corner[b][own], level["crop_pos_xy"][mine], 0)
            yield Check(f"{title}.raw", patches.raw[b][own], raw[mine], LOGITS)
            if "kind" in level:
                kinds = [KINDS[k] for k, m in zip(level["kind"], mine.tolist(), strict=True) if m]
                actual = patches.kind[b][own]
                yield Check(f"{title}.kinds", actual, torch.tensor(kinds, dtype=torch.long), 0)
    left = sum(int(x.valid.sum()) for x in probed.values())
    yield Check(f"{name}.further_patches", left, 0, 0)


def _fast_checks(
    name: str, found: GeneratedAnchors, expected: dict, rules: ProbingRules, fixed: bool
) -> Iterator[Check]:
    gt = torch.cat((expected["anchors"], expected["scores"][:, None]), dim=1)
    rows = anchor_rows(found, 0)
    yield Check(f"{name}.anchors", aligned(rows, gt), gt, BOXES_PX)
    probed = {x.level: x for x in found.probed}
    for patches in expected["patches"]:
        level = int(patches["level"])
        mine = probed.pop(level)
        corners = mine.corner[0][mine.valid[0]]
        yield Check(f"{name}.P{level}.corners", corners, patches["crop_pos_xy"], 0)
        yield Check(f"{name}.P{level}.selected", mine.num_selected[0], patches["num_selected"], 0)
    left = sum(int(x.valid.sum()) for x in probed.values())
    yield Check(f"{name}.further_patches", left, 0, 0)
