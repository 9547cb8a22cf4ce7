"""Drawings, learning curves, media files and the record of detections."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from asag.inference.media import (
    VideoReader,
    VideoReadError,
    VideoWriteError,
    VideoWriter,
    find_media,
)
from asag.inference.record import DetectionRecord
from asag.visualization import class_color, draw_comparison, draw_detections, plot_curves
from asag.visualization.curves import _accuracies, _loss_terms, read_metrics
from asag.visualization.detections import _place

NAMES = ("circle", "square")


def detections(boxes, classes, scores, size_hw=(480, 640)):
    found = Instances(size_hw)
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.pred_classes = torch.tensor(classes, dtype=torch.long)
    found.scores = torch.tensor(scores, dtype=torch.float32)
    return found


def gt(boxes, classes, size_hw=(480, 640)):
    objects = Instances(size_hw)
    objects.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    objects.gt_classes = torch.tensor(classes, dtype=torch.long)
    return objects


def gray(height=480, width=640):
    return np.full((height, width, 3), 90, dtype=np.uint8)


def outlined(picture, box, color):
    """Returns True if all four edge middles of a box have the color."""
    x0, y0, x1, y1 = box
    middles = [(x0, (y0 + y1) // 2), (x1, (y0 + y1) // 2), ((x0 + x1) // 2, y1)]
    return all(tuple(picture[y, x]) == color for x, y in middles)


class TestDrawDetections:
    def test_boxes_have_the_color_of_their_class_and_the_picture_is_kept(self):
        image = gray()
        found = detections([[100, 100, 200, 180], [300, 200, 420, 400]], [0, 1], [0.9, 0.8])
        drawn = draw_detections(image, found, NAMES)
        assert drawn.shape == (480, 640, 3) and drawn.dtype == np.uint8
        assert outlined(drawn, (100, 100, 200, 180), class_color(0))
        assert outlined(drawn, (300, 200, 420, 400), class_color(1))
        assert (image == 90).all()

    def test_threshold_hides_low_scores_but_never_ground_truth(self):
        found = detections([[100, 100, 200, 180]], [0], [0.29])
        assert (draw_detections(gray(), found, NAMES) == 90).all()
        assert (draw_detections(gray(), found, NAMES, score_threshold=0.2) != 90).any()
        objects = gt([[100, 100, 200, 180]], [0])
        assert (draw_detections(gray(), objects, NAMES, score_threshold=1.0) != 90).any()

    @pytest.mark.parametrize(
        ("size_hw", "drawn_hw"),
        [((128, 160), (480, 600)), ((480, 640), (480, 640)), ((8, 3000), (8, 3000))],
    )
    def test_small_pictures_are_enlarged(self, size_hw, drawn_hw):
        drawn = draw_detections(gray(*size_hw), detections([], [], [], size_hw), NAMES)
        assert drawn.shape[:2] == drawn_hw

    def test_boxes_follow_the_size_of_the_instances(self):
        found = detections([[50, 50, 100, 90]], [0], [0.9], size_hw=(240, 320))
        assert outlined(draw_detections(gray(), found, NAMES), (100, 100, 200, 180), class_color(0))

    def test_boxes_that_are_not_finite_or_lie_outside_do_no_harm(self):
        boxes = [[float("nan"), 0, 5, 5], [0, 0, float("inf"), 5], [-500, -500, 5000, 5000]]
        drawn = draw_detections(gray(), detections(boxes, [0, 0, 1], [0.9, 0.9, 0.9]), NAMES)
        assert tuple(drawn[240, 0]) == class_color(1)
        assert tuple(drawn[240, 639]) == class_color(1)

    def test_classes_without_a_name_are_drawn(self):
        found = detections([[100, 100, 200, 180]], [7], [0.9])
        assert outlined(draw_detections(gray(), found, NAMES), (100, 100, 200, 180), class_color(7))

    def test_a_crowd_of_one_class_drops_the_name(self):
        boxes = [[100 * (i % 6), 100 * (i // 6) + 20, 100 * (i % 6) + 60, 100 * (i // 6) + 60]
                 for i in range(24)]  # fmt: skip
        objects = gt(boxes, [0] * 24)
        named = draw_detections(gray(), objects, NAMES)
        bare = draw_detections(gray(), objects, NAMES[:1])
        assert outlined(bare, tuple(boxes[7]), class_color(0))
        assert (bare != 90).sum() < (named != 90).sum()

    @pytest.mark.parametrize(
        "image", [gray()[..., 0], gray().astype(np.float32), np.zeros((480, 640, 4), np.uint8)]
    )
    def test_refuses_other_arrays(self, image):
        with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8 array in RGB"):
            draw_detections(image, detections([], [], []), NAMES)

    def test_refuses_instances_without_boxes(self):
        with pytest.raises(ValueError, match="pred_boxes or gt_boxes"):
            draw_detections(gray(), Instances((480, 640)), NAMES)


class TestDrawComparison:
    def test_panels_are_those_of_draw_detections(self):
        found = detections([[10, 10, 60, 70]], [0], [0.9], (128, 160))
        objects = gt([[12, 12, 60, 70]], [0], (128, 160))
        image = gray(128, 160)
        sheet = draw_comparison(image, found, objects, NAMES)
        assert sheet.shape[1] == 2 * 600 + 8
        bar = sheet.shape[0] - 480
        assert np.array_equal(sheet[bar:, :600], draw_detections(image, found, NAMES))
        assert np.array_equal(sheet[bar:, 608:], draw_detections(image, objects, NAMES))
        assert (sheet[:bar] == 255).any()  # white captions

    def test_nothing_found_and_nothing_there(self):
        sheet = draw_comparison(gray(), detections([], [], []), gt([], []), NAMES)
        assert (sheet[-480:, :640] == 90).all()

    def test_tall_narrow_pictures_keep_their_captions_inside(self):
        size = (1600, 60)
        sheet = draw_comparison(gray(*size), detections([], [], [], size), gt([], [], size), NAMES)
        assert sheet.shape[1] == 2 * 60 + 8


class TestColors:
    def test_neighboring_classes_differ_clearly(self):
        colors = np.array([class_color(k) for k in range(20)], dtype=float)
        distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1)
        assert distances[~np.eye(20, dtype=bool)].min() > 25
        assert np.linalg.norm(np.diff(colors, axis=0), axis=-1).min() > 100

    def test_values_are_bytes(self):
        assert all(0 <= c <= 255 for k in range(2000) for c in class_color(k))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 40))
def test_labels_stay_inside_and_never_overlap(seed, count):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 300, (count, 2, 2))
    boxes = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)
    taken = np.empty((0, 4))
    for box in boxes:
        tag = _place(box, (rng.uniform(10, 120), 16.0), (300, 300), taken)
        if tag is None:
            continue
        assert tag[0] >= 0 and tag[1] >= 0 and tag[2] <= 299 and tag[3] <= 299
        overlap = (tag[0] < taken[:, 2]) & (taken[:, 0] < tag[2])
        overlap &= (tag[1] < taken[:, 3]) & (taken[:, 1] < tag[3])
        assert not overlap.any()
        taken = np.vstack((taken, tag))
    assert len(taken) >= 1


def test_labels_that_cannot_fit_are_left_out():
    assert _place(np.array([0, 0, 9, 9]), (20.0, 5.0), (10, 10), np.empty((0, 4))) is None


def write_metrics(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def a_run(path, offset=0.0):
    records = [
        {"iteration": i, "total_loss": 5 / (i + 1) + offset, "loss_ce": 1.0, "loss_ce_0": 2.0,
         "lr": 1e-4}
        for i in range(0, 100, 10)
    ]  # fmt: skip
    records[-1] |= {"bbox/AP": 30.0 + offset, "bbox/AP50": 50.0}
    return write_metrics(path, records)


class TestReadMetrics:
    def test_series(self, tmp_path):
        series = read_metrics(a_run(tmp_path / "metrics.json"))
        assert series["total_loss"][1] == (10, 5 / 11)
        assert series["bbox/AP"] == [(90, 30.0)]

    def test_a_resumed_run_replaces_what_the_interrupted_one_wrote(self, tmp_path):
        records = [{"iteration": i, "x": 1} for i in (0, 10, 20, 30)]
        records += [{"iteration": i, "x": 2} for i in (15, 25)]
        series = read_metrics(write_metrics(tmp_path / "m.json", records))
        assert series["x"] == [(0, 1), (10, 1), (15, 2), (25, 2)]

    def test_lines_of_one_iteration_are_joined(self, tmp_path):
        records = [{"iteration": 5, "x": 1}, {"iteration": 5, "y": 2}]
        series = read_metrics(write_metrics(tmp_path / "m.json", records))
        assert series == {"x": [(5, 1)], "y": [(5, 2)]}

    def test_a_cut_last_line_and_values_that_are_not_finite_are_left_out(self, tmp_path):
        path = tmp_path / "m.json"
        path.write_text('{"iteration": 1, "x": NaN, "y": 3}\n{"iteration": 2, "x"')
        assert read_metrics(path) == {"y": [(1, 3.0)]}

    @pytest.mark.parametrize("line", ["nonsense", "[1]", '{"x": 1}'])
    def test_a_broken_line_is_named(self, tmp_path, line):
        path = tmp_path / "m.json"
        path.write_text(f'{{"iteration": 1}}\n{line}\n{{"iteration": 2}}\n')
        with pytest.raises(ValueError, match=r"m\.json, line 2"):
            read_metrics(path)

    def test_missing_and_empty_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no metrics file"):
            read_metrics(tmp_path / "absent.json")
        (tmp_path / "empty.json").write_text("")
        with pytest.raises(ValueError, match="holds no metrics"):
            read_metrics(tmp_path / "empty.json")


class TestPlotCurves:
    def test_one_and_several_runs_without_global_state(self, tmp_path):
        first = a_run(tmp_path / "one" / "metrics.json")
        second = a_run(tmp_path / "two" / "metrics.json", offset=1.0)
        before = dict(matplotlib.rcParams)
        pictures = {}
        for name, runs in {
            "single": first,
            "list": [first, second],
            "mapping": {"one": first, "two": second},
        }.items():
            target = tmp_path / "out" / f"{name}.png"
            plot_curves(runs, target)
            pictures[name] = np.array(Image.open(target))
        assert dict(matplotlib.rcParams) == before
        assert pictures["single"].std() > 0
        assert not np.array_equal(pictures["single"], pictures["list"])
        assert np.array_equal(pictures["list"], pictures["mapping"])  # labeled by the folders

    def test_runs_without_accuracy_are_drawn(self, tmp_path):
        path = write_metrics(tmp_path / "m.json", [{"iteration": 1, "total_loss": -1.0}])
        plot_curves(path, tmp_path / "m.png")
        assert Image.open(tmp_path / "m.png").size[0] > 1000

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match="no metrics file is given"):
            plot_curves([], tmp_path / "m.png")

    def test_terms_are_those_of_the_last_stage(self):
        names = ("loss_ce", "loss_ce_0", "loss_giou_1", "lr", "total_loss")
        runs = {"run": {name: [(0, 1.0)] for name in names}}
        assert _loss_terms(runs) == ["loss_ce", "loss_giou_1"]

    def test_several_runs_show_the_main_figure_only(self):
        series = {name: [(0, 1.0)] for name in ("bbox/AP50", "bbox/AP", "bbox/APs", "lr")}
        assert _accuracies({"a": series}) == ["bbox/AP", "bbox/AP50"]
        assert _accuracies({"a": series, "b": series}) == ["bbox/AP"]


class TestFindMedia:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("a10.jpg", "a2.JPG", "sub/b.png", "sub/clip.mp4", "notes.txt", "out/a2.jpg"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    def test_folders_are_searched_whole_in_natural_order(self, folder):
        files, issues = find_media([str(folder)], exclude=folder / "out")
        assert [str(f.relative) for f in files] == [
            "a2.JPG",
            "a10.jpg",
            "sub/b.png",
            "sub/clip.mp4",
        ]
        assert [f.is_video for f in files] == [False, False, False, True]
        assert issues == []

    def test_an_excluded_folder_that_is_asked_for_is_searched(self, folder):
        files, _ = find_media([str(folder / "out")], exclude=folder / "out")
        assert [f.path.name for f in files] == ["a2.jpg"]

    def test_patterns_and_files_named_twice(self, folder):
        files, issues = find_media([f"{folder}/**/*.png", f"{folder}/a*", f"{folder}/a10.jpg"])
        assert [f.path.name for f in files] == ["b.png", "a2.JPG", "a10.jpg"]
        assert issues == []

    def test_a_file_whose_name_looks_like_a_pattern(self, folder):
        (folder / "x[1].jpg").touch()
        files, _ = find_media([str(folder / "x[1].jpg")])
        assert [f.path.name for f in files] == ["x[1].jpg"]

    def test_inputs_that_lead_to_nothing_are_named(self, folder):
        (folder / "empty").mkdir()
        inputs = [f"{folder}/absent.jpg", f"{folder}/*.gif", f"{folder}/empty"]
        files, issues = find_media(inputs)
        assert files == []
        assert [c.split(": ")[1] for c in issues] == [
            "no such file or folder",
            "no file fits the pattern",
            "no pictures or videos in it",
        ]


class TestVideo:
    @pytest.mark.parametrize("suffix", [".mp4", ".avi"])
    def test_round_trip_keeps_colors_and_order(self, tmp_path, suffix):
        path = tmp_path / "new" / f"clip{suffix}"
        colors = [(220, 30, 30), (30, 220, 30), (30, 30, 220)]
        with VideoWriter(path, fps=10.0) as writer:
            for color in colors:
                writer.write(np.full((65, 81, 3), color, dtype=np.uint8))
        with VideoReader(path) as video:
            frames = list(video)
            assert video.fps == pytest.approx(10.0)
            assert video.num_frames == 3
        assert [frame.shape for frame in frames] == [(64, 80, 3)] * 3
        for frame, color in zip(frames, colors, strict=True):
            assert np.abs(frame.mean(axis=(0, 1)) - color).max() < 15

    def test_unreadable_files_and_cameras(self, tmp_path):
        (tmp_path / "junk.mp4").write_bytes(b"not a video")
        for source in (tmp_path / "junk.mp4", tmp_path / "absent.mp4"):
            with pytest.raises(VideoReadError, match=source.name):
                VideoReader(source)

    def test_unwritable_format(self, tmp_path):
        with (
            VideoWriter(tmp_path / "clip.nonsense", 10.0) as writer,
            pytest.raises(VideoWriteError, match=r"\.mp4 or \.avi"),
        ):
            writer.write(gray(64, 64))

    def test_frames_of_another_size_are_refused(self, tmp_path):
        with VideoWriter(tmp_path / "clip.avi", 10.0) as writer:
            writer.write(gray(64, 64))
            with pytest.raises(VideoWriteError, match="frames change"):
                writer.write(gray(64, 80))


def test_record_lists_pictures_without_objects_too(tmp_path):
    record = DetectionRecord(["circle"])
    record.add("a.jpg", (480, 640), detections([[10, 20, 40, 60]], [3], [0.5]))
    record.add("b.mp4", (480, 640), detections([], [], []), frame=4)
    record.write(tmp_path / "new" / "found.json")
    content = json.loads((tmp_path / "new" / "found.json").read_text())
    assert content["categories"] == [{"id": 0, "name": "circle"}]
    assert content["images"][1] == {
        "id": 1, "file_name": "b.mp4", "width": 640, "height": 480, "frame": 4
    }  # fmt: skip
    assert content["detections"] == [
        {"image_id": 0, "file_name": "a.jpg", "category_id": 3, "category_name": "class 3",
         "bbox": [10.0, 20.0, 30.0, 40.0], "score": 0.5}
    ]  # fmt: skip
