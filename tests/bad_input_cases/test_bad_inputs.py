"""Every malformed input ends as declared, and the battery would notice if one did not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from asag.data import DatasetError, read_image
from asag.data.coco_json import load_json
from bad_input_cases import common
from bad_input_cases.battery import SUITES, all_cases, failures, markdown, summary
from bad_input_cases.common import Case, WrongResult, judge

TABLE = Path(__file__).resolve().parents[2] / "docs" / "bad_inputs.md"


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__.rpartition(".")[2])
def test_every_case_ends_as_declared(suite):
    assert failures(suite.cases(0)) == []


def test_the_table_of_the_documentation_is_in_step():
    cases = all_cases()
    assert len(cases) >= 200
    assert TABLE.read_text() == markdown(cases), "run tools/bad_inputs.py --markdown"
    assert summary(cases).splitlines()[-1].split()[-1] == str(len(cases))


def test_another_seed_changes_places_only():
    assert markdown(all_cases(1)) == markdown(all_cases(0))


def case(run, remedy=None, says=()) -> Case:
    return Case("kind", "title", "name", "happens", run, says, remedy)


def absent_json(folder: Path) -> str:
    load_json(folder / "absent.json")
    return ""


def absent_image(folder: Path) -> str:
    read_image(str(folder / "absent.png"), "RGB")
    return ""


def wrong(folder: Path) -> str:
    raise WrongResult("two boxes are lost")


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        (case(lambda folder: "as told", says=("told",)), None),
        (case(lambda folder: "as told", says=("counted",)), "does not say ['counted']"),
        (case(lambda folder: "", remedy="fix it"), "was accepted"),
        (case(wrong), "wrongly: two boxes are lost"),
        (case(absent_json), "was refused: DatasetError"),
        (case(absent_json, "check the path", ("absent.json",)), None),
        (case(absent_image, "check the image folder", ("absent.png",)), None),
        (case(absent_json, "buy a new one", ("absent.json",)), "does not say ['buy a new one']"),
        (case(lambda folder: [][1], "fix it"), "ended in IndexError"),
        (case(lambda folder: int("x"), "base 10"), "ended in an error of"),
    ],
)
def test_judgment(tmp_path, declared, problem):
    found = judge(declared, tmp_path)
    assert (found is None) == (problem is None)
    assert problem is None or problem in found


def test_hanging_is_noticed(tmp_path, monkeypatch):
    def hang(folder: Path) -> str:
        try:
            time.sleep(30)
        except Exception:  # code under test must not be able to catch it
            return ""
        return ""

    monkeypatch.setattr(common, "TIMEOUT", 0.05)
    assert "did not end" in judge(case(hang), tmp_path)


def test_failures_name_the_case():
    (problem,) = failures([case(wrong)])
    assert problem.startswith("kind: title (name) was taken, but wrongly")
    assert failures([case(absent_json, DatasetError.__name__)]) != []
