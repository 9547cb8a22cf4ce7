"""ONNX files: tiny models of every family against PyTorch, and the check that trusts no file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import batched_nms

from asag import load_config
from asag.export import (
    ExportableDetector,
    ExportError,
    Tolerance,
    check_onnx,
    describe,
    export_onnx,
    generated_pictures,
    read_pictures,
)
from asag.export.check import ImageDetections, compare
from asag.export.onnx_file import PACKAGES, require_packages
from asag.export.suppression import keep_best
from asag.modeling.layers.position_encoding import FeaturePositions
from asag.structures import ImageSizes

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 96)
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(
    bool(MISSING), reason=f"export needs {', '.join(MISSING)}: pip install asag[export]"
)

SMALL: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.SLIM_RESNET.WIDTH": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": 7,
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ENCODER.NUM_LAYERS": 1,
    "MODEL.DECODER.NUM_STAGES": 1,
    "MODEL.DECODER.NUM_AUXILIARY": 0,
    "MODEL.DECODER.HIDDEN_DIM": 16,
    "MODEL.DECODER.NUM_HEADS": 2,
    "MODEL.DECODER.FFN_DIM": 32,
    "MODEL.DECODER.DYNAMIC_DIM": 4,
    "MODEL.DECODER.MIXER_IN_POINTS": 4,
    "MODEL.DECODER.MIXER_OUT_POINTS": 4,
    "MODEL.DEFORMABLE_ENCODER.NUM_LAYERS": 1,
    "MODEL.ASAG.COMPRESSED_DIM": 1,
    "MODEL.ASAG.PATCH_SIZE": 5,
    "MODEL.ASAG.FIXED_ANCHORS": 4,
    "MODEL.ASAG.PATCH_ANCHORS": 3,
    "MODEL.ASAG.MIN_ANCHORS": 3,
    "MODEL.ASAG.FFN_DIM": 32,
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": (1, 1, 1, 1),
    "MODEL.SWIN.NUM_HEADS": (1, 2, 2, 4),
    "MODEL.SWIN.WINDOW_SIZE": 3,
    "TEST.DETECTIONS_PER_IMAGE": 10,
}
STAGES = {"MODEL.DECODER.NUM_STAGES": 2}
FPN = {"MODEL.BACKBONE.NAME": "build_slim_resnet_fpn_backbone"}
PLAIN = {"MODEL.BACKBONE.NAME": "build_slim_resnet"}
OVERLAPPING = {"MODEL.PROPOSAL_GENERATOR.BOX_INIT": "image", "MODEL.NMS_THRESH_TEST": 0.2}
FIXED = {"MODEL.ASAG.PATCH_CAPACITY": 2, "MODEL.ASAG.ANCHOR_CAPACITY": 20}
UNSEARCHED = {"MODEL.ASAG.FINEST_LEVEL_TEST": 5}
BGR = {"INPUT.FORMAT": "BGR"}
TIMM = {
    "MODEL.BACKBONE.NAME": "build_timm_backbone",
    "MODEL.TIMM.NAME": "tf_efficientnet_lite0",  # padded as TensorFlow does it
    "MODEL.TIMM.OUT_STRIDES": "(16,)",
    "MODEL.PIXEL_MEAN": "[127.5, 127.5, 127.5]",
    "MODEL.PIXEL_STD": "[127.5, 127.5, 127.5]",
}

# name -> configuration, what is changed in it, and images of a batch (None: any number). The time
# that torch takes goes with the operations in the graph, so what families share is in one of them:
# ASAG's coarse-to-fine search in ASAG-S, a second refinement stage in Sparse R-CNN.
FAMILIES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "SparseRCNN": ("SparseRCNN/sparse_rcnn_tiny.yaml", STAGES, None),
    "IoUEnhancedSparseRCNN": (
        "IoUEnhancedSparseRCNN/iou_sparse_rcnn_swin_t_100pro_3x.yaml",  # on a Swin Transformer
        {},
        2,
    ),
    "DynamicSparseRCNN": ("DynamicSparseRCNN/dynamic_sparse_rcnn_tiny.yaml", OVERLAPPING, 2),
    "DETR": ("DETR/detr_tiny.yaml", STAGES, None),
    "ConditionalDETR": ("ConditionalDETR/conditional_detr_tiny.yaml", STAGES, 2),
    "timm": ("DETR/detr_tiny.yaml", TIMM, 2),
    "ASAG-S": ("ASAG/asag_tiny.yaml", FIXED, None),
    "ASAG-A": ("ASAG/asag_a_r50_100_1x.yaml", FIXED | FPN | UNSEARCHED, 2),
    "ASAG-D": ("ASAG/asag_d_r50_100_3x.yaml", FIXED | PLAIN | UNSEARCHED, 2),
}


def build(config: str, changes: dict[str, Any] | None = None) -> nn.Module:
    """A tiny model whose scores and boxes spread, as trained ones do."""
    options = SMALL | (changes or {})
    words = [str(word) for pair in options.items() for word in pair]
    cfg = load_config(str(ROOT / "configs" / config), words)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "class_logits.weight" in name or "box_deltas" in name or "embedding" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@needs_onnx
@pytest.mark.parametrize("name", FAMILIES)
def test_file_detects_what_the_model_detects(name, tmp_path):
    config, changes, batch = FAMILIES[name]
    model = build(config, changes)
    path = tmp_path / "model.onnx"
    export_onnx(ExportableDetector(model, SIZE), path, batch=batch)
    assert_alike(path, model)
    assert [x.name for x in tmp_path.iterdir()] == ["model.onnx"]  # one file, weights inside


def assert_alike(path: Path, model: nn.Module) -> None:
    agreement = check_onnx(path, model, generated_pictures(SIZE, scenes=3))
    assert agreement.problems == ()
    assert agreement.pictures == 5 and agreement.detections >= 5
    assert agreement.box < 0.02 and agreement.score < 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model that sees BGR, and its file for one image at a time."""
    if MISSING:
        pytest.skip(f"export needs {', '.join(MISSING)}: pip install asag[export]")
    model = build("SparseRCNN/sparse_rcnn_tiny.yaml", BGR)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    cfg = load_config(str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml"))
    description = describe(cfg, config_name="tiny.yaml", class_names=["a", "ß", "c"], version="9.9")
    export_onnx(ExportableDetector(model, SIZE), path, batch=1, description=description)
    return model, path


def test_file_takes_rgb_whatever_the_model_sees(exported):
    model, path = exported
    assert model.input_format == "BGR"
    assert_alike(path, model)


def test_metadata_says_how_to_use_the_file(exported):
    import onnx

    _, path = exported
    stored = {x.key: x.value for x in onnx.load(path).metadata_props}
    assert json.loads(stored["class_names"]) == ["a", "ß", "c"]
    expected = {"config": "tiny.yaml", "library": "asag 9.9", "architecture": "SparseRCNN"}
    expected |= {"height": "64", "width": "96", "batch": "1", "color_order": "RGB", "nms": "none"}
    assert expected.items() <= stored.items()


@pytest.mark.parametrize("part", ["class_logits", "box_deltas", "backbone"])
def test_a_file_of_other_weights_is_refused(exported, part):
    model, path = exported
    other = build("SparseRCNN/sparse_rcnn_tiny.yaml", BGR)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if part in name:
                parameter *= 1.05
    pictures = generated_pictures(SIZE, scenes=2)
    assert not check_onnx(path, model, pictures).problems
    refused = check_onnx(path, other, pictures)
    assert refused.problems
    assert refused.box > Tolerance.box or refused.score > Tolerance.score
    assert "no equal" in refused.problems[0]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("export_tool", ROOT / "tools" / "export.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(tmp_path, *words):
    options = [str(word) for pair in (SMALL | BGR).items() for word in pair]
    return [
        *("--config-file", "SparseRCNN/sparse_rcnn_tiny.yaml"),
        *("--output", str(tmp_path / "out" / "m.onnx")),
        *words,
        *options,
    ]


def test_tool_keeps_a_good_file_and_rejects_a_tampered_one(
    exported, tool, tmp_path, monkeypatch, capsys
):
    model, path = exported
    weights = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict(), "class_names": ["x", "y", "z"]}, weights)
    written = {}

    def write(detector, target, **options):  # the export itself has been tested above
        written.update(options)
        target.write_bytes(written["file"])

    monkeypatch.setattr(tool, "export_onnx", write)
    arguments = command(tmp_path, "--weights", str(weights), "--size", "64", "96")
    written["file"] = path.read_bytes()
    assert tool.main(arguments) == 0
    assert json.loads(written["description"]["class_names"]) == ["x", "y", "z"]
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["m.onnx"]

    (tmp_path / "out" / "m.onnx").unlink()
    written["file"] = tampered(path)
    assert tool.main(arguments) == 1
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["m.onnx.rejected"]
    assert "have no equal" in capsys.readouterr().err

    assert tool.main(command(tmp_path, "--size", "64", "96")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the check needs trained weights" in error
    assert "pass --weights FILE" in error and "m.onnx.rejected" in error


def tampered(path: Path) -> bytes:
    """The file with one bias of its predictors changed a little."""
    import onnx

    model = onnx.load(path)
    (bias,) = [x for x in model.graph.initializer if x.name.endswith("box_deltas.bias")]
    values = onnx.numpy_helper.to_array(bias) + np.float32(0.05)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "60", "96"), "multiples of 32, got 60 96; the nearest are 64 96"),
        (("--size", "64", "96", "--weights", "absent.pth"), "no weights file absent.pth"),
        (("--size", "64", "96", "--images", "absent"), "no images in absent"),
        (("--size", "64", "96", "--box-tolerance", "0"), "tolerances must be positive"),
    ],
)
def test_tool_says_what_is_wrong(tool, tmp_path, capsys, words, message):
    if MISSING:
        pytest.skip(f"export needs {', '.join(MISSING)}: pip install asag[export]")
    assert tool.main(command(tmp_path, *words)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.onnx*"))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_tool_refuses_odd_batches(tool, tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        tool.main(command(tmp_path, "--size", "64", "96", "--batch", text))
    assert "neither a positive number nor 'dynamic'" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else 1)
    with pytest.raises(ExportError, match=r"onnxruntime: pip install asag\[export\]"):
        require_packages()


