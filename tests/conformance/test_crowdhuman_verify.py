"""The verification suite of the CrowdHuman metrics: passes, fails and refuses where it should."""

import json

import pytest

from conformance.suites import crowdhuman as suite
from conformance.suites.common import UnknownCase, compare

CASE = {
    "ground_truth": {
        "images": [{"id": 1, "width": 50, "height": 50}],
        "annotations": [
            {"image_id": 1, "bbox": [0, 0, 10, 10], "iscrowd": 0},
            {"image_id": 1, "bbox": [20, 20, 10, 10], "iscrowd": 0},
        ],
    },
    "results": [
        {"image_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "bbox": [20, 20, 10, 10], "score": 0.8},
    ],
    "expected": {"AP": 0.5, "mMR": 1e-10, "Recall": 1.0, "real_boxes": 2},
}


def outcome(path):
    return {check.name: compare(check)[1] for check in suite.verify(path)}


def write(path, case):
    path.write_text(json.dumps(case))
    return path


def test_right_figures_pass_under_any_name(tmp_path):
    path = write(tmp_path / "whatever", CASE)
    expected = {"AP": True, "mMR": True, "Recall": True, "real_boxes": True}
    assert outcome(path) == expected


@pytest.mark.parametrize("key", ["AP", "mMR", "Recall", "real_boxes"])
def test_wrong_figure_fails(tmp_path, key):
    wrong = CASE | {"expected": CASE["expected"] | {key: 0.7}}
    result = outcome(write(tmp_path / "a.json", wrong))
    assert [name for name, passed in result.items() if not passed] == [key]


@pytest.mark.parametrize("content", ["not json", "[]", "{}", json.dumps(CASE | {"expected": {}})])
def test_other_files_are_unknown_cases(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UnknownCase, match=r"a\.json"):
        list(suite.verify(path))


def test_golden_folder(golden_dir):
    files = sorted((golden_dir / "crowdhuman").glob("*.json"))
    assert files
    for path in files:
        assert all(outcome(path).values()), path.name
