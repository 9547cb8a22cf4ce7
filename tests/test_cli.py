"""The console script: words of the command line, and the files behind them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from asag import cli

ROOT = Path(cli.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _path_and_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["asag"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_every_word_has_a_file_with_a_main():
    for file, _, _ in cli.COMMANDS.values():
        assert "\ndef main(" in (ROOT / file).read_text(encoding="utf-8"), file


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_usage(words, capsys):
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {word} " in text for word in cli.COMMANDS)


def test_unknown_words_are_named(capsys):
    assert cli.main(["detect"]) == 2
    assert "unknown command 'detect'" in capsys.readouterr().err


def test_words_and_arguments_are_handed_on(monkeypatch):
    calls = []

    def load(file):
        return SimpleNamespace(main=lambda: calls.append((file, sys.argv)) or 3)

    monkeypatch.setattr(cli, "load_command", load)
    assert cli.main(["eval", "--config-file", "x.yaml"]) == 3
    assert calls == [("train_net.py", ["asag eval", "--eval-only", "--config-file", "x.yaml"])]


def test_an_installed_package_has_copies(tmp_path, monkeypatch):
    (tmp_path / "asag_cli_probe.py").write_text("def main():\n    return 7\n")
    monkeypatch.setattr(cli, "INSTALLED", tmp_path)
    assert cli.load_command("nowhere/asag_cli_probe.py").main() == 7


def test_train_through_the_script_is_train_net(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    assert "--overfit-check" in capsys.readouterr().out