def test_asag_without_capacities_is_refused():
    model = build("ASAG/asag_tiny.yaml")
    with pytest.raises(ValueError, match=r"MODEL.ASAG.PATCH_CAPACITY.*ANCHOR_CAPACITY \(60 loses"):
        ExportableDetector(model, SIZE)


def test_a_file_that_is_no_model_is_named(exported, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"cannot run .*broken\.onnx"):
        check_onnx(broken, exported[0], generated_pictures(SIZE, scenes=0))
    with pytest.raises(ValueError, match="no images"):
        check_onnx(broken, exported[0], {})


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_detector_alone_answers_like_the_model(threshold):
    changes = OVERLAPPING | {"MODEL.NMS_THRESH_TEST": threshold}
    model = build("SparseRCNN/sparse_rcnn_tiny.yaml", changes)
    images = torch.randint(256, (2, 3, *SIZE)).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        boxes, scores, labels, valid = ExportableDetector(model, SIZE)(images)
        expected = model([{"image": x} for x in images])
    assert model.state_dict().keys() == before.keys()  # folding happened to a copy
    for i, output in enumerate(expected):
        found = output["instances"]
        count = int(valid[i].sum())
        assert count == len(found) and (threshold > 0) == (count < 10)
        assert valid[i, :count].all()
        torch.testing.assert_close(boxes[i, :count], found.pred_boxes.tensor, rtol=0, atol=1e-2)
        torch.testing.assert_close(scores[i, :count], found.scores, rtol=0, atol=1e-5)
        assert torch.equal(labels[i, :count], found.pred_classes)
        assert not scores[i, count:].any() and not boxes[i, count:].any()
        assert (labels[i, count:] == -1).all()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 24),
    threshold=st.sampled_from([0.0, 0.21, 0.5, 0.91]),
)
def test_static_suppression_is_greedy_suppression(seed, count, threshold):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: exact areas, and many equal and touching boxes.
    low = torch.randint(0, 6, (2, count, 2), generator=generator).float()
    size = torch.randint(1, 6, (2, count, 2), generator=generator)
    boxes = torch.cat((low, low + size), dim=-1)
    labels = torch.randint(0, 2, (2, count), generator=generator)
    candidates = torch.rand(2, count, generator=generator) < 0.8
    scores = torch.linspace(1, 0.1, count)
    kept = keep_best(boxes, labels, candidates, threshold)
    for b in range(2):
        real = candidates[b].nonzero()[:, 0]
        expected = real[batched_nms(boxes[b, real], scores[real], labels[b, real], threshold)]
        assert kept[b].nonzero()[:, 0].tolist() == sorted(expected.tolist())


