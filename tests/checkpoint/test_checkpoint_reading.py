"""Weights files are read without running what is in them, and other files are named for what they
are."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from asag.checkpoint.reading import UnreadableError, read_checkpoint

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Attack:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def same(loaded: dict) -> bool:
    model = loaded["model"]
    return model.keys() == WEIGHTS.keys() and all(
        isinstance(v, torch.Tensor) and torch.equal(v, WEIGHTS[k]) for k, v in model.items()
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state", None])
def test_pytorch_files(tmp_path: Path, zipped: bool, key: str | None) -> None:
    data = {key: WEIGHTS, "epoch": 3, "args": argparse.Namespace(lr=1.0)} if key else WEIGHTS
    torch.save(data, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    loaded = read_checkpoint(tmp_path / "x.pth")
    assert same(loaded)
    assert loaded.get("epoch") == (3 if key else None)


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_what_authors_leave_beside_the_weights(tmp_path: Path, module: str) -> None:
    """Figures as NumPy's numbers, pickled by an older or a newer one, and paths."""
    best, curve = np.float64(42.5), np.arange(3, dtype=np.float32)
    arguments = argparse.Namespace(output=Path("out"), lr=np.float32(0.5))
    data = {"model": WEIGHTS, "best": best, "curve": curve, "args": arguments}
    torch.save(data, tmp_path / "x.pth")
    written = best.__reduce__()[0].__module__.encode()
    renamed = zipfile.ZipFile(tmp_path / "y.pth", "w")
    with zipfile.ZipFile(tmp_path / "x.pth") as original, renamed:
        for item in original.namelist():
            content = original.read(item)
            if item.endswith("data.pkl"):
                assert written in content
                content = content.replace(written, module.encode())
            renamed.writestr(item, content)
    loaded = read_checkpoint(tmp_path / "y.pth")
    assert same(loaded) and loaded["best"] == best and np.array_equal(loaded["curve"], curve)
    assert loaded["args"].output == Path("out") and loaded["args"].lr == 0.5


def test_prefix_of_distributed_training_is_dropped(tmp_path: Path) -> None:
    torch.save({"model": {f"module.{k}": v for k, v in WEIGHTS.items()}}, tmp_path / "x.pth")
    assert same(read_checkpoint(tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_under_any_name(tmp_path: Path, name: str) -> None:
    save_file(WEIGHTS, tmp_path / name)
    assert same(read_checkpoint(tmp_path / name))


def test_class_names_in_safetensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors", metadata={"class_names": '["cat", "dog"]'})
    loaded = read_checkpoint(tmp_path / "x.safetensors")
    assert same(loaded) and loaded["class_names"] == ["cat", "dog"]


def test_class_names_beside_the_weights(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"id2label": {"0": "cat", "1": "dog"}}))
    assert read_checkpoint(tmp_path / "model.safetensors")["class_names"] == ["cat", "dog"]
    for text in ('{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}', '{"id2label": {"7": "x"}}', "["):
        config.write_text(text)
        assert "class_names" not in read_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_detectron2_pickles(tmp_path: Path, protocol: int) -> None:
    arrays = OrderedDict((k, v.numpy()) for k, v in WEIGHTS.items())
    data = {"model": arrays, "__author__": "me", "matching_heuristics": True, "loss": np.float64(1)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(data, protocol))
    loaded = read_checkpoint(tmp_path / "x.pkl")
    assert same(loaded)
    assert loaded["matching_heuristics"] is True and loaded["__author__"] == "me"


@pytest.mark.parametrize("wrapped", [True, False])
def test_detectron_pickles(tmp_path: Path, wrapped: bool) -> None:
    arrays = {k: v.numpy() for k, v in WEIGHTS.items()}
    arrays |= {"a_momentum": np.zeros(1)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"blobs": arrays} if wrapped else arrays, 2))
    loaded = read_checkpoint(tmp_path / "x.pkl")
    assert same(loaded) and loaded["__author__"] == "Caffe2" and loaded["matching_heuristics"]


def test_pycls_files(tmp_path: Path) -> None:
    counter = {"bn.num_batches_tracked": torch.tensor(3)}
    torch.save({"model_state": WEIGHTS | counter}, tmp_path / "x.pyth")
    loaded = read_checkpoint(tmp_path / "x.pyth")
    assert same(loaded) and loaded["matching_heuristics"]


def test_arrays_as_python_2_wrote_them(tmp_path: Path) -> None:
    """Through `_codecs.encode`, as protocol 2 still does."""
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"w": np.arange(4, dtype=np.uint8) + 250}, 2))
    assert read_checkpoint(tmp_path / "x.pkl")["model"]["w"].tolist() == [250, 251, 252, 253]


@pytest.mark.parametrize("name", ["x.pth", "legacy.pth", "x.pkl", "x.pyth", "x.bin"])
def test_code_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / name
    data = {"model": {"a.weight": np.ones(2)}, "__author__": "x", "extra": Attack(mark)}
    if name == "x.pkl":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data | {"model": WEIGHTS}, path, _use_new_zipfile_serialization=name[0] == "x")
    with pytest.raises(UnreadableError, match=r"could run any code\. It was not") as refused:
        read_checkpoint(path)
    assert str(path) in str(refused.value) and "io.open" in str(refused.value)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Attack(mark))).close()  # it would have worked
    assert mark.exists()


def test_codecs_other_than_latin1_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    with pytest.raises(UnreadableError, match="'rot13'"):
        read_checkpoint(tmp_path / "x.pkl")


def as_bytes(save) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


PTH = as_bytes(lambda f: torch.save({"model": WEIGHTS}, f))
LEGACY = as_bytes(lambda f: torch.save({"model": WEIGHTS}, f, _use_new_zipfile_serialization=False))
PKL = pickle.dumps({"model": {"a": np.ones(100)}, "__author__": "me"})


def other_zip(file) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.pth", b"x")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.pth", b"", "it is empty"),
        ("x.pth", PTH[:-100], f"it is cut off after {len(PTH) - 100} bytes; download it again"),
        ("x.pth", LEGACY[:-10], "it is damaged or no weights file"),
        ("x.pkl", PKL[:-100], f"its {len(PKL) - 100} bytes are cut off, damaged or no pickle"),
        ("x.safetensors", b"\x40" + bytes(7) + b'{"a":', "it is damaged or no safetensors file"),
        ("x.pth", b"\n<!DOCTYPE html><html>", "it is a web page.*'Raw'"),
        ("x.pkl", b"<html>", "it is a web page"),
        ("x.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("x.pth", as_bytes(other_zip), "it is a zip archive without weights; unpack it"),
        ("x.pth", b"junk", "it is damaged or no weights file"),
        ("x.pth", as_bytes(lambda f: torch.save([1], f)), "it holds a list, not weights by name"),
        ("x.pth", as_bytes(lambda f: torch.save({"epoch": 1}, f)), "no tensors by name.*epoch"),
        ("x.pth", as_bytes(lambda f: torch.save({"model": {}}, f)), "it has: nothing"),
        ("x.pkl", pickle.dumps([1]), "it holds a list, not weights by name"),
        ("x.pkl", pickle.dumps({"a": np.array(["x"], object)}, 2), "no tensors by name.*a"),
    ],
)
def test_other_files_are_named_for_what_they_are(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match=message) as refused:
        read_checkpoint(path)
    assert str(path) in str(refused.value)
