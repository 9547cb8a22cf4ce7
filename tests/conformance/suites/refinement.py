"""Execution of a case of the Sparse R-CNN family: proposals, stages, matching, losses.

B images, N queries, S stages, K classes, M padded ground truths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from torch import Tensor, nn

from asag.checkpoint import NameTable
from asag.modeling.criterion import SetCriterion
from asag.modeling.layers.roi_align import PyramidRoIAlign
from asag.modeling.matching import HungarianMatcher, MatchingCost
from asag.modeling.postprocess import select_detections
from asag.modeling.proposal_generator import LearnedProposals
from asag.modeling.roi_heads import DynamicConvHeads, DynamicConvStage, RoIReader
from asag.structures import ImageSizes, Predictions, Targets

from .common import Check, UnknownCase

LOGITS, BOXES_PX, FEATURES, SCORES = 5e-4, 1e-2, 1e-3, 1e-4  # absolute tolerances
LOSS = GRAD = 1e-3  # relative tolerances


class RefinementCase:
    """Our modules with the weights of a case, and their output for its features."""

    def __init__(
        self, case: dict[str, Any], names: NameTable, make_stage: Callable[[dict], DynamicConvStage]
    ) -> None:
        config = case["config"]
        self.case, self.names = case, names
        self.model = nn.Module()
        self.model.proposal_generator = LearnedProposals(
            num_queries=config["num_proposals"], dim=config["hidden_dim"]
        )
        self.model.roi_heads = DynamicConvHeads(
            make_stage=lambda: make_stage(config),
            num_stages=config["num_stages"],
            reader=RoIReader(
                PyramidRoIAlign(
                    strides=config["strides"],
                    output_size=config["pooler_resolution"],
                    sampling_ratio=config["sampling_ratio"],
                )
            ),
            in_features=list(case["features"]),
        )
        self.model.load_state_dict(names.to_ours(case["weights"]), strict=True)
        self.dtype = case["pred_logits"].dtype
        self.model.to(self.dtype).eval()
        self.features = {name: x.to(self.dtype) for name, x in case["features"].items()}
        self.sizes = ImageSizes.from_hw(
            [tuple(x) for x in case["image_sizes_hw"].tolist()],
            tuple(case["padded_hw"].tolist()),
            dtype=self.dtype,
        )
        weights = {
            "class_weight": config["class_weight"],
            "l1_weight": config["l1_weight"],
            "giou_weight": config["giou_weight"],
        }
        self.matcher = HungarianMatcher(
            cost=MatchingCost(**weights, alpha=config["alpha"], gamma=config["gamma"])
        )
        self.criterion = SetCriterion(
            **weights, focal_alpha=config["alpha"], focal_gamma=config["gamma"]
        )

    def predict(self) -> tuple[Predictions, dict[str, list[Tensor]]]:
        """Returns predictions, and inputs and outputs of each stage."""
        seen: dict[str, list[Tensor]] = {"boxes": [], "roi": [], "content": []}

        def record(_: nn.Module, args: tuple, output: tuple) -> None:
            seen["boxes"].append(args[1])
            seen["roi"].append(args[2])
            seen["content"].append(output[2])

        hooks = [x.register_forward_hook(record) for x in self.model.roi_heads.stages]
        try:
            queries, _ = self.model.proposal_generator(self.features, self.sizes)
            return self.model.roi_heads(self.features, queries, self.sizes), seen
        finally:
            for hook in hooks:
                hook.remove()

    def checks(self) -> Iterator[Check]:
        """Compares every tensor of the case."""
        case = self.case
        with torch.no_grad():
            predictions, seen = self.predict()
        side = case["config"]["pooler_resolution"]
        roi = seen["roi"][0].transpose(1, 2).unflatten(2, (side, side))
        yield Check("init_boxes", seen["boxes"][0], case["init_boxes_xyxy_abs"], BOXES_PX)
        if "roi_features_stage0" in case:
            yield Check("roi_features_stage0", roi, case["roi_features_stage0"], FEATURES)
        for s, logits in enumerate(predictions.logits):
            expected = case["stage_in_boxes"][s]
            yield Check(f"stage{s}.in_boxes", seen["boxes"][s], expected, BOXES_PX)
            yield Check(f"stage{s}.logits", logits, case["pred_logits"][s], LOGITS)
            actual = predictions.boxes_xyxy[s]
            yield Check(f"stage{s}.boxes", actual, case["pred_boxes"][s], BOXES_PX)
            expected = case["object_features"][s]
            yield Check(f"stage{s}.features", seen["content"][s], expected, FEATURES)
        yield from self.detections(predictions)
        for name, train in case["train"].items():
            yield from self.training(name, train)

    def detections(self, predictions: Predictions) -> Iterator[Check]:
        """Compares detections before and after rescaling to the requested size."""
        found = select_detections(
            predictions, self.sizes.hw, top_k=self.case["config"]["num_proposals"]
        )
        for b, raw in enumerate(found):
            height, width = self.case["postprocess_hw"][b].tolist()
            # Rescaling modifies its input.
            final = detector_postprocess(copy.deepcopy(raw), height, width)
            for key, ours in (("inference", raw), ("inference_postprocessed", final)):
                expected = self.case[key][b]
                yield Check(f"{key}.{b}.scores", ours.scores, expected["scores"], SCORES)
                actual = ours.pred_boxes.tensor
                yield Check(f"{key}.{b}.boxes", actual, expected["boxes"].to(actual), BOXES_PX)
                yield Check(f"{key}.{b}.classes", ours.pred_classes, expected["classes"], 0)

    def training(self, name: str, train: dict[str, Any]) -> Iterator[Check]:
        """Compares matches, losses and gradients for one set of targets."""
        targets = Targets.from_lists(
            [x["boxes_xyxy"] for x in train["targets"]],
            [x["labels"] for x in train["targets"]],
            self.sizes.whwh,
        )
        self.model.zero_grad(set_to_none=True)
        predictions, _ = self.predict()
        assignment = self.matcher(predictions, targets)
        for s in range(predictions.num_stages):
            expected = torch.full_like(assignment[s], -1)
            for b, (queries, objects) in enumerate(train["matcher_indices"][f"stage{s}"]):
                expected[b, queries] = objects
            yield Check(f"{name}.match.stage{s}", assignment[s], expected, 0)
        losses = self.criterion(predictions, targets, assignment)
        for key, expected in train["losses_weighted"].items():
            yield Check(f"{name}.{key}", losses[key], expected, 1e-6, LOSS)
            weight = self.criterion.weights[key.split("_")[1]]
            unweighted = train["losses_unweighted"][key]
            yield Check(f"{name}.{key}.raw", losses[key] / weight, unweighted, 1e-6, LOSS)
        total = sum(losses.values())
        yield Check(f"{name}.total", total, train["total_loss"], 1e-6, LOSS)
        if "grad_norms" in train:
            total.backward()
            yield from self.gradients(name, train)

    def gradients(self, name: str, train: dict[str, Any]) -> Iterator[Check]:
        """Compares the norms of all gradients, and the gradients that the case contains."""
        ours = self.names.to_theirs(
            {k: p.grad for k, p in self.model.named_parameters() if p.grad is not None}
        )
        for key, norm in train["grad_norms"].items():
            actual = ours[key].norm() if key in ours else float("nan")
            yield Check(f"{name}.grad_norm.{key}", actual, norm, 1e-6, GRAD)
        for key, grad in train.get("grads", {}).items():
            # Small entries of a large gradient have the rounding error of the large ones.
            atol = GRAD * float(grad.abs().max()) + 1e-7
            actual = ours.get(key, torch.full_like(grad, float("nan")))
            yield Check(f"{name}.grad.{key}", actual, grad, atol, GRAD)


def load_case(path: Path) -> dict[str, Any]:
    """Reads a case; a float64 case takes weights and features from its float32 sibling.

    Raises:
        UnknownCase: the file is no case of this family, or its sibling is missing.
    """
    case = torch.load(path, weights_only=True)
    if not {"config", "pred_logits", "train", "stage_in_boxes"} <= case.keys():
        raise UnknownCase(f"keys {sorted(case)} fit no refinement case")
    if "weights" not in case:
        sibling = path.with_name(path.name.replace("_f64", "_f32"))
        if sibling == path or not sibling.is_file():
            raise UnknownCase(f"has no weights and no sibling {sibling.name} to take them from")
        donor = torch.load(sibling, weights_only=True)
        case |= {key: donor[key] for key in ("weights", "features")}
    return case


def module_gradients(
    module: nn.Module, names: dict[str, str], expected: dict[str, Tensor]
) -> Iterator[Check]:
    """Compares the gradients of one module; `names` translates published names to ours."""
    parameters = dict(module.named_parameters())
    for key, grad in expected.items():
        atol = GRAD * float(grad.abs().max()) + 1e-7
        yield Check(f"grad.{key}", parameters[names[key]].grad, grad, atol, GRAD)
