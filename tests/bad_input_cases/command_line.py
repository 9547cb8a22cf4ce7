"""Arguments of train_net.py that contradict each other or name missing files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from asag.cli import load_command

from .common import Case, Refused, expect


def cases(seed: int) -> list[Case]:
    """Returns all cases; the seed is not used."""
    return list(_rows())


def _printed(*words: str) -> Callable[[Path], str]:
    """Runs the command line, which must report an error: exit code 2 and a message on stderr."""

    def run(folder: Path) -> str:
        options = [word.replace("{folder}", str(folder)) for word in words]
        fixed = ["OUTPUT_DIR", str(folder / "out"), "MODEL.DEVICE", "cpu"]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = load_command("train_net.py").main(["--num-gpus", "0", *options, *fixed])
        expect(code == 2, f"the exit code is {code}: {errors.getvalue()}")
        raise Refused(errors.getvalue())

    return run


def _rows() -> Iterator[Case]:
    for name, words, says, remedy in (
        ("absent", ("--config-file", "absent.yaml"), "absent.yaml", "no such file"),
        ("a folder", ("--config-file", "{folder}"), "--config-file", "no such file"),
    ):
        yield _case("configuration file", name, words, says, remedy)
    for name, words, says, remedy in (
        ("absent", ("--data", "{folder}/absent"), "absent", "check the path"),
        ("empty", ("--data", "{folder}"), "no training annotations", "check the path"),
        ("twice", ("--data", "a", "--train-json", "b"), "--data DIR or --train-json", "not both"),
        ("no training", ("--val-json", "b"), "--val-json", "needs --train-json"),
        ("no evaluation", ("--train-json", "b"), "--train-json", "--evaluate-on-train"),
        ("nothing to divide", ("--val-fraction", "0.2"), "--val-fraction", "--data PATH"),
        (
            "divided and not divided",
            ("--train-json", "b", "--val-fraction", "0.2", "--evaluate-on-train"),
            "--val-fraction",
            "needs one of",
        ),
    ):
        yield _case("data", name, words, says, remedy)
    for name, words, says, remedy in (
        ("TRAIN", ("DATASETS.TRAIN", "('shapes_trian',)"), "shapes_trian", "did you mean"),
        ("TEST", ("--eval-only", "DATASETS.TEST", "()", "MODEL.WEIGHTS", ""), "TEST", "--data"),
        ("COCO", ("DATASETS.TRAIN", "('coco_2017_val',)"), "coco", "DETECTRON2_DATASETS"),
    ):
        yield _case("data set", name, words, says, remedy)
    for name, words, says, remedy in (
        ("absent", ("MODEL.WEIGHTS", "absent.pth"), "absent.pth", "no such file"),
        ("not named", ("--eval-only",), "--eval-only", "MODEL.WEIGHTS FILE"),
        ("nothing to resume", ("--eval-only", "--resume"), "--resume", "no checkpoint"),
    ):
        yield _case("weights", name, words, says, remedy)
    rank = ("--num-machines", "2", "--machine-rank", "2")
    yield _case("machines", "rank too high", rank, "--machine-rank 2", "a rank below")
    address = ("--num-machines", "2", "--machine-rank", "0")
    yield _case("machines", "no address", address, "--num-machines", "--dist-url tcp://")


def _case(title: str, name: str, words: tuple[str, ...], says: str, remedy: str) -> Case:
    happens = "names the argument and what is needed"
    return Case("command line", title, name, happens, _printed(*words), (says,), remedy)
