"""Dynamic proposal generation against its definition, step by step."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asag.modeling.layers.boxes import cxcywh_to_xyxy
from asag.modeling.proposal_generator import DynamicProposals, LearnedProposals
from asag.structures import ImageSizes

LEVELS = ["p2", "p3", "p4", "p5"]


def make(**changes: object) -> DynamicProposals:
    arguments = {
        "num_queries": 6,
        "num_experts": 3,
        "dim": 8,
        "in_features": LEVELS,
        "size": 5,
        "hidden_dim": 16,
        "tau_init": 10.0,
        "tau_steps": 4,
    }
    torch.manual_seed(0)
    return DynamicProposals(**(arguments | changes))


def pyramid(batch: int = 2, height: int = 64, width: int = 96, dim: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(
            batch, dim, height // 2 ** (i + 2), width // 2 ** (i + 2), generator=generator
        )
        for i, name in enumerate(LEVELS)
    }


def sizes(batch: int = 2) -> ImageSizes:
    return ImageSizes.from_hw([(64, 96)] * batch)


def reference(module: DynamicProposals, features: dict[str, Tensor], size: ImageSizes) -> tuple:
    """The definition, one image, expert and proposal at a time; channels summed after resizing."""
    boxes, contents = [], []
    for b in range(len(size)):
        maps = [features[f][b : b + 1] for f in LEVELS]
        if module.describe.halve:
            stair = maps[0]
            for conv, coarser in zip(module.describe.halve, maps[1:], strict=True):
                stair = torch.cat([conv(stair), coarser], dim=1)
            resized = F.interpolate(stair, (5, 5), mode="bilinear", align_corners=False)
        else:
            resized = torch.cat(
                [F.interpolate(x, (5, 5), mode="bilinear", align_corners=False) for x in maps],
                dim=1,
            )
        first, _, second = module.weigh
        scores = second(first(resized.sum(dim=1).flatten()).relu())
        scores = scores.view(module.num_experts, -1) / float(module.temperature)
        for n in range(scores.shape[1]):
            weights = scores[:, n].exp() / scores[:, n].exp().sum()
            box = sum(w * x[n] for w, x in zip(weights, module.expert_boxes_cxcywh, strict=True))
            boxes.append(cxcywh_to_xyxy(box) * size.whwh[b])
            contents.append(
                sum(w * x[n] for w, x in zip(weights, module.expert_features, strict=True))
            )
    return torch.stack(boxes).view(len(size), -1, 4), torch.stack(contents).view(len(size), -1, 8)


@pytest.mark.parametrize("staircase", [True, False])
def test_equals_definition(staircase: bool) -> None:
    module = make(staircase=staircase).eval()
    torch.nn.init.uniform_(module.expert_boxes_cxcywh)
    queries, losses = module(pyramid(), sizes())
    boxes, content = reference(module, pyramid(), sizes())
    torch.testing.assert_close(queries.boxes_xyxy, boxes, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(queries.content, content, atol=1e-5, rtol=1e-5)
    assert losses == {} and queries.valid.all()


def test_staircase_widths_and_size_of_the_paper() -> None:
    """256-channel features, 30 x 30, 4 experts of 300: the paper's 3.17 M extra parameters."""
    with torch.device("meta"):
        module = DynamicProposals(num_queries=300, num_experts=4, dim=256, in_features=LEVELS)
    assert [conv.in_channels for conv in module.describe.halve] == [256, 512, 768]
    network = [*module.describe.parameters(), *module.weigh.parameters()]
    assert sum(p.numel() for p in network) == 1_351_500 + 1_801_200 + 13_824 + 1_536
    assert module.expert_features.shape == (4, 300, 256)
    assert module.expert_boxes_cxcywh.shape == (4, 300, 4)


def test_proposals_depend_on_the_image_and_gradient_reaches_it() -> None:
    module = make()
    features = {k: v.requires_grad_() for k, v in pyramid().items()}
    queries, _ = module(features, sizes())
    assert (queries.content[0] - queries.content[1]).abs().max() > 1e-4
    queries.content.pow(2).sum().backward()
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in features.values())
    assert all(p.grad is not None for n, p in module.named_parameters() if "boxes" not in n)


def test_weights_are_a_softmax_over_experts() -> None:
    weights = make().eval().expert_weights(pyramid())
    assert weights.shape == (2, 3, 6)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, 6))


def test_temperature_anneals_is_saved_and_stays_in_evaluation() -> None:
    module, seen = make(), []
    for _ in range(6):
        module(pyramid(), sizes())
        seen.append(float(module.temperature))
    assert seen == pytest.approx([10.0, 7.75, 5.5, 3.25, 1.0, 1.0])
    resumed = make()
    resumed(pyramid(), sizes())
    resumed(pyramid(), sizes())
    copy = make()
    copy.load_state_dict(resumed.state_dict())
    assert float(copy.temperature) == pytest.approx(7.75)
    copy.eval()(pyramid(), sizes())
    assert float(copy.temperature) == pytest.approx(7.75)
    copy.train()(pyramid(), sizes())
    assert float(copy.temperature) == pytest.approx(5.5)
    assert float(make(tau_steps=0).temperature) == 1.0


def test_experts_start_from_learned_proposals() -> None:
    learned = LearnedProposals(num_queries=6, dim=8)
    torch.nn.init.uniform_(learned.boxes_cxcywh)
    module = make().eval()
    missing, unexpected = module.load_state_dict(learned.state_dict(), strict=False)
    assert not unexpected and not {"expert_features", "expert_boxes_cxcywh"} & set(missing)
    ours, _ = module(pyramid(), sizes())
    theirs, _ = learned(pyramid(), sizes())
    torch.testing.assert_close(ours.boxes_xyxy, theirs.boxes_xyxy)
    torch.testing.assert_close(ours.content, theirs.content)


@pytest.mark.parametrize("height,width", [(32, 32), (64, 160), (224, 96)])
def test_any_image_size(height: int, width: int) -> None:
    queries, _ = make()(pyramid(1, height, width), sizes(1))
    assert queries.content.shape == (1, 6, 8) and queries.content.isfinite().all()


def test_boxes_stay_float32_under_autocast() -> None:
    module = make().eval()
    torch.nn.init.uniform_(module.expert_boxes_cxcywh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queries, _ = module(pyramid(), sizes())
    assert queries.boxes_xyxy.dtype == torch.float32
    exact, _ = module(pyramid(), sizes())
    # The weights may be rounded; mixing may not add rounding of its own beyond theirs.
    torch.testing.assert_close(queries.boxes_xyxy, exact.boxes_xyxy, atol=0.5, rtol=0)
