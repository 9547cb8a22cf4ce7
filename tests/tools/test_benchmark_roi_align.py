"""The comparison of pooling methods: they pool the same, and every phase is timed."""

from __future__ import annotations

import json

import benchmark_roi_align as bench
import pytest
import torch

SMALL = ["--images", "2", "--size", "256x320", "--queries", "8", "--stages", "2", "--channels", "4"]
SMALL += ["--resolution", "3", "--rounds", "2", "--device", "cpu"]


def test_whole_run(capsys, tmp_path):
    path = tmp_path / "out.json"
    assert bench.main([*SMALL, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 images of 256x320, 8 boxes each, 2 stages" in printed
    result = json.loads(path.read_text())
    assert list(result["arms"]) == ["gather", "kernel", "loop"]
    for arm in result["arms"].values():
        assert arm["largest_difference"] < 1e-5
        for times in (arm["median_ms"], arm["fastest_ms"]):
            assert all(times[phase] > 0 for phase in bench.PHASES)
        assert arm["fastest_ms"]["total"] <= arm["median_ms"]["total"]


def test_all_methods_send_back_the_same_gradient():
    args = bench.parse(SMALL)
    maps, stages, gradient = bench.make_scene(args)
    levels = bench.PyramidRoIAlign(strides=bench.STRIDES).assign_levels(torch.stack(stages))
    assert len(stages) == 2 and not torch.equal(*stages) and len(levels.unique()) > 1
    found = {
        name: bench.measure_once(pool, maps, stages, gradient)[1]
        for name, pool in bench.arms(3, 2).items()
    }
    assert any(x.abs().sum() > 0 for x in found["loop"])
    for name in ("gather", "kernel"):
        for a, b in zip(found[name], found["loop"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_method_that_pools_something_else_shows(monkeypatch):
    args = bench.parse(SMALL)
    honest = bench.arms

    def wrong(*settings):
        pools = honest(*settings)
        gather = pools["gather"]
        return pools | {"gather": lambda maps, stages: [x + 1 for x in gather(maps, stages)]}

    monkeypatch.setattr(bench, "arms", wrong)
    result = bench.measure(args)
    assert result["arms"]["gather"]["largest_difference"] == pytest.approx(1, abs=1e-4)
    assert "1.0e+00" in bench.render(result)
