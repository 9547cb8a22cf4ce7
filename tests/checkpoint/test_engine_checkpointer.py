"""Checkpoint files are complete or not there."""

from __future__ import annotations

import stat

import pytest
import torch
from torch import nn

from asag.checkpoint.checkpointer import AtomicCheckpointer
from asag.engine.rng import preserved_rng, rng_state, set_rng_state


class Exploding:
    """Fails in the middle of being pickled, as a full disk or a kill would."""

    def __reduce__(self):
        raise OSError("no space left on device")


def test_crash_while_writing_leaves_the_older_file(tmp_path):
    checkpointer = AtomicCheckpointer(nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("model", note="old")
    with pytest.raises(OSError, match="no space left"):
        checkpointer.save("model", note="new", filler=torch.zeros(1000), broken=Exploding())
    assert torch.load(tmp_path / "model.pth", weights_only=True)["note"] == "old"
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model.pth")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]


def test_last_checkpoint_moves_only_after_the_file_is_complete(tmp_path):
    checkpointer = AtomicCheckpointer(nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("first")
    with pytest.raises(OSError, match="no space left"):
        checkpointer.save("second", broken=Exploding())
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")


def test_weights_alone_are_not_resumed_from(tmp_path):
    model = nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(model, str(tmp_path), other=nn.Linear(1, 1))
    checkpointer.save("model_0000001")
    checkpointer.save_weights("model_best", class_names=["circle"])
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert set(best) == {"model", "class_names"}
    assert torch.equal(best["model"]["weight"], model.weight)


def test_files_follow_the_umask(tmp_path):
    AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path)).save("model")
    (tmp_path / "plain").write_text("")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("model.pth", "plain")}
    assert len(modes) == 1


def test_only_the_main_process_writes(tmp_path):
    AtomicCheckpointer(nn.Linear(1, 1), str(tmp_path), save_to_disk=False).save("model")
    assert not list(tmp_path.iterdir())


def draw() -> tuple:
    import random

    import numpy as np

    return random.gauss(0, 1), np.random.randn(), torch.randn(2).tolist()


def test_random_state_survives_a_file(tmp_path):
    draw()  # leaves a cached second Gaussian in `random`
    torch.save(rng_state(), tmp_path / "state")
    expected = draw(), draw()
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert (draw(), draw()) == expected


def test_preserved_rng_leaves_no_trace():
    state = rng_state()
    expected = draw()
    set_rng_state(state)
    with pytest.raises(KeyError), preserved_rng():
        draw()
        raise KeyError
    assert draw() == expected
