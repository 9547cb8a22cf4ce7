"""The predictor and the demo, with a tiny model of random weights and with a spy in its place."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from asag import load_config
from asag.checkpoint import SPARSE_RCNN
from asag.checkpoint.loading import load_weights
from asag.inference.predictor import Predictor, find_class_names

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "SparseRCNN" / "sparse_rcnn_tiny.yaml")
NAMES = ["disc", "box", "wedge", "star", "ring"]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "demo" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoint of a tiny model whose scores spread, with class names."""
    torch.manual_seed(0)
    model = build_model(tiny_config())
    for stage in model.roi_heads.stages:
        torch.nn.init.normal_(stage.class_logits.weight, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({"model": model.state_dict(), "class_names": NAMES}, path)
    return path


def tiny_config(*options):
    return load_config(CONFIG, ["MODEL.DEVICE", "cpu", *options])


def picture(height=128, width=160, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


class Spy(torch.nn.Module):
    """Answers with one box in the first pixel's color and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, batched_inputs):
        self.batches.append(batched_inputs)
        return [{"instances": self.answer(x)} for x in batched_inputs]

    @staticmethod
    def answer(x):
        found = Instances((x["height"], x["width"]))
        found.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, x["width"] / 2, x["height"] / 2]] * 2))
        found.scores = torch.tensor([0.9, 0.2])
        found.pred_classes = torch.tensor([0, 1])
        return found


def assert_same(first, second, tolerance=1e-4):
    assert first.image_size == second.image_size
    assert torch.equal(first.pred_classes, second.pred_classes)
    torch.testing.assert_close(first.scores, second.scores, atol=tolerance, rtol=0)
    torch.testing.assert_close(
        first.pred_boxes.tensor, second.pred_boxes.tensor, atol=100 * tolerance, rtol=1e-4
    )


class TestPredictor:
    @pytest.mark.parametrize(("image_format", "order"), [("RGB", (0, 1, 2)), ("BGR", (2, 1, 0))])
    def test_colors_are_turned_exactly_once(self, image_format, order):
        spy = Spy()
        image = np.zeros((4, 6, 3), np.uint8)
        image[:] = (10, 20, 30)
        Predictor(spy, class_names=NAMES, image_format=image_format)([image])
        (given,) = spy.batches[0]
        assert given["image"].shape == (3, 4, 6) and given["image"].dtype == torch.uint8
        assert given["image"][:, 0, 0].tolist() == [(10, 20, 30)[c] for c in order]

    def test_format_of_the_configuration_reaches_the_model(self, weights):
        for image_format in ("RGB", "BGR"):
            cfg = tiny_config("MODEL.WEIGHTS", str(weights), "INPUT.FORMAT", image_format)
            predictor = Predictor.from_config(cfg)
            red = np.zeros((128, 160, 3), np.uint8)
            red[..., 0] = 200
            channels = predictor.prepare(red)["image"].float().mean(dim=(1, 2)).tolist()
            assert channels == ([200, 0, 0] if image_format == "RGB" else [0, 0, 200])

    def test_equals_a_direct_model_call(self, weights):
        cfg = tiny_config("MODEL.WEIGHTS", str(weights))
        image = picture(200, 230)
        (found,) = Predictor.from_config(cfg)([image])
        model = build_model(cfg).eval()
        model.load_state_dict(torch.load(weights)["model"])
        resized = T.ResizeShortestEdge(128, 160).get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        with torch.no_grad():
            expected = model([{"image": tensor, "height": 200, "width": 230}])[0]["instances"]
        assert len(found) == len(expected) > 0
        assert_same(found, expected)

    def test_batches_of_different_sizes_equal_single_pictures(self, weights):
        cfg = tiny_config("MODEL.WEIGHTS", str(weights))
        predictor = Predictor.from_config(cfg, batch_size=3)
        sizes = [(128, 160), (160, 128), (100, 125), (60, 200), (128, 160), (128, 159), (300, 100)]
        images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
        together = predictor(images)
        for image, found in zip(images, together, strict=True):
            (alone,) = predictor([image])
            assert found.image_size == image.shape[:2]
            assert_same(found, alone)

    def test_pictures_of_one_padded_size_share_batches_up_to_the_limit(self):
        spy = Spy()
        spy.backbone = torch.nn.Identity()
        spy.backbone.size_divisibility = 32
        predictor = Predictor(spy, class_names=NAMES, batch_size=2)
        found = predictor([picture(h, 64, h) for h in (64, 40, 63, 33, 32)])
        heights = [[x["height"] for x in batch] for batch in spy.batches]
        assert heights == [[64, 40], [63, 33], [32]]
        assert [x.image_size[0] for x in found] == [64, 40, 63, 33, 32]

    def test_threshold(self):
        (found,) = Predictor(Spy(), class_names=NAMES, score_threshold=0.5)([picture()])
        assert found.scores.tolist() == pytest.approx([0.9])

    def test_no_pictures(self):
        assert Predictor(Spy(), class_names=NAMES)([]) == []

    def test_model_is_put_into_evaluation_mode_and_tracks_no_gradient(self, weights):
        predictor = Predictor.from_config(tiny_config("MODEL.WEIGHTS", str(weights)))
        assert not predictor.model.training
        assert not predictor([picture()])[0].scores.requires_grad

    @pytest.mark.parametrize(
        "image", [picture()[..., 0], picture().astype(np.float32), np.zeros((9, 9, 4), np.uint8)]
    )
    def test_refuses_other_arrays_and_says_which(self, image):
        with pytest.raises(ValueError, match=r"image 1: an array must be \(H, W, 3\) uint8"):
            Predictor(Spy(), class_names=NAMES)([picture(), image])

    def test_narrow_pictures_keep_a_pixel_and_empty_ones_are_refused(self, weights):
        predictor = Predictor.from_config(tiny_config("MODEL.WEIGHTS", str(weights)))
        prepared = predictor.prepare(np.zeros((1, 4000, 3), np.uint8))
        assert prepared["image"].shape[1] == 1 and prepared["width"] == 4000
        for shape in [(0, 40, 3), (40, 0, 3)]:
            with pytest.raises(ValueError, match="of no pixels"):
                predictor.prepare(np.zeros(shape, np.uint8))

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"image_format": "L"}, "INPUT.FORMAT is 'L'"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"score_threshold": 1.5}, "threshold is 1.5"),
        ],
    )
    def test_wrong_values(self, option, message):
        with pytest.raises(ValueError, match=message):
            Predictor(Spy(), class_names=NAMES, **option)


class TestWeights:
    def test_missing_file(self):
        with pytest.raises(FileNotFoundError, match=r"no weights file absent\.pth"):
            load_weights(torch.nn.Linear(1, 1), "absent.pth")

    def test_file_that_is_no_checkpoint(self, tmp_path):
        (tmp_path / "junk.pth").write_bytes(b"junk")
        with pytest.raises(ValueError, match=r"cannot read weights .*junk\.pth"):
            load_weights(torch.nn.Linear(1, 1), str(tmp_path / "junk.pth"))

    def test_published_names(self, tmp_path, weights):
        state = torch.load(weights)["model"]
        published = SPARSE_RCNN.to_theirs(state)
        assert published.keys() != state.keys()
        torch.save({"model": published, "epoch": 36}, tmp_path / "published.pth")
        found = [
            Predictor.from_config(tiny_config("MODEL.WEIGHTS", str(path)))([picture()])[0]
            for path in (weights, tmp_path / "published.pth")
        ]
        assert len(found[0]) > 0
        assert_same(*found, tolerance=0)

    def test_published_weights_of_other_classes(self, tmp_path, weights):
        published = SPARSE_RCNN.to_theirs(torch.load(weights)["model"])
        torch.save({"model": published}, tmp_path / "published.pth")
        cfg = tiny_config(
            *("MODEL.WEIGHTS", str(tmp_path / "published.pth")),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "7"),
        )
        with pytest.raises(ValueError, match=r"is \(5, \d+\) in the file, \(7, \d+\) in the model"):
            Predictor.from_config(cfg)

    def test_other_number_of_classes(self, weights):
        cfg = tiny_config("MODEL.WEIGHTS", str(weights), "MODEL.ROI_HEADS.NUM_CLASSES", "7")
        with pytest.raises(ValueError, match=r"is \(5, \d+\) in the file, \(7, \d+\) in the model"):
            Predictor.from_config(cfg)

    def test_weights_of_a_backbone_alone(self, tmp_path, weights):
        state = torch.load(weights)["model"]
        backbone = {k: v for k, v in state.items() if k.startswith("backbone.")}
        torch.save({"model": backbone}, tmp_path / "backbone.pth")
        cfg = tiny_config("MODEL.WEIGHTS", str(tmp_path / "backbone.pth"))
        with pytest.raises(
            ValueError, match="parameters are not in the file, such as proposal_gen"
        ):
            Predictor.from_config(cfg)


class TestClassNames:
    def test_checkpoint_comes_first_then_the_data_set_then_numbers(self):
        coco = ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "DATASETS.TEST", "('coco_2017_val',)"]
        assert find_class_names(tiny_config(), {"class_names": NAMES}) == NAMES
        assert find_class_names(tiny_config(*coco), {})[:2] == ["person", "bicycle"]
        unknown = tiny_config("DATASETS.TEST", "('nobody_knows',)")
        assert find_class_names(unknown, {}) == [f"class {k}" for k in range(5)]

    def test_names_of_another_data_set_are_passed_over_aloud(self, caplog):
        cfg = tiny_config("DATASETS.TEST", "('coco_2017_val',)")
        with caplog.at_level(logging.WARNING):
            assert find_class_names(cfg, {})[0] == "class 0"
        assert "coco_2017_val names 80 classes" in caplog.text


@pytest.fixture
def run(demo, weights, tmp_path, monkeypatch, capsys):
    """Runs the demo in an empty folder; gives status, output and error output."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments, threshold="0.02"):
        fixed = ["--config-file", CONFIG, "--weights", str(weights), "--device", "cpu"]
        status = demo.main([*fixed, "--threshold", threshold, *map(str, arguments)])
        return status, *capsys.readouterr()

    return go


def write_video(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


class TestPictures:
    def test_json_equals_the_predictor(self, run, weights, tmp_path):
        images = {"a.png": picture(seed=1), "sub/b.png": picture(90, 200, seed=2)}
        for name, image in images.items():
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "in" / name)
        status, out, _ = run("in", "--json", "found.json")
        assert status == 0
        content = json.loads(Path("found.json").read_text())
        assert [x["file_name"] for x in content["images"]] == ["in/a.png", "in/sub/b.png"]
        assert content["categories"][1] == {"id": 1, "name": "box"}
        cfg = tiny_config("MODEL.WEIGHTS", str(weights))
        predictor = Predictor.from_config(cfg, score_threshold=0.02)
        for image_id, found in enumerate(predictor(list(images.values()))):
            entries = [x for x in content["detections"] if x["image_id"] == image_id]
            assert len(entries) == len(found) > 0
            assert [x["category_name"] for x in entries] == [NAMES[k] for k in found.pred_classes]
            scores = torch.tensor([x["score"] for x in entries])
            torch.testing.assert_close(scores, found.scores, atol=1e-5, rtol=0)
            boxes = torch.tensor([x["bbox"] for x in entries])
            boxes[:, 2:] += boxes[:, :2]
            torch.testing.assert_close(boxes, found.pred_boxes.tensor, atol=1e-2, rtol=1e-4)
        assert not Path("output").exists()  # JSON alone draws nothing
        assert "2 images in" in out and "listed in found.json" in out

    def test_drawings_mirror_the_folder_and_never_collide(self, run, tmp_path):
        for name in ("a.jpg", "a.png", "a.bmp", "sub/a.jpg"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture()).save(tmp_path / "in" / name)
        status, _, _ = run("in", "--output", "in/out")
        drawn = sorted(str(p.relative_to("in/out")) for p in Path("in/out").rglob("*.*"))
        assert status == 0 and drawn == ["a.jpg", "a.png", "a_2.png", "sub/a.jpg"]
        assert np.array(Image.open("in/out/a.png")).shape == (480, 600, 3)
        _, out, _ = run("in", "--output", "in/out")
        assert "4 images in" in out  # earlier results are not taken for input

    def test_default_output_folder(self, run):
        Image.fromarray(picture()).save("a.png")
        status, out, _ = run("a.png")
        assert status == 0 and Path("output/demo/a.png").is_file()
        assert "drawn into output/demo" in out

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1", "CMYK", "LA"])
    def test_kinds_of_pictures(self, run, mode):
        image = Image.fromarray(picture())
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        name = "a.tif"
        image.save(name)
        status, _, error = run(name, "--json", "found.json")
        assert (status, error) == (0, "")

    def test_exif_rotated_pictures_come_out_upright(self, run):
        image = Image.new("RGB", (160, 128), (0, 0, 0))
        image.paste((255, 255, 255), (0, 0, 40, 128))  # left; upright it is the top
        exif = Image.Exif()
        exif[274] = 6  # to be turned clockwise by a quarter
        image.save("turned.jpg", exif=exif)
        run("turned.jpg", "--output", "out", "--json", "found.json", threshold="1")
        drawn = np.array(Image.open("out/turned.jpg")).astype(int)
        assert drawn.shape == (600, 480, 3)
        assert drawn[:100].mean() > 250 and drawn[200:].mean() < 5
        (entry,) = json.loads(Path("found.json").read_text())["images"]
        assert (entry["width"], entry["height"]) == (128, 160)

    def test_unreadable_files_are_named_and_passed_over(self, run):
        Image.fromarray(picture()).save("good.png")
        Path("junk.jpg").write_bytes(b"junk")
        Path("cut.png").write_bytes(Path("good.png").read_bytes()[:500])
        Image.new("RGB", (4000, 1)).save("line.png")
        status, out, error = run("junk.jpg", "cut.png", "line.png", "good.png", "absent.png")
        assert status == 0
        for name in ("junk.jpg", "cut.png", "absent.png"):
            assert f"skipped: {name}" in error
        assert "line.png" not in error  # narrow, and yet a picture
        assert "2 images in" in out and "3 inputs skipped" in out

    def test_status_1_when_nothing_can_be_read(self, run):
        Path("junk.jpg").write_bytes(b"junk")
        status, out, error = run("junk.jpg", "nothing/*.jpg", "--json", "found.json")
        assert status == 1 and "2 inputs skipped" in out and not Path("found.json").exists()
        assert "no file fits the pattern" in error


class TestVideos:
    def test_video_into_a_named_video_and_json(self, run, weights):
        frames = [picture(seed=i // 3) for i in range(7)]
        write_video("clip.mp4", frames)
        status, out, _ = run("clip.mp4", "--output", "marked.avi", "--json", "found.json")
        assert status == 0 and "7 frames" in out
        content = json.loads(Path("found.json").read_text())
        assert [x["frame"] for x in content["images"]] == list(range(7))
        assert content["images"][3]["time"] == pytest.approx(0.3)
        capture = cv2.VideoCapture("clip.mp4")
        decoded = [capture.read()[1][..., ::-1] for _ in range(7)]
        predictor = Predictor.from_config(
            tiny_config("MODEL.WEIGHTS", str(weights)), score_threshold=0.02
        )
        scores = [x["score"] for x in content["detections"]]
        expected = [s for image in decoded for s in predictor([image])[0].scores.tolist()]
        assert scores == pytest.approx(expected, abs=1e-4) and scores
        marked = cv2.VideoCapture("marked.avi")
        assert int(marked.get(cv2.CAP_PROP_FRAME_COUNT)) == 7
        assert marked.read()[1].shape == (480, 600, 3)

    def test_folder_with_pictures_and_videos(self, run):
        Path("in").mkdir()
        write_video("in/clip.mp4", [picture()] * 3)
        Image.fromarray(picture()).save("in/a.png")
        Path("in/junk.avi").write_bytes(b"junk")
        status, out, error = run("in", "--output", "out", "--max-frames", "2")
        assert status == 0 and Path("out/clip.mp4").stat().st_size > 0
        assert "1 image and 1 video (2 frames)" in out
        assert "cannot open video in/junk.avi" in error

    def test_camera_until_it_is_interrupted(self, run, monkeypatch):
        camera = FakeCamera(frames=3)
        monkeypatch.setattr(cv2, "VideoCapture", lambda source: camera.open(source))
        status, out, _ = run("--webcam", "2", "--output", "out", "--batch-size", "1")
        monkeypatch.undo()
        assert camera.source == 2 and camera.released
        # The frame read ahead of the interruption is lost with its batch.
        assert status == 0 and "camera 2: 2 frames" in out and "out/webcam.mp4" in out
        assert "1 video (2 frames)" in out

    def test_absent_camera(self, run, monkeypatch):
        camera = FakeCamera(frames=0, opened=False)
        monkeypatch.setattr(cv2, "VideoCapture", lambda source: camera.open(source))
        status, _, error = run("--webcam")
        assert status == 1 and "cannot open camera 0" in error


class FakeCamera:
    """A camera that is interrupted by Ctrl-C after some frames."""

    def __init__(self, frames, opened=True):
        self.left, self.opened, self.released, self.source = frames, opened, False, None

    def open(self, source):
        self.source = source
        return self

    def isOpened(self):
        return self.opened

    def get(self, _):
        return 0.0

    def read(self):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return True, picture()

    def release(self):
        self.released = True


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "there is no input"),
            (["a.png", "--max-frames", "0"], "--max-frames is 0"),
            (["a.png", "--batch-size", "0"], "batch_size is 0"),
            (["a.png", "--device", "gpu"], "device gpu"),
            (["a.png", "--output", "x.mp4"], "exactly one video or camera"),
            (["a.png", "--output", "."], "would overwrite the input a.png"),
            (["a.png", "--weights", "absent.pth"], "no weights file absent.pth"),
            (["a.png", "--weights", ""], "give --weights FILE"),
            (["a.png", "--config-file", "absent.yaml"], "absent.yaml"),
            (["a.png", "--opts", "MODEL.TYPO", "1"], "unknown configuration key MODEL.TYPO"),
            (["a.png", "--opts", "INPUT.FORMAT", "L"], "INPUT.FORMAT is 'L'"),
        ],
    )
    def test_wrong_arguments_are_explained_without_a_traceback(self, run, arguments, message):
        Image.fromarray(picture()).save("a.png")
        status, _, error = run(*arguments)
        assert status == 2 and message in error
        assert error.startswith("demo.py: ") and not error.startswith('demo.py: "')

    def test_threshold_out_of_range(self, run):
        Image.fromarray(picture()).save("a.png")
        status, _, error = run("a.png", threshold="2")
        assert status == 2 and "threshold is 2.0" in error

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_devices_without_a_gpu(self, demo, capsys):
        assert demo.choose_device("cuda", None) == "cpu"
        assert "running on the CPU" in capsys.readouterr().out
        with pytest.raises(demo.UsageError, match="finds no CUDA device"):
            demo.choose_device("cuda", "cuda:0")

    def test_unwritable_output(self, run):
        Image.fromarray(picture()).save("a.png")
        Path("blocked").touch()
        status, _, error = run("a.png", "--output", "blocked/out")
        assert status == 2 and "blocked" in error

    def test_help_shows_every_option_and_examples(self, demo):
        text = demo.build_parser().format_help()
        for word in ("--webcam", "--opts", "--json", "--batch-size", "examples:", "exit code"):
            assert word in text
