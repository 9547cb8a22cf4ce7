"""Arguments of command lines that cannot mean anything are refused before any work."""

import pytest
from engine_support import CONFIG, register_tiny_shapes, tiny_options

from asag.data import SampleError
from asag.engine import NonFiniteLossError
from asag.engine.memory import NotEnoughMemoryError
from train_net import main as train_net


def test_bad_inputs_of_an_unknown_kind(monkeypatch, capsys):
    import bad_inputs

    monkeypatch.setattr("sys.argv", ["bad_inputs.py", "--only", "imagse"])
    with pytest.raises(SystemExit) as caught:
        bad_inputs.main()
    assert caught.value.code == 2
    assert "imagse" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["A", "--json", "gone/out.json"], "gone"),
        (["A@FOO"], "FOO"),
        (["A@NO.SUCH=1"], "NO.SUCH"),
    ],
)
def test_benchmark_refuses_before_it_measures(monkeypatch, capsys, arguments, named):
    import benchmark

    monkeypatch.setattr(benchmark, "measure_arms", lambda *_: pytest.fail("it has measured"))
    arguments = [x.replace("A", str(CONFIG), x.startswith("A")) for x in arguments]
    assert benchmark.main([*arguments, "--size", "64x80", "--device", "cpu"]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_overfit_check_of_no_steps(steps, capsys):
    with pytest.raises(SystemExit) as caught:
        train_net(["--overfit-check", "--overfit-steps", steps])
    assert caught.value.code == 2
    assert "--overfit-steps" in capsys.readouterr().err


def test_overfit_check_from_weights_that_are_not_there(tmp_path, capsys):
    register_tiny_shapes()
    options = tiny_options(tmp_path, MODEL__WEIGHTS=tmp_path / "gone.pth")
    arguments = ["--config-file", str(CONFIG), "--num-gpus", "0", "--overfit-check", *options]
    assert train_net(arguments) == 2
    assert "gone.pth" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [NonFiniteLossError, NotEnoughMemoryError, SampleError])
def test_profile_that_fails_says_why_without_a_traceback(monkeypatch, capsys, kind):
    import benchmark

    def fail(*_, **__):
        raise kind("the step cannot be taken")

    monkeypatch.setattr(benchmark, "profile_steps", fail)
    assert benchmark.main([str(CONFIG), "--profile", "--device", "cpu"]) == 2
    assert "the step cannot be taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "mark", "expected"),
    [
        (("model_final.pth", "model_0000009.pth"), "model_final.pth", "model_final.pth"),
        (("model_final.pth", "model_0000009.pth"), "model_0000009.pth", "model_0000009.pth"),
        (("model_0000009.pth",), "model_final.pth", "model_0000009.pth"),
        (("model_final.pth", "model_0000009.pth"), None, "model_final.pth"),
        (("model_best.pth",), None, "model_best.pth"),
    ],
)
def test_report_takes_the_latest_weights(tmp_path, files, mark, expected):
    """A run that was prolonged and interrupted has a final checkpoint of before."""
    import report

    for name in files:
        (tmp_path / name).touch()
    if mark:
        (tmp_path / "last_checkpoint").write_text(mark)
    assert report.weights_file(tmp_path) == tmp_path / expected


def test_report_without_weights(tmp_path):
    import report

    assert report.weights_file(tmp_path) is None