def found(*rows: tuple[float, ...]) -> ImageDetections:
    """Rows of score, label and box."""
    table = np.array(rows, dtype=np.float32).reshape(-1, 6)
    return ImageDetections(table[:, 2:], table[:, 0], table[:, 1].astype(np.int64))


A, B, C = (0.9, 0, 0, 0, 9, 9), (0.5, 1, 2, 2, 8, 8), (0.5, 2, 20, 20, 30, 30)


def test_comparison_allows_equal_scores_in_any_order():
    assert compare(found(A, B, C), found(A, C, B), Tolerance(), 5) == (0, 0, None)
    assert compare(found(), found(), Tolerance(), 5) == (0, 0, None)


def test_comparison_measures_what_it_allows():
    near = (0.9005, 0, 0, 0, 9.05, 9)
    box, score, problem = compare(found(A, B), found(near, B), Tolerance(), 5)
    assert problem is None
    assert box == pytest.approx(0.05, abs=1e-5) and score == pytest.approx(5e-4, abs=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        (0.5, 0, 2, 2, 8, 8),  # label
        (0.502, 1, 2, 2, 8, 8),  # score
        (0.5, 1, 2, 2, 8, 8.2),  # box
    ],
)
def test_comparison_refuses_what_differs(other):
    _, _, problem = compare(found(A, B), found(A, other), Tolerance(), 5)
    assert "no equal, such as label 1, score 0.5000, box 2.00, 2.00, 8.00, 8.00" in problem


