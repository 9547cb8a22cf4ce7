"""Detector and Detections: kinds of pictures, colors, orientation, sources, quality."""

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from asag import Detector, model_zoo
from asag.data import ImageReadError
from asag.data.shapes import ANNOTATION_FILE, ShapesSpec, make_shapes
from asag.inference.images import to_rgb
from asag.inference.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
OWN = "sparse_rcnn_tiny_shapes"
EXIF_ORIENTATION, ROTATED_LEFT = 0x0112, 8


@pytest.fixture(scope="module")
def detector():
    return Detector.from_pretrained(OWN, device="cpu")


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Folder of 20 generated pictures of another seed than those of the training."""
    spec = ShapesSpec(name="unseen", images=(("val", 20),), seed=123)
    return make_shapes(spec, "val", tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def picture(unseen):
    return unseen / "000001.png"


class Colors(torch.nn.Module):
    """Two objects, the first scored by the red share, the second by the blue one."""

    def forward(self, inputs):
        return [{"instances": self.answer(x)} for x in inputs]

    @staticmethod
    def answer(x):
        red, _, blue = (x["image"].float().mean(dim=(1, 2)) / 255).tolist()
        found = Instances((x["height"], x["width"]))
        found.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 2.0, 1.0], [1.0, 1.0, 3.0, 4.0]]))
        found.scores = torch.tensor([red, blue])
        found.pred_classes = torch.tensor([0, 1])
        return found


def colors():
    return Detector(Predictor(Colors(), class_names=["red", "blue"]))


def rgb(height=4, width=6, color=(230, 0, 20)):
    image = np.zeros((height, width, 3), np.uint8)
    image[:] = color
    return image


def same(first, second):
    assert len(first) == len(second)
    assert torch.equal(first.labels, second.labels)
    torch.testing.assert_close(first.scores, second.scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.boxes_xyxy, second.boxes_xyxy, atol=1e-2, rtol=0)


def ap50(annotation_file, results):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(annotation_file))
        evaluation = COCOeval(gt, gt.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[1]


def test_the_packaged_model_finds_shapes_it_never_saw(detector, unseen):
    files = sorted(unseen.glob("*.png"))
    found = detector.predict(files, threshold=0.0)
    # Category k + 1 of the file is class k.
    results = [
        x
        for number, one in enumerate(found, start=1)
        for x in one.to_coco(number, category_ids=range(1, 6))
    ]
    assert ap50(unseen / ANNOTATION_FILE, results) > 50


def test_every_kind_of_picture_gives_the_same(detector, picture):
    array = np.array(Image.open(picture).convert("RGB"))
    expected = detector.predict(str(picture))
    assert len(expected) > 0
    for other in (
        picture,
        Image.open(picture),
        Image.open(picture).convert("RGBA"),
        array,
        torch.from_numpy(array).permute(2, 0, 1),
    ):
        same(detector.predict(other), expected)
    for other in (array[:, :, ::-1], torch.from_numpy(array[:, :, ::-1].copy()).permute(2, 0, 1)):
        same(detector.predict(other, color_order="BGR"), expected)


def test_a_list_gives_a_list_in_order(detector, unseen):
    files = sorted(unseen.glob("*.png"))[:3]
    mixed = [files[0], np.array(Image.open(files[1]).convert("RGB")), Image.open(files[2])]
    together = detector.predict(mixed, threshold=0.2)
    assert isinstance(together, list)
    for file, found in zip(files, together, strict=True):
        same(found, detector.predict(file, threshold=0.2))
    assert detector.predict([]) == []


def test_colors_reach_the_model_in_the_order_that_was_said():
    assert [x.name for x in colors().predict(rgb())] == ["red"]
    assert [x.name for x in colors().predict(rgb(), color_order="BGR")] == ["blue"]
    tensor = torch.from_numpy(rgb()).permute(2, 0, 1)
    assert [x.name for x in colors().predict(tensor)] == ["red"]
    pillow = Image.fromarray(rgb())  # knows its colors, whatever is said of arrays
    assert [x.name for x in colors().predict(pillow, color_order="BGR")] == ["red"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pillow_images_of_any_mode(mode):
    gray = Image.fromarray(np.full((4, 6), 255, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    else:
        image = gray.convert("RGBA").convert(mode) if mode == "LA" else gray.convert(mode)
    assert image.mode == mode
    assert to_rgb([image])[0].shape == (4, 6, 3)
    assert to_rgb([image])[0].min() > 250


def test_orientation_of_the_camera_is_applied_in_files_and_in_memory(tmp_path):
    image = rgb(4, 8)
    image[:, :4] = 0
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = ROTATED_LEFT
    path = tmp_path / "rotated.png"
    Image.fromarray(image).save(path, exif=exif)
    expected = np.rot90(image)
    for found in to_rgb([path, Image.open(path)]):
        assert np.array_equal(found, expected)
    assert colors().predict(path, threshold=0).image_size == (8, 4)


def test_results_in_every_form(tmp_path):
    found = colors().predict(rgb(), threshold=0.05)
    assert len(found) == 2 and found.image_size == (4, 6)
    assert found.class_names == ("red", "blue")
    assert found[1] == list(found)[1]
    assert found[1].box_xyxy == (1, 1, 3, 4) and found[1].label == 1
    assert found[-1].name == "blue" and found[-1].score == pytest.approx(20 / 255)
    red, blue = found.to_coco(7, category_ids=[3, 9])
    assert (red["category_id"], blue["category_id"]) == (3, 9)
    assert blue["bbox"] == [1, 1, 2, 3] and blue["image_id"] == 7
    assert [x["category_id"] for x in found.to_coco(7)] == [0, 1]
    assert [x["name"] for x in found.to_dicts()] == ["red", "blue"]
    assert found.to_dicts()[0]["box_xyxy"] == [0, 0, 2, 1]
    instances = found.to_instances()
    assert instances.image_size == (4, 6)
    assert torch.equal(instances.pred_boxes.tensor, found.boxes_xyxy)
    assert torch.equal(instances.pred_classes, found.labels)
    found.save(tmp_path / "drawn.png")
    drawn = np.array(Image.open(tmp_path / "drawn.png"))
    assert np.array_equal(drawn, np.array(found.draw()))
    assert not np.array_equal(
        drawn, np.array(found.draw().resize((6, 4)).resize(drawn.shape[1::-1]))
    )
    assert "red 0.90" in repr(found)


def test_the_threshold_counts():
    assert len(colors().predict(rgb(), threshold=0.95)) == 0
    assert repr(colors().predict(rgb(), threshold=0.95)) == "<Detections of 0 in 6x4 pixels>"


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 6), np.uint8), ValueError, r"\(H, W, 3\) uint8.*\(4, 6\)"),
        (np.zeros((4, 6, 3)), ValueError, "float64"),
        (np.zeros((2, 4, 6, 3), np.uint8), ValueError, "several images go in a list"),
        (torch.zeros(3, 4, 6), ValueError, "uint8 with values 0 to 255.*float32"),
        (torch.zeros(4, 6, 3, dtype=torch.uint8), ValueError, r"\(3, H, W\)"),
        (Image.new("F", (6, 4)), ValueError, "floating-point"),
        ("nothing.png", ImageReadError, "nothing.png"),
        (7, TypeError, "not int"),
    ],
)
def test_unusable_pictures_are_refused(image, error, message):
    with pytest.raises(error, match=message):
        colors().predict(image)


def test_an_unusable_picture_of_a_list_is_named():
    with pytest.raises(ValueError, match="image 1: an array must be"):
        colors().predict([rgb(), rgb()[0]])


def test_unusable_arguments_are_refused():
    with pytest.raises(ValueError, match="color_order is 'GBR'"):
        colors().predict(rgb(), color_order="GBR")
    with pytest.raises(ValueError, match="threshold is 30"):
        colors().predict(rgb(), threshold=30)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Files that a run leaves: config.yaml, model_best.pth and model_final.pth."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(model_zoo.config(OWN).dump())
    loaded = torch.load(model_zoo.entry(OWN).weights)
    torch.save(loaded, folder / "model_best.pth")
    loaded["model"] = {k: torch.zeros_like(v) for k, v in loaded["model"].items()}
    torch.save(loaded, folder / "model_final.pth")
    return folder


def test_a_run_folder_gives_its_best_weights(run_folder, detector, picture):
    found = Detector.from_pretrained(run_folder, device="cpu").predict(picture)
    assert found.class_names == detector.class_names
    same(found, detector.predict(picture))


def test_a_file_takes_the_configuration_beside_it(run_folder, detector, picture):
    loaded = Detector.from_pretrained(run_folder / "model_final.pth", device="cpu")
    assert len(loaded.predict(picture)) != len(detector.predict(picture))
    best = Detector.from_pretrained(str(run_folder / "model_best.pth"), device="cpu")
    same(best.predict(picture), detector.predict(picture))


def test_a_configuration_with_other_weights(run_folder, detector, picture):
    for source in (OWN, run_folder, run_folder / "config.yaml"):
        cfg = model_zoo.locate(source, weights=run_folder / "model_final.pth")
        assert str(run_folder / "model_final.pth") == cfg.MODEL.WEIGHTS
    loaded = Detector.from_pretrained(
        "sparse_rcnn_tiny", weights=run_folder / "model_best.pth", device="cpu"
    )
    same(loaded.predict(picture), detector.predict(picture))


def test_weights_of_another_model_are_refused(run_folder):
    options = ["MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", "42"]
    with pytest.raises(ValueError, match="other shapes"):
        Detector.from_pretrained(
            "sparse_rcnn_tiny", weights=run_folder / "model_best.pth", options=options
        )


def test_a_hugging_face_repository(monkeypatch, run_folder):
    asked = []

    def local_file(address):
        asked.append(address)
        return str(run_folder / "config.yaml")

    monkeypatch.setattr("asag.checkpoint.download.local_file", local_file)
    for address, wanted in {
        "hf://owner/name": "hf://owner/name/config.yaml",
        "hf://owner/name@v1": "hf://owner/name@v1/config.yaml",
        "hf://owner/name@v1/best/a.pth": "hf://owner/name@v1/best/config.yaml",
    }.items():
        assert address == model_zoo.locate(address).MODEL.WEIGHTS
        assert asked.pop() == wanted
    with pytest.raises(ValueError, match="hf://owner/name"):
        model_zoo.locate("hf://name")


def test_a_repository_without_configuration_says_what_to_do(monkeypatch):
    def refuse(address):
        raise OSError("no such file (404)")

    monkeypatch.setattr("asag.checkpoint.download.local_file", refuse)
    with pytest.raises(FileNotFoundError, match=r"404.*weights='hf://me/detr-resnet-50'"):
        model_zoo.locate("hf://me/detr-resnet-50")


def test_missing_sources_are_explained(tmp_path):
    def issue(error, source, **more):
        with pytest.raises(error) as caught:
            Detector.from_pretrained(source, **more)
        return str(caught.value)

    assert "has no config.yaml" in issue(FileNotFoundError, tmp_path)
    assert "no weights file" in issue(FileNotFoundError, tmp_path / "model.pth")
    (tmp_path / "model.pth").touch()
    assert "has no config.yaml beside it" in issue(FileNotFoundError, tmp_path / "model.pth")
    assert "beside it" in issue(FileNotFoundError, "https://host/a/model.pth")
    (tmp_path / "config.yaml").write_text(model_zoo.config(OWN).dump())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(model_zoo.config(OWN).dump())
    assert "has no weights yet" in issue(FileNotFoundError, other)
    assert "configuration alone" in issue(ValueError, other / "config.yaml")
    assert "no such folder or file" in issue(FileNotFoundError, tmp_path / "nothing")
    assert "did you mean sparse_rcnn_tiny" in issue(KeyError, "sparse_rcnn_tyny")
    assert "no weights of detr_r50_50ep can be had by its name alone" in issue(
        ValueError, "detr_r50_50ep"
    )
    missing = issue(FileNotFoundError, OWN, weights=tmp_path / "none.pth", device="cpu")
    assert "none.pth" in missing


@pytest.fixture
def photograph() -> Path:
    """A portrait that comes with matplotlib."""
    return Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"


def test_the_example_of_the_readme_runs(tmp_path, photograph, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from asag import Detector\n.*?)```", text, re.DOTALL)
    Image.open(photograph).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "drawn.png").is_file()
    assert re.search(r"person 0\.\d\d", capsys.readouterr().out)


def test_the_demo_takes_the_packaged_model_where_none_is_named(tmp_path, photograph, capsys):
    spec = importlib.util.spec_from_file_location("packaged_demo", ROOT / "demo" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = demo  # where dataclasses look up their annotations
    spec.loader.exec_module(demo)
    record, picture = tmp_path / "found.json", str(photograph)
    assert demo.main([picture, "--json", str(record), "--device", "cpu"]) == 0
    found = json.loads(record.read_text())["detections"]
    expected = Detector.from_pretrained(device="cpu").predict(picture, threshold=0.3)
    assert [x["category_name"] for x in found] == [x.name for x in expected] != []
    assert demo.main([picture, "--weights", str(tmp_path / "none.pth"), "--json", "x"]) == 2
    assert "none.pth" in capsys.readouterr().err
