"""train_net.py from its arguments to files on disk, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_support import CONFIG, register_tiny_shapes, tiny_options, write_coco_folder

from asag import load_config
from asag.config import find_config
from asag.data.shapes import ANNOTATION_FILE
from asag.engine.defaults import configure
from train_net import build_parser, main

ROOT = Path(__file__).resolve().parents[2]


def arguments(output_dir: Path, *flags: str, **changes) -> list[str]:
    changes = {"DATASETS__TEST": "('engine_shapes_val',)", "TEST__NUM_PICTURES": 2} | changes
    return ["--config-file", str(CONFIG), *flags, *tiny_options(output_dir, **changes)]


def issue(capsys, argv: list[str]) -> str:
    """Returns the error that main printed on stderr."""
    assert main(argv) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert sum("error: " in line for line in message) == 1
    assert not any("Traceback" in line for line in message)
    return "\n".join(message)


def box_ap(log: str) -> str:
    """The AP that the last line of a log reports."""
    return re.search(r"done: box AP (\d+\.\d+)", log.splitlines()[-1]).group(1)


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory) -> Path:
    return write_coco_folder(tmp_path_factory.mktemp("mine"))


def test_training_then_evaluation(tmp_path):
    register_tiny_shapes()
    assert main(arguments(tmp_path)) == 0
    log = (tmp_path / "log.txt").read_text()
    assert "schedule: 12 images, batch 4, 4 iterations" in log
    done = log.splitlines()[-1]
    assert "done: box AP " in done
    for place in ("model_final.pth", "model_best.pth", "metrics.json", "pictures"):
        assert f"{tmp_path}/{place}" in done
        assert (tmp_path / place).exists()
    assert (tmp_path / "config.yaml").is_file() and (tmp_path / "environment.txt").is_file()

    weights = tmp_path / "model_final.pth"
    assert main(arguments(tmp_path / "eval", "--eval-only", MODEL__WEIGHTS=weights)) == 0
    log = (tmp_path / "eval/log.txt").read_text()
    assert box_ap(log) == box_ap(done)
    assert (tmp_path / "eval/inference/coco_instances_results.json").is_file()
    assert not (tmp_path / "eval/metrics.json").exists()
    assert main(arguments(tmp_path, "--eval-only", "--resume")) == 0
    assert box_ap((tmp_path / "log.txt").read_text()) == box_ap(done)

    assert main(arguments(tmp_path, "--resume")) == 0
    assert "nothing left to train: 4 of 4 iterations" in (tmp_path / "log.txt").read_text()


def test_part_of_a_detector_is_not_evaluated(tmp_path, capsys):
    register_tiny_shapes()
    assert main(arguments(tmp_path, SOLVER__MAX_ITER=1)) == 0
    state = torch.load(tmp_path / "model_final.pth")["model"]
    backbone = {k: v for k, v in state.items() if k.startswith("backbone.")}
    more = state | {k: v.repeat(3) for k, v in state.items() if "class_logits.bias" in k}
    for name, weights, expected in (
        ("backbone", backbone, "parameters are not in the file"),
        ("more", more, r"is \(6,\) in the file, \(2,\) in the model"),
    ):
        path = tmp_path / f"{name}.pth"
        torch.save({"model": weights}, path)
        message = issue(capsys, arguments(tmp_path / name, "--eval-only", MODEL__WEIGHTS=path))
        assert str(path) in message and re.search(expected, message), message


def test_augmented_evaluation(tmp_path):
    """One copy of the tested size changes no number; flips and further sizes see other pictures."""
    register_tiny_shapes()
    sizes = {"TEST__AUG__ENABLED": True, "TEST__AUG__MAX_SIZE": 200, "TEST__AUG__MERGE_IOU": 1.0}
    one = sizes | {"TEST__AUG__MIN_SIZES": "(64,)", "TEST__AUG__FLIP": False}
    # Weights that have learned a little: all equal scores would hide what is compared.
    training = one | {"SOLVER__MAX_ITER": 2}
    assert main(arguments(tmp_path, **training)) == 0
    log = (tmp_path / "log.txt").read_text()
    assert log.splitlines()[-1].count("box AP") == 2, "plain and augmented, after training too"

    weights = {"MODEL__WEIGHTS": tmp_path / "model_final.pth"}
    assert main(arguments(tmp_path / "one", "--eval-only", **one, **weights)) == 0
    plain, augmented = detections(tmp_path / "one")
    assert len(plain) == len(augmented) > 0
    for a, b in zip(plain, augmented, strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert [a["score"], *a["bbox"]] == pytest.approx([b["score"], *b["bbox"]], abs=1e-2)
    line = (tmp_path / "one/log.txt").read_text().splitlines()[-1]
    assert len(set(re.findall(r"box AP (\d+\.\d+)", line))) == 1

    several = sizes | {"TEST__AUG__MIN_SIZES": "(48, 96)", "TEST__AUG__MERGE": "vote"}
    assert main(arguments(tmp_path / "two", "--eval-only", **several, **weights)) == 0
    again, augmented = detections(tmp_path / "two")
    assert again == plain and augmented and augmented != plain


def detections(folder: Path) -> list[list[dict]]:
    """Results that an evaluation wrote without and with augmentation, in one order."""
    return [
        sorted(
            json.loads((folder / name / "coco_instances_results.json").read_text()),
            key=lambda x: (x["image_id"], -x["score"], x["category_id"]),
        )
        for name in ("inference", "inference_TTA")
    ]


def test_own_data_in_one_argument(tmp_path, coco_folder, capsys):
    argv = arguments(tmp_path, "--data", str(coco_folder), MODEL__ROI_HEADS__NUM_CLASSES=80)
    argv += ["MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", "2", "TEST.DETECTIONS_PER_IMAGE", "2"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "12 images" in printed, "the report is printed"
    assert "estimate before the start: " in (tmp_path / "log.txt").read_text()
    assert "an image has 3 boxes, but there are 2 queries" in printed
    assert "an image has 3 boxes, but only the 2 best detections" in printed
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["class_names"] == ["circle", "square"]
    results = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert {r["image_id"] for r in results} == set(range(1, 7))


def test_own_data_by_file(tmp_path, coco_folder, capsys):
    argv = [
        "--config-file",
        str(CONFIG),
        "--train-json",
        str(coco_folder / "train" / ANNOTATION_FILE),
    ]
    options = tiny_options(tmp_path)
    assert "--evaluate-on-train" in issue(capsys, [*argv, *options])
    val = ["--val-json", str(coco_folder / "val" / ANNOTATION_FILE)]
    val += ["--val-images", str(coco_folder / "val")]
    assert main([*argv, *val, *options]) == 0
    both = issue(capsys, [*argv, "--data", str(coco_folder), *options])
    assert "not both" in both
    assert "--train-json" in issue(capsys, [*val, *options])


def test_folder_without_annotations(tmp_path, capsys):
    message = issue(capsys, arguments(tmp_path, "--data", str(tmp_path)))
    assert str(tmp_path) in message and "no training annotations" in message


@pytest.mark.parametrize(
    ("flags", "changes", "expected"),
    [
        ((), {"MODEL__ROI_HEADS__NUM_CLASSES": 80}, "NUM_CLASSES is 80, but .* has 2 classes"),
        ((), {"DATASETS__TRAIN": "('engine_shape_train',)"}, "did you mean engine_shapes_train"),
        ((), {"DATASETS__TRAIN": "()"}, "DATASETS.TRAIN is empty"),
        ((), {"DATASETS__TRAIN": "('coco_2017_train',)"}, "DETECTRON2_DATASETS"),
        ((), {"SOLVER__BASE_LT": 1}, "SOLVER.BASE_LT .* did you mean SOLVER.BASE_LR"),
        ((), {"SOLVER__BASE_LR": -1.0}, "SOLVER.BASE_LR is -1.0"),
        (
            (),
            {"TEST__AUG__ENABLED": True, "TEST__AUG__SIZE_RANGES": "((0, 96),)"},
            "TEST.AUG.SIZE_RANGES is .* each of the 9",
        ),
        ((), {"MODEL__WEIGHTS": "/nowhere/model.pth"}, "MODEL.WEIGHTS = /nowhere/model.pth"),
        ((), {"SOLVER__EPOCHS": 3, "SOLVER__EPOCH_STEPS": "()"}, "MAX_ITER has no effect .* is 3:"),
        (("--eval-only",), {}, "--eval-only needs the weights"),
        (("--eval-only", "--resume"), {}, "there is no checkpoint in OUTPUT_DIR"),
        (("--num-machines", "2"), {}, "--dist-url"),
    ],
)
def test_complaints(tmp_path, capsys, flags, changes, expected):
    register_tiny_shapes()
    message = issue(capsys, arguments(tmp_path, *flags, **changes))
    assert re.search(expected, message), message


def test_configuration_by_name_and_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("SparseRCNN/sparse_rcnn_tiny.yaml").samefile(CONFIG)
    cfg, recipe = configure(build_parser().parse_args(["SOLVER.BASE_LR", "0.125"]))
    assert Path(cfg.OUTPUT_DIR) == Path("output/sparse_rcnn_tiny")
    assert cfg.SOLVER.BASE_LR == 0.125 != recipe.SOLVER.BASE_LR
    assert recipe.SOLVER.BASE_LR == load_config(str(CONFIG)).SOLVER.BASE_LR
    cfg, _ = configure(build_parser().parse_args(["OUTPUT_DIR", "elsewhere"]))
    assert cfg.OUTPUT_DIR == "elsewhere"
    with pytest.raises(ValueError, match=r"--config-file nothing\.yaml: no such file"):
        find_config("nothing.yaml")


@pytest.mark.parametrize("split", ["train", "val"])
def test_unreadable_image_is_named_before_training(tmp_path, coco_folder, capsys, split):
    folder = tmp_path / "broken"
    shutil.copytree(coco_folder, folder)
    picture = sorted((folder / split).glob("*.png"))[-1]
    picture.write_bytes(picture.read_bytes()[:200])
    message = issue(capsys, arguments(tmp_path / "out", "--data", str(folder)))
    assert f"{picture}: cannot read image: " in message and "truncated" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_process_is_resumed(tmp_path, coco_folder):
    """The whole program, killed without warning, then told to resume."""
    command = [sys.executable, str(ROOT / "train_net.py")]
    options = {"SOLVER__CHECKPOINT_PERIOD": 2, "TEST__NUM_PICTURES": 0}
    data = ["--data", str(coco_folder)]
    argv = arguments(tmp_path, *data, **options, SOLVER__MAX_ITER=100000)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, *argv], env=env, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "last_checkpoint").exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the training ended by itself"
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    last = torch.load(tmp_path / (tmp_path / "last_checkpoint").read_text(), weights_only=True)
    done = last["trainer"]["iteration"] + 1
    argv = arguments(tmp_path, *data, "--resume", **options, SOLVER__MAX_ITER=done + 2)
    assert main(argv) == 0
    assert f"resumed at iteration {done} of {done + 2}" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
