"""The anchor generator against loops, its fixed capacities against sizes that follow the data."""

from __future__ import annotations

import asag_reference
import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import nms

from asag.modeling.proposal_generator.asag.anchors import (
    AdaptiveAnchorGenerator,
    GeneratedAnchors,
    ProbingRules,
)
from asag.modeling.proposal_generator.asag.network import AnchorNetwork
from asag.modeling.proposal_generator.asag.patches import (
    centered_corners,
    crop_patches,
    greedy_nms,
    resize_valid,
)

SEEDS = st.integers(0, 10_000)
HEIGHT, WIDTH = 320, 384
RULES = {
    "default": ProbingRules(),
    "fast": ProbingRules(min_selected=3, max_patches=4),
    "few": ProbingRules(max_anchors=20, min_anchors=10),
    "none": ProbingRules(eta_f=0.99, eta_l=0.98, eta_h=0.985),
    "minimum": ProbingRules(eta_f=0.9999, min_anchors=7),
    "coarse": ProbingRules(finest_level=4),
    "coarsest": ProbingRules(finest_level=5),
    "keep": ProbingRules(replace=False),
    "top": ProbingRules(eta_f=-1.0, max_anchors=30),
}


def make_network(seed: int, side: int = 15) -> AnchorNetwork:
    """A network with scores all over the place and anchors of all sizes."""
    torch.manual_seed(seed)
    network = AnchorNetwork(dim=8, channels=2, fixed_anchors=9, patch_anchors=6, side=side)
    for tokens in network.tokens:
        torch.nn.init.ones_(tokens.norm.weight)
        torch.nn.init.normal_(tokens.position, std=0.2)
    for mlp in (network.fixed_mlp, network.patch_mlp):
        mlp[-1].weight.data.mul_(3)
        mlp[-1].bias.data.view(-1, 5)[:, 2:4].sub_(1.0)
    return network.eval()


def make_maps(seed: int, batch: int = 2, height: int = HEIGHT, width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, 8, height // s, width // s, generator=generator) for s in (8, 16, 32)
    ]


def whwh(*sizes: tuple[int, int]) -> Tensor:
    return torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32)


def run(
    network: AnchorNetwork, maps: list[Tensor], sizes: Tensor, rules: ProbingRules, fixed: bool
) -> GeneratedAnchors:
    capacity = {"patch_capacity": 45, "anchor_capacity": rules.max_anchors} if fixed else {}
    with torch.no_grad():
        return AdaptiveAnchorGenerator(network=network, rules=rules, **capacity)(maps, sizes)


