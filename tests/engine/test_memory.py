"""The largest step before the training, and what is said when the memory is not enough."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from engine_support import CONFIG, losses, register_tiny_shapes, tiny_cfg, tiny_options, weights
from family_support import FAMILIES, make_model

from asag.engine import Trainer
from asag.engine.memory import (
    LargestBatch,
    NotEnoughMemoryError,
    advice,
    dry_step,
    is_out_of_memory,
    largest_canvas,
    memory_advice,
)
from asag.engine.optimizer import build_optimizer
from asag.engine.step import TrainStep
from train_net import main

CPU_ERROR = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"


def images(*shapes: tuple[int, int]) -> list[dict]:
    return [{"height": h, "width": w, "annotations": [{}] * 2} for h, w in shapes]


def trained(folder, **changes) -> Trainer:
    register_tiny_shapes()
    settings = {
        "MODEL__DECODER__DROPOUT": 0.2,
        "MODEL__SLIM_RESNET__NORM": "BN",
        "MODEL__SLIM_RESNET__WIDTH": 8,
        "SOLVER__MAX_ITER": 2,
        "SOLVER__ACCUMULATE_STEPS": 2,
    }
    seed_all_rng(7)
    trainer = Trainer(tiny_cfg(folder, **settings | changes))
    trainer.train()
    return trainer


# The largest batch


@pytest.mark.parametrize(
    ("shapes", "count", "changes", "expected"),
    [
        ([(480, 640)], 2, {}, (800, 1067)),
        ([(480, 640), (500, 1000)], 2, {}, (800, 1333)),
        ([(500, 1000), (1000, 500)], 2, {}, (667, 1333)),
        ([(480, 640), (640, 480)], 2, {"DATALOADER__ASPECT_RATIO_GROUPING": False}, (1067, 1067)),
        ([(480, 640), (640, 480)], 1, {"DATALOADER__ASPECT_RATIO_GROUPING": False}, (800, 1067)),
        ([(480, 640)], 2, {"INPUT__CROP__ENABLED": True}, (1250, 1250)),
        ([], 1, {}, (800, 1333)),
    ],
)
def test_largest_canvas(tmp_path, shapes, count, changes, expected):
    sizes = {"INPUT__MIN_SIZE_TRAIN": "(480, 800)", "INPUT__MAX_SIZE_TRAIN": 1333}
    cfg = tiny_cfg(tmp_path, **sizes | changes)
    found = largest_canvas(cfg, images(*shapes), count)
    assert sorted(found) == sorted(expected)


def test_largest_batch_counts_parts_and_objects(tmp_path):
    dicts = images((64, 80), (64, 80))
    dicts[1]["annotations"] = [{}, {}, {}, {"iscrowd": 1}]
    largest = LargestBatch.from_config(tiny_cfg(tmp_path, SOLVER__ACCUMULATE_STEPS=2), dicts)
    assert largest == LargestBatch(images=2, height=64, width=80, objects=3)
    samples = largest.samples(num_classes=2)
    assert [tuple(x["image"].shape) for x in samples] == [(3, 64, 80)] * 2
    boxes = samples[0]["instances"].gt_boxes
    assert len(boxes) == 3 and boxes.nonempty(1).all()
    assert (boxes.tensor[:, 2:] <= torch.tensor([80, 64])).all()
    assert set(samples[0]["instances"].gt_classes.tolist()) == {0, 1}


# No trace


def test_training_is_bit_identical_with_and_without(tmp_path, caplog):
    with caplog.at_level("INFO", logger="asag"):
        plain = trained(tmp_path / "never", SOLVER__MEMORY_CHECK="never")
        assert "memory: " not in caplog.text
        trained(tmp_path / "auto", SOLVER__MAX_ITER=1)
        assert "memory: " not in caplog.text, "auto is for CUDA"
        checked = trained(tmp_path / "always", SOLVER__MEMORY_CHECK="always")
    assert "the largest step, 2 image(s) of 80 x 64 pixels with 3 object(s) each" in caplog.text
    assert "GiB" in caplog.text
    assert losses(checked) == losses(plain)
    assert torch.equal(weights(checked.model), weights(plain.model))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(checked.model.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["dynamic", "asag-s", "detr"])
def test_models_are_as_before(tmp_path, family):
    model = make_model(*FAMILIES[family], False)
    cfg = tiny_cfg(tmp_path)
    step = TrainStep(model, build_optimizer(cfg, model), accumulate_steps=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args[-1]))
    with EventStorage() as storage:
        dry_step(step, LargestBatch(images=1, height=64, width=96, objects=5).samples(2))
    assert not storage.histories()
    assert len(seen) == 1 and all(value.requires_grad for value in seen[0].values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not step.optimizer.state


# Not enough


def test_failing_check_advises(tmp_path, monkeypatch):
    def fail(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr("asag.modeling.meta_arch.SparseDetector.forward", fail)
    with pytest.raises(NotEnoughMemoryError) as caught:
        trained(tmp_path, SOLVER__MEMORY_CHECK="always")
    message = str(caught.value)
    assert "the largest step, 2 image(s) of 80 x 64 pixels" in message
    assert "SOLVER.MEMORY_CHECK never" in message
    for key in (
        "SOLVER.ACCUMULATE_STEPS 2",
        "SOLVER.IMS_PER_BATCH 4",
        "MODEL.ACTIVATION_CHECKPOINTING False",
        "SOLVER.AMP.ENABLED False",
        "INPUT.MAX_SIZE_TRAIN 80",
    ):
        assert key in message


def test_lack_of_memory_in_the_middle_ends_with_advice(tmp_path, monkeypatch, capfd):
    backward, calls = TrainStep.backward, []

    def sometimes(self, batch):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError(CPU_ERROR)
        return backward(self, batch)

    monkeypatch.setattr(TrainStep, "backward", sometimes)
    register_tiny_shapes()
    options = tiny_options(tmp_path, SOLVER__MAX_ITER=4)
    assert main(["--config-file", str(CONFIG), "--num-gpus", "0", *options]) == 2
    error = capfd.readouterr().err
    assert "error: the memory is not enough for iteration 2, 4 image(s) of up to 80 x 64" in error
    assert "MODEL.ACTIVATION_CHECKPOINTING" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError(CPU_ERROR), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_lack_of_memory(tmp_path, error, expected):
    assert is_out_of_memory(error) == expected
    raised = pytest.raises(NotEnoughMemoryError if expected else type(error))
    with raised as caught, memory_advice(tiny_cfg(tmp_path), "this"):
        raise error
    assert (caught.value is error) == (not expected)


def test_advice_leaves_out_what_is_done_already(tmp_path):
    done = {
        "MODEL__DEVICE": "cuda",
        "MODEL__ACTIVATION_CHECKPOINTING": True,
        "SOLVER__AMP__ENABLED": True,
        "SOLVER__ACCUMULATE_STEPS": 4,
    }
    lines = advice(tiny_cfg(tmp_path, **done))
    assert [line.split()[0] for line in lines] == ["INPUT.MAX_SIZE_TRAIN", "the"]
    assert "expandable_segments:True" in lines[-1]


def test_unknown_mode(tmp_path):
    with pytest.raises(ValueError, match="MEMORY_CHECK is 'maybe'; it must be one of: 'auto'"):
        trained(tmp_path, SOLVER__MEMORY_CHECK="maybe")
