"""The conversion tool: every layout there and back, bit by bit; what it refuses and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import torch
from detectron2.modeling import build_model
from safetensors import safe_open
from torch import Tensor

from asag import load_config
from asag.checkpoint.layouts import LAYOUTS, OURS, ConversionError, convert, recognize
from asag.checkpoint.reading import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NARROW: list[Any] = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 4),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
    *("MODEL.ENCODER.NUM_LAYERS", 1),
    *("MODEL.DECODER.NUM_STAGES", 2),
    *("MODEL.DECODER.HIDDEN_DIM", 16),
    *("MODEL.DECODER.NUM_HEADS", 2),
    *("MODEL.DECODER.FFN_DIM", 24),
    *("MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", 7),
]
DETR = ("configs/DETR/detr_r50_50ep.yaml", NARROW)
CONDITIONAL = ("configs/ConditionalDETR/conditional_detr_r50_50ep.yaml", NARROW)
CONTENT: dict[str, tuple[str, list[Any]]] = {
    "authors-sparse-rcnn": ("configs/SparseRCNN/sparse_rcnn_tiny.yaml", []),
    "authors-iou-sparse-rcnn": (
        "configs/IoUEnhancedSparseRCNN/iou_sparse_rcnn_tiny.yaml",
        [],
    ),
    "authors-detr": DETR,
    "authors-conditional-detr": CONDITIONAL,
    "authors-asag-a": ("configs/ASAG/asag_a_r50_100_1x.yaml", []),
    "authors-asag-s": ("configs/ASAG/asag_s_r50_100_1x.yaml", []),
    "mmdet-sparse-rcnn": (
        "configs/SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml",
        ["MODEL.DECODER.NUM_STAGES", 2],
    ),
    "mmdet-detr": DETR,
    "mmdet-conditional-detr": CONDITIONAL,
    "detrex-detr": DETR,
    "detrex-conditional-detr": CONDITIONAL,
    "transformers-detr": DETR,
    "transformers-detr-resnet": DETR,
    "transformers-conditional-detr": CONDITIONAL,
    "transformers-conditional-detr-resnet": CONDITIONAL,
    OURS: DETR,
}
LAYOUT_OF_DETR = "transformers-detr"


def weights(config: str, options: list[Any]) -> dict[str, Tensor]:
    """Random weights of a model, of a few dtypes."""
    cfg = load_config(str(ROOT / config), [str(x) for x in ("MODEL.DEVICE", "meta", *options)])
    with torch.device("meta"):
        names = build_model(cfg).state_dict()
    torch.manual_seed(0)
    # Full-size matrices shrink to what packing needs: a few rows.
    state = {k: torch.randn([min(n, 24) for n in v.shape]) for k, v in names.items()}
    some = next(k for k in state if k.endswith("norm.weight"))
    return state | {some: state[some].half()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def run(*arguments: object) -> int:
    return convert_checkpoint.main([str(x) for x in arguments])


def test_every_layout_is_covered() -> None:
    assert CONTENT.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same(layout: str, suffix: str, tmp_path: Path) -> None:
    state = weights(*CONTENT[layout])
    ours, there, back = tmp_path / "a.pth", tmp_path / f"b{suffix}", tmp_path / f"c{suffix}"
    torch.save({"model": state, "class_names": ["ring", "disc"], "iteration": 7}, ours)
    assert run(ours, there, "--to", layout) == 0
    assert run(there, back, "--to", OURS) == 0
    foreign = read_checkpoint(there)
    assert recognize(foreign["model"]) == layout
    assert layout == OURS or not foreign["model"].keys() & {"roi_heads.class_logits.weight"}
    wanted = {k: v for k, v in state.items() if k not in LAYOUTS[layout].ours_only}
    assert len(state) - len(wanted) == layout.startswith(
        "authors-asag"
    )  # how far its warm-up has come
    assert equal(read_checkpoint(back)["model"], wanted)
    again, source, left_out = convert(foreign["model"], layout)
    assert source == layout and not left_out and equal(again, foreign["model"])
    flat = layout.startswith("transformers") and suffix != ".safetensors"
    assert foreign.get("class_names") == (None if flat else ["ring", "disc"])
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted({"a.pth", there.name, back.name})


def test_between_two_foreign_layouts(tmp_path: Path) -> None:
    state = LAYOUTS["authors-conditional-detr"].to_theirs(weights(*CONDITIONAL))
    torch.save({"model": state}, tmp_path / "a.pth")
    target = "transformers-conditional-detr"
    assert run(tmp_path / "a.pth", tmp_path / "b.safetensors", "--to", target) == 0
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"  # transformers insists on it
        q = file.get_tensor("model.encoder.layers.0.self_attn.q_proj.weight")
    packed = state["transformer.encoder.layers.0.self_attn.in_proj_weight"]
    assert torch.equal(q, packed[: len(packed) // 3])
    assert (
        run(tmp_path / "b.safetensors", tmp_path / "c.pth", "--to", "authors-conditional-detr") == 0
    )
    assert equal(read_checkpoint(tmp_path / "c.pth")["model"], state)


def test_slices_bring_only_themselves(tmp_path: Path) -> None:
    torch.save(weights(*DETR), tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b.bin", "--to", LAYOUT_OF_DETR) == 0
    loaded = torch.load(tmp_path / "b.bin", weights_only=True)
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in loaded.values())


def test_the_average_is_what_is_converted(tmp_path: Path) -> None:
    state = weights(*DETR)
    average = {k: v + 1 for k, v in state.items()}
    torch.save({"model": state, "ema": average}, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b.pth", "--to", OURS) == 0
    assert equal(read_checkpoint(tmp_path / "b.pth")["model"], average)


def test_leftovers_are_refused_or_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights(*DETR)
    torch.save(state | {"mask_head.weight": torch.ones(1)}, tmp_path / "a.pth")
    arguments = tmp_path / "a.pth", tmp_path / "b.pth", "--to", "authors-detr"
    assert run(*arguments) == 2 and not (tmp_path / "b.pth").exists()
    error = capsys.readouterr().err
    assert "1 of" in error and "mask_head.weight" in error and "--partial" in error
    assert run(*arguments, "--partial") == 0
    assert "left out: mask_head.weight" in capsys.readouterr().out
    kept = read_checkpoint(tmp_path / "b.pth")["model"]
    assert equal(LAYOUTS["authors-detr"].to_ours(kept), state)


def test_other_models_than_the_layouts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(weights(*CONDITIONAL), tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b.pth", "--to", LAYOUT_OF_DETR) == 2
    assert "no place in the layout 'transformers-detr'" in capsys.readouterr().err
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b.pth", "--to", OURS) == 2
    error = capsys.readouterr().err
    assert "no known layout has names like fc.weight" in error and LAYOUT_OF_DETR in error


def test_incomplete_matrices_are_refused() -> None:
    state, _, _ = convert(weights(*DETR), LAYOUT_OF_DETR)
    del state["model.encoder.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ConversionError, match=r"incomplete: .*in_proj\.weight lacks slice.*\[1\]"):
        convert(state, OURS, partial=True)


@pytest.mark.parametrize(
    ("given", "wanted", "issue"),
    [("absent.pth", "b.pth", "absent.pth"), ("a.pth", "b.pkl", r"'.pkl' names no format")],
)
def test_bad_paths(
    given: str, wanted: str, issue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(weights(*DETR), tmp_path / "a.pth")
    assert run(tmp_path / given, tmp_path / wanted, "--to", OURS) == 2
    assert issue in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["authors-asag-a", OURS])
def test_one_of_parallel_heads_is_kept(layout: str, tmp_path: Path) -> None:
    config, options = CONTENT["authors-asag-a"]
    ours = weights(config, options)
    foreign = LAYOUTS["authors-asag-a"].to_theirs(ours)
    torch.save({"model": foreign}, tmp_path / "four.pth")
    assert run(tmp_path / "four.pth", tmp_path / "one.pth", "--to", layout, "--keep-copy", 2) == 0
    kept = torch.load(tmp_path / "one.pth", weights_only=True)["model"]
    kept = LAYOUTS[layout].to_ours(kept)
    deployed = weights(config, [*options, "MODEL.DECODER.NUM_AUXILIARY", 0])
    assert kept.keys() == deployed.keys() - {"proposal_generator.steps"}
    assert torch.equal(kept["roi_heads.embedding"], ours["roi_heads.embedding"][2:3])
    for name, value in kept.items():
        if name != "roi_heads.embedding":
            origin = name.replace("roi_heads.stages.0.", "roi_heads.stages.2.")
            assert torch.equal(value, ours[origin]), name


@pytest.mark.parametrize(
    ("layout", "copy", "message"),
    [("authors-asag-a", 4, "no copy 4; these weights have 4 (0 to 3)"), (OURS, 0, "no copies of")],
)
def test_heads_that_are_not_there_cannot_be_kept(
    layout: str, copy: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": weights(*CONTENT[layout])}, tmp_path / "x.pth")
    target = tmp_path / "y.pth"
    assert run(tmp_path / "x.pth", target, "--to", OURS, "--keep-copy", copy) == 2
    assert message in capsys.readouterr().err and not target.exists()


def test_unknown_layouts_are_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("a", "b", "--to", "mmdet")
    assert LAYOUT_OF_DETR in capsys.readouterr().err
    with pytest.raises(ValueError, match="no layout 'mmdet'; choose one of authors-"):
        convert({}, "mmdet")
    with pytest.raises(SystemExit):
        run("--help")
    listing = capsys.readouterr().out
    assert all(layout in listing for layout in LAYOUTS)


def test_a_crash_while_writing_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(weights(*DETR), tmp_path / "a.pth")
    (tmp_path / "b.pth").write_text("older")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert run(tmp_path / "a.pth", tmp_path / "b.pth", "--to", OURS) == 2
    assert "no space left" in capsys.readouterr().err
    assert (tmp_path / "b.pth").read_text() == "older"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.pth", "b.pth"]
