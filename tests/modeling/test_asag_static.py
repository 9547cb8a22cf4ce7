"""ASAG's generator with fixed capacities: no look at the data from the host, one graph for the
compiler, one recording for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from asag import load_config
from asag.diagnostics.profiling import host_waits
from asag.modeling.proposal_generator.asag.anchors import GeneratedAnchors
from asag.modeling.proposal_generator.asag.generator import AdaptiveSparseAnchors
from asag.structures import ImageSizes, Queries, Targets

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SLIM_RESNET.WIDTH": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.DECODER.HIDDEN_DIM": 16,
    "MODEL.DECODER.NUM_HEADS": 2,
    "MODEL.DECODER.FFN_DIM": 32,
    "MODEL.DECODER.DYNAMIC_DIM": 4,
    "MODEL.ASAG.COMPRESSED_DIM": 1,
    "MODEL.ASAG.FFN_DIM": 32,
    "MODEL.ASAG.FIXED_ANCHORS": 6,
    "MODEL.ASAG.PATCH_ANCHORS": 4,
    "MODEL.ASAG.ETA_L": 0.0,  # probe whatever the untrained network says
    "MODEL.ASAG.ETA_H": 1.0,
    "MODEL.ASAG.GT_WARMUP_ITERS": 0,
    "MODEL.ASAG.PATCH_CAPACITY": 2,
    "MODEL.ASAG.ANCHOR_CAPACITY": 40,
}
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def build(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    options = OPTIONS | {key.replace("__", "."): value for key, value in changes.items()}
    words = [str(word) for pair in options.items() for word in pair]
    model = build_model(load_config(str(ROOT / "configs/ASAG/asag_tiny.yaml"), words))
    network = model.proposal_generator.generator.network
    for mlp in (network.fixed_mlp, network.patch_mlp):  # anchors small enough for patches of P3
        mlp[-1].bias.data.view(-1, 5)[:, 2:4].sub_(2.0)
    return model


@pytest.fixture(scope="module")
def generator() -> AdaptiveSparseAnchors:
    return build().proposal_generator.eval()


def features(seed: int, device: str = "cpu") -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(2, 16, 128 // s, 160 // s, generator=g).to(device)
        for name, s in STRIDES.items()
    }


def sizes(width: int = 160, device: str = "cpu") -> ImageSizes:
    return ImageSizes.from_hw([(128, width), (100, 130)], (128, 160), device=device)


def targets(seed: int, objects: int = 3) -> Targets:
    g = torch.Generator().manual_seed(seed)
    low = 40 * torch.rand(2, objects, 2, generator=g)
    boxes = torch.cat((low, low + 10 + 30 * torch.rand(2, objects, 2, generator=g)), dim=-1)
    labels = torch.zeros(2, objects, dtype=torch.long)
    return Targets.from_lists(list(boxes), list(labels), sizes().whwh)


def answers(queries: Queries) -> tuple[Tensor, ...]:
    assert queries.boxes_xyxy is not None and queries.proposal_logits is not None
    return queries.content, queries.valid, queries.boxes_xyxy, queries.proposal_logits


def test_inference_never_waits_for_the_device(generator: AdaptiveSparseAnchors) -> None:
    maps, whwh = features(1), sizes()
    with torch.no_grad():
        assert waits(generator, lambda: generator(maps, whwh)) == {}
        probed = generator.generate(maps, whwh).probed
    assert [x.level for x in probed] == [4, 3] and all(x.valid.any() for x in probed)


def test_sizes_that_follow_the_data_do_wait() -> None:
    """The counter is not blind."""
    variable = build(MODEL__ASAG__PATCH_CAPACITY=0, MODEL__ASAG__ANCHOR_CAPACITY=0)
    generator, maps, whwh = variable.proposal_generator.eval(), features(1), sizes()
    with torch.no_grad():
        assert waits(generator, lambda: generator(maps, whwh))


def test_training_waits_for_the_costs_of_the_matching_alone(
    generator: AdaptiveSparseAnchors,
) -> None:
    maps, whwh, gt = features(1), sizes(), targets(2)
    assert waits(generator, lambda: generator.generate(maps, whwh, gt)) == {}
    assert waits(generator, lambda: generator(maps, whwh, gt)) == {"cpu": 1}


def waits(generator: AdaptiveSparseAnchors, call: Callable[[], object]) -> dict[str, int]:
    """Waits of `call`, with RoIAlign as on a GPU: the CPU's way makes small tables on the host."""
    pooler = generator.block.pooler
    prepare = pooler.prepare
    pooler.prepare = lambda maps, method=None: prepare(maps, "kernel")
    try:
        return host_waits(call)
    finally:
        del pooler.prepare


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_inference_is_one_graph_for_all_images(
    generator: AdaptiveSparseAnchors, fresh_compiler: None
) -> None:
    compiled = torch.compile(
        lambda maps, whwh: answers(generator(maps, whwh)[0]), fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        for seed, width in ((1, 160), (2, 90)):
            expected = answers(generator(features(seed), sizes(width))[0])
            if seed == 1:
                found = compiled(features(seed), sizes(width))
            else:  # other data, no other graph
                with torch.compiler.set_stance("fail_on_recompile"):
                    found = compiled(features(seed), sizes(width))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def raw_anchors(found: GeneratedAnchors) -> list[Tensor]:
    return [found.p6, found.p5, *(x.raw for x in found.probed)]


def test_anchors_of_a_training_step_are_one_graph(
    generator: AdaptiveSparseAnchors, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Draws that a graph and eager execution share.
    monkeypatch.setattr(
        generator, "uniform", lambda shape, device: torch.full(shape, 0.3, device=device)
    )

    def losses(seed: int, generate: Callable[..., GeneratedAnchors]) -> tuple[Tensor, list]:
        found = generate(features(seed), sizes(), targets(seed))
        total = sum(x.square().sum() for x in raw_anchors(found))
        weights = list(generator.generator.parameters())
        return total, list(torch.autograd.grad(total, weights, allow_unused=True))

    compiled = torch.compile(generator.generate, fullgraph=True, backend="eager")
    for seed in (1, 2):
        total, gradients = losses(seed, compiled)
        expected, expected_gradients = losses(seed, generator.generate)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-4)


def test_compiling_a_model_compiles_its_generator(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module, parts = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda module: parts.append(module))
    plain, model = build().eval(), build(MODEL__COMPILE=True).eval()
    proposing = model.proposal_generator
    assert {proposing.generator, proposing.block, model.backbone} <= set(parts)
    compile_module(proposing.generator, backend="eager", fullgraph=True)
    image = torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        found, expected = (x([{"image": image}])[0]["instances"] for x in (model, plain))
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
    parts.clear()
    variable = build(
        MODEL__COMPILE=True, MODEL__ASAG__PATCH_CAPACITY=0, MODEL__ASAG__ANCHOR_CAPACITY=0
    )
    assert parts and variable.proposal_generator.generator not in parts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generator_is_recorded_and_replayed_as_a_cuda_graph() -> None:
    generator = build(MODEL__DEVICE="cuda").proposal_generator.eval()
    maps, whwh = features(1, "cuda"), sizes(device="cuda")
    with torch.no_grad():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                generator(maps, whwh)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = answers(generator(maps, whwh)[0])
        for seed, width in ((1, 160), (2, 90)):
            for name, x in features(seed, "cuda").items():
                maps[name].copy_(x)
            whwh.whwh.copy_(sizes(width).whwh)
            graph.replay()
            expected = answers(generator(maps, whwh)[0])
            torch.testing.assert_close(recorded, expected, rtol=1e-3, atol=1e-3)
