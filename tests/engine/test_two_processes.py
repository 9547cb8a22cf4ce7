"""Agreement of the processes of a run: averages, early stops, validation, resuming."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from engine_support import losses, register_tiny_shapes, tiny_cfg, weights

from asag.engine import Trainer
from asag.engine.launch import launch
from asag.engine.validation import validation_losses

VAL = {"DATASETS__TEST": "('engine_shapes_val',)"}
# Gradient descent, because AdamW's first steps turn rounding into whole steps.
SETTINGS = {"SOLVER__OPTIMIZER": "SGD", "SOLVER__BASE_LR": 0.01, "SOLVER__EMA__ENABLED": True}
SETTINGS |= {"SOLVER__WARMUP_ITERS": 0}  # which would depend on the length of the training


def trainer(folder: Path, **changes) -> Trainer:
    seed_all_rng(7)
    return Trainer(tiny_cfg(folder, **SETTINGS | changes))


def validated(folder: Path, batch: int) -> list[dict[str, float]]:
    """Losses on all six images, and on one, of which a second process has no share."""
    seed_all_rng(7)
    cfg = tiny_cfg(folder, SOLVER__IMS_PER_BATCH=batch, **VAL)
    model = Trainer.build_model(cfg)
    one = DatasetCatalog.get("engine_shapes_val")[:1]
    return [validation_losses(cfg, model), validation_losses(cfg, model, one)]


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def work(data: str, root: str) -> int:
    register_tiny_shapes(data)
    folder, found = Path(root), {}
    found["validation"] = {batch: validated(folder, batch) for batch in (2, 8)}

    run = trainer(folder / "two", SOLVER__MAX_ITER=2)
    run.train()
    found["average"] = [float(x.double().sum()) for x in run.ema.state_dict().values()]
    found["updates"] = run.ema.updates

    messages = Messages()
    logging.getLogger("asag").addHandler(messages)
    resumed = trainer(folder / "one", SOLVER__MAX_ITER=4)
    resumed.resume_or_load(resume=True)
    resumed.train()
    found["resumed"], found["messages"] = losses(resumed), messages.texts

    test = Trainer.test  # only the main process knows results
    Trainer.test = staticmethod(lambda *_: {"bbox": {"AP": 1.0}} if comm.is_main_process() else {})
    stopping = {"SOLVER__EARLY_STOP_PATIENCE": 1, "TEST__EVAL_PERIOD": 1, "SOLVER__MAX_ITER": 50}
    stopped = trainer(folder / "stopped", **VAL, **stopping)
    stopped.train()  # never returns should one of them go on
    Trainer.test = test
    found["stopped"] = stopped.iter
    (folder / f"rank{comm.get_rank()}.json").write_text(json.dumps(found))
    return 0


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    data = register_tiny_shapes()
    trainer(folder / "one", SOLVER__MAX_ITER=2).train()
    assert launch(work, (str(data), str(folder)), processes=2) == 0
    return folder


def ranks(folder: Path) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    register_tiny_shapes()
    run = trainer(tmp_path_factory.mktemp("whole"), SOLVER__MAX_ITER=4)
    run.train()
    return run


@pytest.mark.parametrize("batch", [2, 8])
def test_validation_is_shared_out(two, tmp_path, batch):
    expected = validated(tmp_path, 4)
    for rank in ranks(two):
        for found, wanted in zip(rank["validation"][str(batch)], expected, strict=True):
            assert found.keys() == wanted.keys()
            np.testing.assert_allclose([found[k] for k in wanted], list(wanted.values()), rtol=1e-4)


def test_averages_are_equal_on_all_processes(two):
    first, second = ranks(two)
    assert first["average"] == second["average"]
    assert first["updates"] == second["updates"] == 2


def test_all_processes_stop_early(two):
    assert [rank["stopped"] for rank in ranks(two)] == [2, 2]
    state = torch.load(two / "stopped/model_final.pth", weights_only=True)
    assert state["trainer"]["iteration"] == 1 and len(state["trainer"]["rng"]) == 2


def test_run_of_one_process_goes_on_in_two(two, whole):
    for rank in ranks(two):
        assert any("written by 1 process(es), now there are 2" in x for x in rank["messages"])
        np.testing.assert_allclose(rank["resumed"], losses(whole)[2:], rtol=1e-4)


def test_run_of_two_processes_goes_on_in_one(two, whole, caplog):
    register_tiny_shapes()
    resumed = trainer(two / "two", SOLVER__MAX_ITER=4)
    with caplog.at_level("INFO", logger="asag"):
        resumed.resume_or_load(resume=True)
    assert "written by 2 process(es), now there are 1" in caplog.text
    assert resumed.start_iter == resumed.ema.updates == 2
    resumed.train()
    np.testing.assert_allclose(losses(resumed), losses(whole)[2:], rtol=1e-4)
    difference = (weights(resumed.model) - weights(whole.model)).abs().max()
    assert difference < 1e-3 * resumed.cfg.SOLVER.BASE_LR