def test_comparison_refuses_missing_and_further_detections():
    assert "1 of PyTorch's" in compare(found(A, B), found(A), Tolerance(), 5)[2]
    assert "1 of onnxruntime's" in compare(found(A), found(A, B), Tolerance(), 5)[2]
    assert "not finite" in compare(found(A), found((np.nan, *A[1:])), Tolerance(), 5)[2]
    # Two equal detections need two partners.
    assert compare(found(A, A), found(A, B), Tolerance(), 5)[2]


def test_comparison_excuses_only_what_rounding_may_drop():
    # A full list: which of two equal scores comes last is chance; of the first it is not.
    assert compare(found(A, B), found(A, C), Tolerance(), 2)[2] is None
    assert compare(found(B, C), found(A, C), Tolerance(), 2)[2]
    thin = (0.7, 1, 0, 0, 0.1, 8)
    assert compare(found(A, thin), found(A), Tolerance(), 5)[2] is None


def test_pictures_have_the_size_and_are_reproducible(tmp_path):
    from PIL import Image

    first, again = (generated_pictures((64, 96)) for _ in range(2))
    assert len(first) == 6
    for name, picture in first.items():
        assert picture.shape == (64, 96, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, again[name])
    for i in range(3):
        Image.fromarray(first["random pixels 0"]).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    read = read_pictures(tmp_path, (32, 64), limit=2)
    assert list(read) == ["0.png", "1.png"] and read["0.png"].shape == (32, 64, 3)


def test_exporting_keeps_nothing_for_later_calls(monkeypatch):
    """Position embeddings are kept across calls, but not those of an export."""
    positions = FeaturePositions(dim=8)
    features = torch.zeros(1, 8, 11, 13)
    sizes = ImageSizes.from_hw([(11, 13)])

    class Wrapper(nn.Module):
        def forward(self, x):
            return x + positions(x, sizes)[0].sum()

    with torch.no_grad():
        program = torch.export.export(Wrapper(), (features,), strict=False)
        expected = Wrapper()(features)
    assert type(positions(features, sizes)[0]) is torch.Tensor
    torch.testing.assert_close(program.module()(features), expected)
