"""Arguments of command lines that cannot mean anything are refused before any work."""

import pytest
from engine_support import CONFIG, register_tiny_shapes, tiny_options

from asag.engine.launch import main as train_net


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
