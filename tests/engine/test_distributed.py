"""Several processes train like one with the same global batch (gloo, CPU)."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from engine_support import (
    CONFIG,
    losses,
    register_tiny_shapes,
    tiny_cfg,
    tiny_options,
    weights,
    write_coco_folder,
)

from asag.engine import NonFiniteLossError, Trainer
from asag.engine.defaults import configure
from asag.engine.launch import launch
from train_net import build_parser, run

STEPS = 3


def train(folder: Path, **changes) -> Trainer:
    # The same weights on every rank; a rank's own seed matters for dropout only. SGD, because
    # AdamW's first steps turn the sign of a gradient that is mere rounding into a whole step.
    settings = {"SOLVER__MAX_ITER": STEPS, "SOLVER__OPTIMIZER": "SGD", "SOLVER__BASE_LR": 0.01}
    seed_all_rng(7)
    trainer = Trainer(tiny_cfg(folder, **settings | changes))
    trainer.train()
    return trainer


def diverge(folder: Path) -> None:
    """Trains with logits of process 1 that become NaN in iteration 2."""
    trainer = Trainer(tiny_cfg(folder, SOLVER__MAX_ITER=STEPS))

    def infect(module, args, output):
        if trainer.iter == 2 and comm.get_rank() == 1:
            return output * math.nan

    trainer.model.module.roi_heads.stages[-1].class_logits.register_forward_hook(infect)
    trainer.train()


def gradient_norms(trainer: Trainer) -> list[float]:
    return [value for value, _ in trainer.storage.history("grad_norm").values()]


def work(data: str, folder: str) -> int:
    """Work of each of two processes."""
    register_tiny_shapes(data)
    found = {"world_size": comm.get_world_size(), "local_size": comm.get_local_size()}
    for name, changes in {
        "plain": {"DATASETS__TEST": "('engine_shapes_val',)"},
        "accumulating": {"SOLVER__ACCUMULATE_STEPS": 2},
    }.items():
        trainer = train(Path(folder) / name, **changes)
        found[name] = losses(trainer) + gradient_norms(trainer)
        if comm.is_main_process():
            torch.save(weights(trainer.model), Path(folder) / f"{name}.weights")
            found["results"] = found.get("results") or trainer.results

    try:  # a step that diverges on one process is reported by both
        diverge(Path(folder) / "broken")
    except NonFiniteLossError as error:
        found["divergence"] = str(error)
    found["command_line"] = command_line(Path(folder))
    (Path(folder) / f"rank{comm.get_rank()}.json").write_text(json.dumps(found))
    return 0


def command_line(folder: Path) -> int:
    """Runs train_net.py as in a process that it has started, for data of one's own."""
    options = tiny_options(folder / "out", SOLVER__MAX_ITER=1)
    data = ["DATASETS.TRAIN", "('mine_train',)", "DATASETS.TEST", "('mine_val',)"]
    argv = ["--config-file", str(CONFIG), "--data", str(folder / "mine"), *options, *data]
    args = build_parser().parse_args(argv)
    return run(args, *configure(args))


def fail(code: int) -> int:
    return code


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_coco_folder(folder / "mine")
    assert launch(work, (str(register_tiny_shapes()), str(folder)), processes=2) == 0
    return folder


def rank(folder: Path, number: int) -> dict:
    return json.loads((folder / f"rank{number}.json").read_text())


@pytest.mark.parametrize("name", ["plain", "accumulating"])
def test_two_processes_equal_one(two, tmp_path, name):
    register_tiny_shapes()
    one = train(tmp_path)
    for number in (0, 1):
        expected = losses(one) + gradient_norms(one)  # clipping would hide a factor
        np.testing.assert_allclose(rank(two, number)[name], expected, rtol=1e-4)
    difference = (torch.load(two / f"{name}.weights") - weights(one.model)).abs().max()
    assert difference < 1e-3 * one.cfg.SOLVER.BASE_LR


def test_every_image_is_evaluated_once(two):
    detections = json.loads((two / "plain/inference/coco_instances_results.json").read_text())
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4, 5, 6}
    assert len(detections) == len({(d["image_id"], *d["bbox"], d["score"]) for d in detections})
    assert "AP" in rank(two, 0)["results"]["bbox"]


def test_processes_know_their_machine(two):
    assert rank(two, 1)["world_size"] == rank(two, 1)["local_size"] == 2


def test_divergence_on_one_process_is_reported_by_all(two):
    for number in (0, 1):
        message = rank(two, number)["divergence"]
        assert "diverged at iteration 2" in message and "in the class logits" in message
        assert message.count(".png") == 4, "the images of both processes"


def test_command_line_in_two_processes(two):
    assert rank(two, 0)["command_line"] == rank(two, 1)["command_line"] == 0
    assert (two / "out/model_final.pth").is_file()
    assert "done: box AP" in (two / "out/log.txt").read_text()
    state = torch.load(two / "out/model_final.pth", weights_only=True)
    assert len(state["trainer"]["rng"]) == 2
    assert not torch.equal(*(s["torch"] for s in state["trainer"]["rng"])), "ranks draw their own"


def test_exit_codes_and_wrong_counts():
    assert launch(fail, (3,), processes=1) == 3
    with pytest.raises(ValueError, match="--machine-rank 2"):
        launch(fail, (0,), processes=1, machines=2, machine_rank=2)
    with pytest.raises(ValueError, match="--dist-url"):
        launch(fail, (0,), processes=1, machines=2)


def test_torchrun_environment_is_joined(monkeypatch):
    from asag.engine.launch import _free_port

    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)

    def joined() -> int:
        with warnings.catch_warnings(record=True) as heard:
            warnings.warn("`broadcast_buffers` is deprecated. Use ...", FutureWarning, stacklevel=1)
            warnings.warn("something of the user's", UserWarning, stacklevel=1)
        assert [str(x.message) for x in heard] == ["something of the user's"]
        return int(torch.distributed.is_initialized())

    assert launch(joined, (), processes=1) == 1
    assert not torch.distributed.is_initialized()