def rows(found: GeneratedAnchors, image: int) -> Tensor:
    anchors = found.anchors
    valid = anchors.valid[image]
    return torch.cat((anchors.boxes_cxcywh[image], anchors.scores[image, :, None]), dim=1)[valid]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal as sets, up to rounding."""
    assert actual.shape == expected.shape
    if len(actual):
        distance = torch.cdist(actual, expected, p=torch.inf)
        assert float(distance.amin(dim=0).max()) < 2e-3
        assert float(distance.amin(dim=1).max()) < 2e-3


@pytest.mark.parametrize("fixed", [False, True], ids=["variable", "fixed"])
@pytest.mark.parametrize("name", RULES)
def test_anchors_equal_the_written_out_algorithm(name: str, fixed: bool) -> None:
    network, maps = make_network(3), make_maps(4)
    sizes = ((HEIGHT, WIDTH - 50), (HEIGHT - 40, WIDTH))
    found = run(network, maps, whwh(*sizes), RULES[name], fixed)
    for b, (height, width) in enumerate(sizes):
        with torch.no_grad():
            expected = asag_reference.generate(
                network, [x[b] for x in maps], height, width, RULES[name]
            )
        assert_same(rows(found, b), torch.tensor(expected).view(-1, 5))


def test_other_patch_sizes_equal_the_written_out_algorithm() -> None:
    for side in (10, 18):
        network, maps = make_network(5, side), make_maps(6, batch=1)
        found = run(network, maps, whwh((HEIGHT, WIDTH)), ProbingRules(), False)
        with torch.no_grad():
            expected = asag_reference.generate(
                network, [x[0] for x in maps], HEIGHT, WIDTH, ProbingRules()
            )
        assert_same(rows(found, 0), torch.tensor(expected))


@settings(max_examples=15, deadline=None)
@given(SEEDS, SEEDS, st.sampled_from(sorted(RULES)))
def test_fixed_capacity_gives_the_same_anchors(net_seed: int, map_seed: int, name: str) -> None:
    network, maps = make_network(net_seed), make_maps(map_seed)
    sizes = whwh((HEIGHT, WIDTH - 64), (200, 170))
    variable, fixed = (run(network, maps, sizes, RULES[name], x) for x in (False, True))
    assert fixed.anchors.valid.shape[1] >= variable.anchors.valid.shape[1]
    for b in range(2):
        assert_same(rows(fixed, b), rows(variable, b))
    # Without a limit of patches either.
    for a, b in zip(variable.probed, fixed.probed, strict=False):
        for image in range(2):
            corners = (x.corner[image][x.valid[image]] for x in (a, b))
            assert torch.equal(*corners)


def test_a_batch_gives_every_image_what_it_gets_alone() -> None:
    network, maps = make_network(8), make_maps(9, batch=3)
    sizes = whwh((HEIGHT, WIDTH), (280, 300), (250, WIDTH))
    together = run(network, maps, sizes, ProbingRules(), False)
    for b in range(3):
        alone = run(network, [x[b : b + 1] for x in maps], sizes[b : b + 1], ProbingRules(), False)
        assert_same(rows(together, b), rows(alone, 0))


def test_images_smaller_than_a_patch_are_padded() -> None:
    network, maps = make_network(1), make_maps(2, batch=1, height=96, width=64)
    rules = ProbingRules(eta_l=0.0, eta_h=1.0)
    for fixed in (False, True):
        found = run(network, maps, whwh((90, 60)), rules, fixed)
        with torch.no_grad():
            expected = asag_reference.generate(network, [x[0] for x in maps], 90, 60, rules)
        assert_same(rows(found, 0), torch.tensor(expected))


def test_padding_slots_hold_the_whole_image_and_come_last() -> None:
    found = run(make_network(3), make_maps(4), whwh((320, 300), (100, 60)), ProbingRules(), True)
    anchors = found.anchors
    assert torch.equal(anchors.valid, anchors.valid.sort(dim=1, descending=True).values)
    assert (anchors.scores.diff(dim=1) <= 0).all()
    padding = anchors.boxes_cxcywh[1][~anchors.valid[1]]
    assert len(padding) and torch.equal(
        padding, padding.new_tensor((30, 50, 60, 100)).expand_as(padding)
    )


class _NoHostWait(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        if name == "index" and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1] if x is not None
        ):
            raise AssertionError("indexing by a mask waits for the device")
        return func(*args, **(kwargs or {}))


def test_fixed_capacity_never_waits_for_the_device() -> None:
    network, maps, sizes = make_network(3), make_maps(4), whwh((320, 300), (300, 380))
    with _NoHostWait():
        run(network, maps, sizes, ProbingRules(), True)
    with pytest.raises(AssertionError, match="waits"), _NoHostWait():
        run(network, maps, sizes, ProbingRules(), False)


def test_fixed_capacity_compiles_to_one_graph() -> None:
    network, maps, sizes = make_network(3), make_maps(4), whwh((320, 300), (300, 380))
    generator = AdaptiveAnchorGenerator(
        network=network, rules=ProbingRules(), patch_capacity=4, anchor_capacity=60
    )

    def forward(maps: list[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        anchors = generator(maps, sizes).anchors
        return anchors.boxes_cxcywh, anchors.valid

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for actual, expected in zip(compiled(maps, sizes), forward(maps, sizes), strict=True):
            torch.testing.assert_close(actual, expected)
        other = whwh((200, 384), (320, 250))  # sizes are data: no second graph
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(maps, other)[0], forward(maps, other)[0])


def test_capacities_keep_the_best() -> None:
    network, maps, sizes = make_network(3), make_maps(4), whwh((320, 300), (300, 380))
    full = run(network, maps, sizes, RULES["coarsest"], True)
    small = AdaptiveAnchorGenerator(
        network=network, rules=RULES["coarsest"], patch_capacity=1, anchor_capacity=8
    )
    with torch.no_grad():
        found = small(maps, sizes).anchors
    assert found.valid.shape == (2, 8)
    torch.testing.assert_close(found.scores, full.anchors.scores[:, :8])


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0.0, 0.9))
def test_greedy_nms_equals_torchvision(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(3, 25, 2, generator=generator) * 50
    boxes = torch.cat((corner, corner + torch.rand(3, 25, 2, generator=generator) * 40), dim=-1)
    scores = torch.rand(3, 25, generator=generator)
    candidates = torch.rand(3, 25, generator=generator) > 0.3
    candidates[2] = False
    index, valid = greedy_nms(boxes, scores, candidates, iou_threshold=threshold)
    limited = greedy_nms(boxes, scores, candidates, iou_threshold=threshold, limit=3, static=True)
    assert limited[0].shape == (3, 3)
    for b in range(3):
        own = candidates[b].nonzero()[:, 0]
        expected = own[nms(boxes[b][own], scores[b][own], threshold)]
        assert torch.equal(index[b][valid[b]], expected)
        assert torch.equal(limited[0][b][limited[1][b]], expected[:3])


def test_greedy_nms_of_nothing() -> None:
    boxes, scores = torch.rand(2, 5, 4), torch.rand(2, 5)
    index, valid = greedy_nms(boxes, scores, torch.zeros(2, 5, dtype=torch.bool), iou_threshold=0.5)
    assert index.shape == valid.shape == (2, 0)
    with pytest.raises(ValueError, match="limit"):
        greedy_nms(boxes, scores, scores > 0, iou_threshold=0.5, static=True)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(9, 160), st.integers(9, 192))
def test_resizing_equals_interpolation_of_the_crop(seed: int, height: int, width: int) -> None:
    features = torch.randn(1, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    found = resize_valid(features, whwh((height, width)), 32, 30)
    crop = features[..., : max(round(height / 32), 1), : max(round(width / 32), 1)]
    expected = F.interpolate(crop, (30, 30), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_crops_equal_slices() -> None:
    features = torch.randn(2, 3, 20, 17)
    corner = torch.tensor([[[0, 0], [2, 5]], [[1, 3], [2, 0]]])
    found = crop_patches(features, corner, 15)
    for b in range(2):
        for p in range(2):
            x, y = corner[b, p].tolist()
            expected = features[b, :, y : y + 15, x : x + 15].flatten(1).T
            assert torch.equal(found[b, p], expected)


@settings(max_examples=30, deadline=None)
@given(st.floats(-50, 700), st.floats(-50, 700), st.integers(10, 640), st.integers(10, 640))
def test_corners_stay_inside(x: float, y: float, height: int, width: int) -> None:
    corner = centered_corners(torch.tensor([[[x, y]]]), whwh((height, width)), 16, 15)[0, 0]
    for start, size in zip(corner.tolist(), (width, height), strict=True):
        assert 0 <= start <= max(-(-size // 16) - 15, 0)


def test_fewest_anchors_are_at_most_the_most() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.ASAG\.MIN_ANCHORS is 300; it must be at most"):
        ProbingRules(min_anchors=300)


def test_multiply_adds_are_those_of_the_paper() -> None:
    """0.06 G without probing, at 800 x 1280 (Section 1)."""

    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            network = AnchorNetwork(dim=256)
            rules = ProbingRules(finest_level=5)
            self.generator = AdaptiveAnchorGenerator(network=network, rules=rules)

        def forward(self, p5: Tensor) -> Tensor:
            return self.generator([p5, p5, p5], whwh((800, 1280))).anchors.boxes_cxcywh

    counter = FlopCountAnalysis(Fixed().eval(), torch.randn(1, 256, 25, 40))
    counter.unsupported_ops_warnings(False)
    products = counter.by_operator()
    assert (products["conv"] + products["linear"]) / 1e9 == pytest.approx(0.0574, abs=2e-4)


def test_one_capacity_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="ANCHOR_CAPACITY"):
        AdaptiveAnchorGenerator(
            network=make_network(0), rules=ProbingRules(), patch_capacity=5, anchor_capacity=0
        )


def test_anchors_can_start_on_a_grid():
    torch.manual_seed(0)
    network = AnchorNetwork(
        dim=8, channels=2, fixed_anchors=7, patch_anchors=4, side=5, anchor_init="grid"
    )
    for mlp, cells in ((network.fixed_mlp, 3), (network.patch_mlp, 2)):
        boxes = mlp[-1].bias.view(-1, 5)[:, :4].sigmoid()
        for i, (cx, cy, w, h) in enumerate(boxes.tolist()):
            assert cx == pytest.approx((i % cells + 0.5) / cells, abs=1e-5)
            assert cy == pytest.approx((i // cells + 0.5) / cells, abs=1e-5)
            assert w == h == pytest.approx(2 / 3, abs=1e-5)
