"""The study tool: what it refuses, plans, repeats and tabulates; scripts are replaced by fakes."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import study
import torch
import yaml
from analysis import stage_metrics
from detectron2.modeling import build_model
from engine_support import register_tiny_shapes, tiny_cfg, tiny_options

ROOT = Path(__file__).resolve().parents[2]

CONFIG = "configs/SparseRCNN/sparse_rcnn_tiny.yaml"
STUDY: dict[str, Any] = {
    "config": CONFIG,
    "seeds": [1, 2],
    "options": {"SOLVER.EPOCHS": 4},
    "variants": {"plain": None, "IoU-ESA + DCW": {"MODEL.DECODER.DCW": True}},
    "data": {
        "crowd": {"options": {"SOLVER.EPOCHS": 5, "DATASETS.TEST": "('a',)"}},
        "cells": {"folder": "datasets/cells"},
    },
    "per_stage": True,
}


def write(folder: Path, **changes: Any) -> Path:
    content = {k: v for k, v in (STUDY | changes).items() if v != "absent"}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class FakeScripts:
    """Stands for train_net.py and stage_metrics.py: writes what they would write."""

    def __init__(self, evaluated: bool = True, stages: int = 3) -> None:
        self.evaluated, self.stages = evaluated, stages
        self.calls: list[tuple[str, list[str]]] = []
        self.broken: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, script: str, arguments: list[str], log: Path) -> None:
        with self._lock:
            self.calls.append((script, arguments))
        options = dict(itertools.pairwise(arguments))
        folder = Path(options["OUTPUT_DIR"])
        if folder.parent.name in self.broken:
            raise RuntimeError(f"{script} failed; the end of {log}:\nCUDA is on fire")
        folder.mkdir(parents=True, exist_ok=True)
        ap = 10.0 * int(options["SEED"])
        if script == "train_net.py":
            records = [{"iteration": 9, "bbox/AP": 1.0, "total_loss": 3.0}]
            last = {"bbox/AP": ap, "bbox/AP50": 2 * ap} if self.evaluated else {}
            records.append({"iteration": 19, "total_loss": 2.0} | last)
            (folder / "metrics.json").write_text("".join(json.dumps(r) + "\n" for r in records))
            return
        first = self.stages if "--last-only" in arguments else 1
        found = [{"AP": ap + s} for s in range(first, self.stages + 1)]
        Path(options["--output"]).write_text(json.dumps(found))

    @property
    def trained(self) -> int:
        return sum(script == "train_net.py" for script, _ in self.calls)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> FakeScripts:
    fake = FakeScripts()
    monkeypatch.setattr(study, "run_script", fake)
    return fake


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, r"unknown keys \['sedes'\].*seeds"),
        ({"seeds": "absent"}, r"missing or empty keys \['seeds'\]"),
        ({"variants": {}}, r"missing or empty keys \['variants'\]"),
        ({"config": "configs/none.yaml"}, r"configs/none.yaml does not exist"),
        ({"variants": {"own": {"config": "no.yaml"}}}, r"config no.yaml does not exist"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study.read_study(write(tmp_path, **changes))


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="expected keys and values"):
        study.read_study(tmp_path / "empty.yaml")


def test_plan_of_all_runs(tmp_path: Path) -> None:
    runs = study.plan_runs(study.read_study(write(tmp_path)), tmp_path)
    assert [r.seed for r in runs] == [1] * 4 + [2] * 4, "an early stop compares all variants"
    assert {(r.data, r.variant) for r in runs[:4]} == {
        (d, v) for d in ("crowd", "cells") for v in STUDY["variants"]
    }
    assert len({r.folder for r in runs}) == 8
    chosen = next(r for r in runs if (r.data, r.variant, r.seed) == ("crowd", "IoU-ESA + DCW", 2))
    assert chosen.folder == tmp_path / "crowd" / "IoU-ESA_+_DCW" / "seed2"
    words = list(chosen.command)
    assert words[:2] == ["--config-file", str(ROOT / CONFIG)]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options == {
        "SOLVER.EPOCHS": "5",  # the data set's over the study's
        "DATASETS.TEST": "('a',)",
        "MODEL.DECODER.DCW": "True",
        "SEED": "2",
        "OUTPUT_DIR": str(chosen.folder),
    }
    cells = next(r for r in runs if r.data == "cells")
    assert cells.command[2:4] == ("--data", str(ROOT / "datasets/cells"))
    assert "4" in cells.command


def test_a_variant_may_start_from_its_own_configuration(tmp_path: Path) -> None:
    own = "configs/ASAG/asag_tiny.yaml"
    variants = {"plain": None, "ASAG": {"config": own, "MODEL.DECODER.NUM_AUXILIARY": 2}}
    runs = study.plan_runs(study.read_study(write(tmp_path, variants=variants)), tmp_path)
    for run in runs:
        expected = own if run.variant == "ASAG" else CONFIG
        assert run.command[:2] == ("--config-file", str(ROOT / expected))
        assert ("MODEL.DECODER.NUM_AUXILIARY" in run.command) == (run.variant == "ASAG")
        assert "config" not in run.command


def test_finished_runs_are_not_repeated(tmp_path: Path, scripts: FakeScripts) -> None:
    command = [str(write(tmp_path)), "--output", str(tmp_path / "out")]
    assert study.main([*command, "--seeds", "1"]) == 0
    assert scripts.trained == 4
    assert all("--resume" in a for script, a in scripts.calls if script == "train_net.py")
    done = tmp_path / "out/crowd/plain/seed1/result.json"
    before = done.stat().st_mtime_ns
    (tmp_path / "out/cells/plain/seed1/result.json").unlink()
    assert study.main(command) == 0
    assert scripts.trained == 4 + 1 + 4
    assert done.stat().st_mtime_ns == before
    assert study.main([*command, "--table-only"]) == 0
    assert scripts.trained == 9


def test_table_and_results(
    tmp_path: Path, scripts: FakeScripts, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out"
    assert study.main([str(write(tmp_path)), "--output", str(output), "--jobs", "3"]) == 0
    table = (output / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = table.splitlines()
    assert "| crowd | seeds | AP | AP50 |" in rows  # no AP75 was measured
    assert "| plain | 2 | 15.0 ± 7.1 | 30.0 ± 14.1 |" in rows
    assert "| crowd, AP by stage | stage 1 | stage 2 | stage 3 |" in rows
    assert "| IoU-ESA + DCW | 16.0 ± 7.1 | 17.0 ± 7.1 | 18.0 ± 7.1 |" in rows
    results = json.loads((output / "results.json").read_text())
    assert results["cells"]["plain"]["2"] == {
        "metrics": {"AP": 20.0, "AP50": 40.0},
        "per_stage": [{"AP": 21.0}, {"AP": 22.0}, {"AP": 23.0}],
    }


def test_spread_of_one_seed_is_unknown() -> None:
    assert study.summarize([3.0]) == "3.0"
    assert study.summarize([1.0, 3.0]) == f"2.0 ± {math.sqrt(2):.1f}"


def test_runs_without_stages_are_left_out_of_their_table(
    tmp_path: Path, scripts: FakeScripts
) -> None:
    runs = study.plan_runs(study.read_study(write(tmp_path)), tmp_path)
    for run in runs:
        study.execute(run, per_stage=run.variant == "plain")
    table = study.tabulate(runs, ["AP"])[1].splitlines()
    at = table.index("| cells, AP by stage | stage 1 | stage 2 | stage 3 |")
    assert table[at + 2].startswith("| plain |") and table[at + 3] == ""


@pytest.mark.parametrize("per_stage", [True, False])
def test_a_run_that_broke_off_before_its_evaluation_is_evaluated(
    tmp_path: Path, scripts: FakeScripts, per_stage: bool
) -> None:
    scripts.evaluated = False
    (run, *_) = study.plan_runs(study.read_study(write(tmp_path)), tmp_path)
    study.execute(run, per_stage)
    result = json.loads(run.result_file.read_text())
    assert result["metrics"] == {"AP": 13.0}, "not that of an earlier iteration"
    assert ("per_stage" in result) == per_stage
    script, arguments = scripts.calls[-1]
    assert script == "tools/analysis/stage_metrics.py" and ("--last-only" in arguments) != per_stage
    assert arguments[-2:] == ["MODEL.WEIGHTS", str(run.folder / "model_final.pth")]


def test_a_failure_is_told_and_does_not_stop_the_others(
    tmp_path: Path, scripts: FakeScripts, capsys: pytest.CaptureFixture
) -> None:
    scripts.broken = {"plain"}
    command = [str(write(tmp_path)), "--output", str(tmp_path / "out"), "--jobs", "1"]
    assert study.main(command) == 1
    assert scripts.trained == 8
    out, err = capsys.readouterr()
    assert err.count("CUDA is on fire") == 4 and "crowd plain seed 2" in err
    assert "| IoU-ESA + DCW | 2 |" in out and "| plain |" not in out
    scripts.broken = set()
    assert study.main(command) == 0
    assert scripts.trained == 12


def test_end_of_the_log_explains_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], stdout: Any, stderr: Any, env: dict, cwd: Path) -> Any:
        assert command[1:] == [str(ROOT / "train_net.py"), "--resume"] and cwd == ROOT
        assert env["OMP_NUM_THREADS"] == "1"
        stdout.write("early\n" + "noise\n" * 20 + "error: no such file\n")
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(study.subprocess, "run", fail)
    log = tmp_path / "run" / "study.log"
    with pytest.raises(RuntimeError, match="no such file") as caught:
        study.run_script("train_net.py", ["--resume"], log)
    assert str(log) in str(caught.value) and "early" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "plane"], r"no variant ['plane']"),
        (["--data", "crowds"], r"no data ['crowds']"),
        (["--seeds", "7"], "no seed [7]; it has [1, 2]"),
    ],
)
def test_unknown_choices_are_listed(
    tmp_path: Path,
    scripts: FakeScripts,
    capsys: pytest.CaptureFixture,
    arguments: list,
    message: str,
) -> None:
    assert study.main([str(write(tmp_path)), "--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert scripts.calls == []


def saved_detector(folder: Path) -> tuple[torch.nn.Module, list[str]]:
    """A detector of two stages in a file, and the words that evaluate it."""
    register_tiny_shapes()
    torch.manual_seed(0)
    model = build_model(tiny_cfg(folder))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    test = {"DATASETS__TEST": "('engine_shapes_val',)", "MODEL__WEIGHTS": folder / "model.pth"}
    return model, [
        *("--num-gpus", "0", "--config-file", str(ROOT / CONFIG)),
        *tiny_options(folder, **test),
    ]


def test_detectors_are_cut_off_after_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, words = saved_detector(tmp_path)

    def test(cfg: Any, model: torch.nn.Module) -> dict[str, Any]:
        state, kept = whole.state_dict(), model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in kept.items())
        return {"bbox": {"AP": float(len(model.roi_heads.stages)), "APl": math.nan}}

    monkeypatch.setattr(stage_metrics.Trainer, "test", test)
    assert stage_metrics.stage_metrics(words) == [{"AP": 1.0}, {"AP": 2.0}]


def test_metrics_of_the_whole_detector(tmp_path: Path) -> None:
    model, words = saved_detector(tmp_path)
    output = tmp_path / "found" / "last.json"
    assert stage_metrics.main(["--output", str(output), "--last-only", *words]) == 0
    (last,) = json.loads(output.read_text())
    assert set(last) >= {"AP", "AP50", "AP75", "AP-circle"}
    results = stage_metrics.Trainer.test(
        tiny_cfg(tmp_path, DATASETS__TEST="('engine_shapes_val',)"), model
    )
    assert last["AP50"] == pytest.approx(results["bbox"]["AP50"])


def test_stages_need_weights_and_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--output", str(tmp_path / "x.json"), "--config-file", str(ROOT / CONFIG)]
    assert stage_metrics.main([*command, *tiny_options(tmp_path, MODEL__WEIGHTS="no.pth")]) == 2
    assert "MODEL.WEIGHTS = 'no.pth'" in capsys.readouterr().err
    register_tiny_shapes()
    torch.save({}, tmp_path / "x.pth")
    options = tiny_options(tmp_path, MODEL__WEIGHTS=tmp_path / "x.pth")
    assert stage_metrics.main([*command, *options]) == 2
    assert "DATASETS.TEST is empty" in capsys.readouterr().err
