"""The numerical proof against reference tensors, and that it notices what is wrong."""

from pathlib import Path

import pytest
import torch
import verify

from conformance.runner import load_suites
from conformance.suites.common import Check, compare

IMPLEMENTED = sorted(load_suites())


@pytest.mark.parametrize("suite", IMPLEMENTED)
def test_reference_suite_passes(
    suite: str, golden_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = golden_dir / suite
    if not folder.is_dir():
        pytest.skip(f"no reference tensors for {suite}")
    assert verify.main([str(folder), "--quiet"]) == 0, capsys.readouterr().out


@pytest.fixture
def small_case(golden_dir: Path) -> dict:
    return torch.load(golden_dir / "sparse_rcnn/tiny_s2_onecls.pt", weights_only=True)


def _run(case: dict, folder: Path, name: str = "renamed.pt") -> int:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(case, folder / name)
    return verify.main([str(folder), "--quiet"])


def test_case_is_recognized_under_any_file_name(small_case: dict, tmp_path: Path) -> None:
    assert _run(small_case, tmp_path / "sparse_rcnn") == 0


@pytest.mark.parametrize(
    "key",
    [
        "init_proposal_boxes.weight",
        "head.head_series.0.self_attn.in_proj_weight",
        "head.head_series.0.inst_interact.norm1.bias",
        "head.head_series.1.linear2.weight",
        "head.head_series.1.bboxes_delta.bias",
    ],
)
def test_perturbed_weight_is_caught(
    key: str, small_case: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weight = small_case["weights"][key]
    weight.view(-1)[0] += 0.05 * weight.abs().max() + 0.05
    assert _run(small_case, tmp_path / "sparse_rcnn") == 1
    assert "FAIL" in capsys.readouterr().out


def test_missing_and_foreign_weights_are_caught(
    small_case: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small_case["weights"]["head.extra.weight"] = torch.zeros(1)
    assert _run(small_case, tmp_path / "sparse_rcnn") == 1
    assert "head.extra.weight" in capsys.readouterr().out


def test_unknown_cases_fail(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _run({"weights": {}}, tmp_path / "sparse_rcnn") == 1
    assert "UNKNOWN CASE" in capsys.readouterr().out
    assert _run({"weights": {}}, tmp_path / "no_such_suite") == 1
    assert "UNKNOWN CASE" in capsys.readouterr().out


def test_unreadable_file_fails_but_does_not_stop(
    small_case: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "sparse_rcnn"
    folder.mkdir()
    (folder / "broken.pt").write_bytes(b"not a tensor file")
    assert _run(small_case, folder) == 1
    out = capsys.readouterr().out
    assert "broken" in out and "ERROR" in out and "1 failed" in out


def test_empty_folder_fails(tmp_path: Path) -> None:
    assert verify.main([str(tmp_path)]) == 1


def test_float64_case_needs_its_sibling(golden_dir: Path, tmp_path: Path) -> None:
    case = torch.load(golden_dir / "sparse_rcnn/tiny_s3_f64.pt", weights_only=True)
    assert _run(case, tmp_path / "sparse_rcnn", "any_f64.pt") == 1
    sibling = torch.load(golden_dir / "sparse_rcnn/tiny_s3_f32.pt", weights_only=True)
    torch.save(sibling, tmp_path / "sparse_rcnn/any_f32.pt")
    assert verify.main([str(tmp_path), "--quiet"]) == 0


def test_compare_refuses_nan_and_other_shapes() -> None:
    assert not compare(Check("x", float("nan"), 0.0, 1.0))[1]
    assert not compare(Check("x", torch.zeros(2), torch.zeros(3), 1.0))[1]
    assert compare(Check("x", torch.ones(2), torch.ones(2) * 1.0005, 0.0, 1e-3))[1]
    assert not compare(Check("x", 1.1, 1.0, 0.05))[1]
