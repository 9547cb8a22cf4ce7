"""The HTML report: numbers, pictures, page, and what happens where something is missing."""

import base64
import io
import json
import logging
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from engine_support import CONFIG, register_tiny_shapes, tiny_cfg, tiny_options, write_coco_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from asag.config.loading import differences
from asag.data import SparseDetectionMapper
from asag.report import REPORT_FILE, Run, RunFolderError, RunRecord, record, write_report
from asag.report.accuracy import AREAS, coco_accuracy
from asag.report.annotations import DatasetSummary, GroundTruth
from asag.report.charts import Line, line_chart, thinned
from asag.report.html import Html, table, tag
from asag.report.image_errors import (
    IGNORED,
    RIGHT,
    ImageDetections,
    ImageErrors,
    best_and_worst,
    count_errors,
    judge,
    operating_point,
)
from asag.report.matching import matching_statistics
from asag.report.page import SECTIONS
from asag.report.pictures import jpeg_uri
from asag.report.record import report_training
from asag.structures import ImageSizes
from train_net import main as train_net

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "img", "wbr"}


class Page(HTMLParser):
    """A page taken apart; wrong nesting fails at once."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.headings, self.tables, self.words = [], [], [], {}, []
        self.rows = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)
        if name == "caption":
            self.caption, self.rows = "", []
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")
        if name == "h2":
            self.headings.append("")

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name, f"</{name}> closes nothing"
        if name == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            return
        self.words.append(data)
        if "caption" in self.open:
            self.caption += data
        elif {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] == "h2":
            self.headings[-1] += data

    @property
    def text(self):
        return " ".join(self.words)

    def table(self, start):
        """Rows of the table whose caption starts so, by their first cell."""
        (rows,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        header, *body = rows
        return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body}


def read_page(folder):
    return Page((Path(folder) / REPORT_FILE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a tiny training on a COCO folder, started by the command line, report included."""
    data = write_coco_folder(tmp_path_factory.mktemp("data") / "report_shapes")
    folder = tmp_path_factory.mktemp("run")
    changes = {"SOLVER__MAX_ITER": 6, "TEST__REPORT": True, "TEST__LOSS": True}
    options = tiny_options(folder, **changes)
    arguments = ["--config-file", str(CONFIG), "--data", str(data), "--num-gpus", "0"]
    assert train_net([*arguments, *options]) == 0
    return folder


@pytest.fixture
def tool():
    import report

    return report.main


# The page of a whole training.


def test_training_writes_a_complete_page(trained):
    page = read_page(trained)
    assert page.headings == list(SECTIONS)
    ids = {x["id"] for _, x in page.tags if "id" in x}
    links = [x["href"] for name, x in page.tags if name == "a"]
    assert len(links) == len(SECTIONS)
    assert {x.removeprefix("#") for x in links} <= ids
    assert "took" in (trained / "log.txt").read_text()
    assert (trained / REPORT_FILE).stat().st_size < 3e6


def test_the_page_needs_nothing_from_elsewhere(trained):
    text = (trained / REPORT_FILE).read_text(encoding="utf-8")
    page = Page(text)
    references = [x[key] for _, x in page.tags for key in ("src", "href") if key in x]
    assert references
    assert all(x.startswith(("#", "data:image/jpeg;base64,")) for x in references)
    assert not {"script", "link", "iframe", "object", "base"} & {name for name, _ in page.tags}
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style and "@import" not in style
    assert not [x for _, attributes in page.tags for x in attributes if x.startswith("on")]


def test_pictures_and_tables_can_be_read_without_eyes(trained):
    page = read_page(trained)
    pictures = [x for name, x in page.tags if name == "img"]
    assert pictures and all(x["alt"] and x["width"] and x["height"] for x in pictures)
    assert all(x["aria-label"] for name, x in page.tags if name == "svg")
    assert all(x.get("scope") in ("col", "row") for name, x in page.tags if name == "th")
    assert len(page.tables) == sum(name == "table" for name, _ in page.tags)


def test_final_metrics_are_those_of_metrics_json(trained):
    last = json.loads((trained / "metrics.json").read_text().splitlines()[-1])
    row = read_page(trained).table("Final metrics")["bbox"]
    for figure, shown in row.items():
        if f"bbox/{figure}" in last:
            assert shown == f"{last[f'bbox/{figure}']:.2f}"
        else:
            assert shown == "–"
    assert row["AP"] != "–"


def test_figures_by_class_and_size_equal_pycocotools(trained):
    record = RunRecord.read(trained)
    json_file = record.datasets["report_shapes_val"]["json_file"]
    gt = COCO(json_file)
    results = json.loads((trained / "inference/coco_instances_results.json").read_text())
    page = read_page(trained)
    by_class, by_size = page.table("By class"), page.table("By size")

    def stats(**params):
        evaluation = COCOeval(gt, gt.loadRes([dict(x) for x in results]), "bbox")
        for key, value in params.items():
            setattr(evaluation.params, key, value)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return [f"{100 * x:.1f}" if x > -1 else "–" for x in evaluation.stats]

    whole = stats()
    assert [by_size["all"][x] for x in ("AP", "AP50", "AP75")] == whole[:3]
    assert [by_size[x]["AP"] for x in AREAS[1:]] == whole[3:6]
    for category in gt.dataset["categories"]:
        one = stats(catIds=[category["id"]])
        row = by_class[category["name"]]
        assert [row[x] for x in ("AP", "AP50", "AP75")] == one[:3]
        assert [row[f"AP {x}"] for x in AREAS[1:]] == one[3:6]
        assert int(row["objects"]) == len(gt.getAnnIds(catIds=[category["id"]]))


def test_curves_of_all_that_was_logged(trained):
    labels = [x["aria-label"] for name, x in read_page(trained).tags if name == "svg"]
    last = json.loads((trained / "metrics.json").read_text().splitlines()[-1])
    (total,) = [x for x in labels if x.startswith("Total loss")]
    assert f"to {last['val_loss/total_loss']:.3g}" in total
    for start in ("Loss terms", "Accuracy", "Learning rate", "Gradient norm", "Seconds"):
        assert any(x.startswith(start) for x in labels), start


def test_changes_of_the_recipe_come_first(trained):
    page = read_page(trained)
    changes = page.table("Differences from")
    assert changes["MODEL.DECODER.FFN_DIM"] == {"recipe": "192", "this run": "16"}
    assert "MODEL.DECODER.DROPOUT" not in changes
    assert str(CONFIG) in page.text
    assert "PyTorch" in page.text  # environment.txt


def test_data_summary_equals_the_files(trained):
    record = RunRecord.read(trained)
    overview = read_page(trained).table("Images and objects")
    for role, name in (("train", "report_shapes_train"), ("test", "report_shapes_val")):
        content = json.loads(Path(record.datasets[name]["json_file"]).read_text())
        row = overview[f"{role}: {name}"]
        assert int(row["images"]) == len(content["images"])
        assert int(row["objects"]) == len(content["annotations"])
    assert "6 of 6 queries" in read_page(trained).text or "of 6 queries" in read_page(trained).text


# The tool.


def test_tool_writes_the_same_page_where_the_data_is_not_registered(trained, tmp_path, tool):
    before = (trained / REPORT_FILE).read_text()
    for name in ("report_shapes_train", "report_shapes_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert tool([str(trained), "--output", str(tmp_path / "again.html"), "--device", "cpu"]) == 0
    again = Page((tmp_path / "again.html").read_text())
    assert again.tables == Page(before).tables


def test_tool_evaluates_other_weights_and_leaves_the_run_alone(trained, tmp_path, tool):
    # The training's own logger is still at work in this process.
    files = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != "log.txt"}
    output = tmp_path / "other.html"
    weights = str(trained / "model_best.pth")
    arguments = ["--weights", weights, "--output", str(output), "--max-images", "1"]
    assert tool([str(trained), *arguments, "--device", "cpu"]) == 0
    page = Page(output.read_text())
    assert [x for x in page.tables if x.startswith("Final metrics") and weights in x]
    assert sum(name == "img" for name, _ in page.tags) <= 4
    assert files == {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.name != "log.txt"}


def test_tool_evaluates_a_run_without_detections(trained, tmp_path, tool):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("inference", REPORT_FILE))
    assert tool([str(folder), "--device", "cpu"]) == 0
    assert read_page(folder).table("Final metrics") == read_page(trained).table("Final metrics")
    assert (folder / "inference/coco_instances_results.json").is_file()


@pytest.mark.parametrize(
    ("removed", "told"),
    [
        (["config.yaml"], ["config.yaml"]),
        (["metrics.json"], ["metrics.json"]),
        (["config.yaml", "metrics.json"], ["config.yaml", "metrics.json"]),
        (["inference", "model_final.pth", "model_best.pth"], ["no detections", "model_final.pth"]),
    ],
)
def test_tool_says_what_a_folder_lacks(trained, tmp_path, tool, capsys, removed, told):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(*removed))
    assert tool([str(folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("report: ")
    assert all(x in message for x in (str(folder), *told))


def test_tool_refuses_what_does_not_exist(trained, tmp_path, tool, capsys):
    assert tool([str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert tool([str(trained), "--weights", str(tmp_path / "x.pth")]) == 2
    assert "x.pth: no such file" in capsys.readouterr().err
    assert tool([str(trained), "--max-images", "-1"]) == 2
    assert "--max-images" in capsys.readouterr().err


def test_unknown_data_is_left_out_and_the_page_says_so(trained, tmp_path, tool):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("run.json"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("report_shapes", "gone_shapes"))
    assert tool([str(folder), "--device", "cpu"]) == 0
    page = read_page(folder)
    assert "gone_shapes_val is not known here" in page.text and "--data DIR" in page.text
    assert page.headings == list(SECTIONS)
    assert page.table("Final metrics") == read_page(trained).table("Final metrics")


def test_detections_of_other_data_are_refused(trained, tmp_path):
    register = RunRecord.read(trained)
    register.register_datasets()
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    file = folder / "inference/coco_instances_results.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[0] | {"image_id": 987}]))
    with pytest.raises(ValueError, match=r"coco_instances_results\.json has image_id 987"):
        write_report(Run.read(folder), folder / REPORT_FILE)


def test_a_damaged_record_is_named(trained, tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": "x"}')
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        RunRecord.read(tmp_path)


# Runs that lack something.


def metrics_line(**values):
    return json.dumps({"iteration": 19, "total_loss": 2.0, "lr": 0.1, **values}) + "\n"


def test_run_without_a_test_set(tmp_path):
    register_tiny_shapes()
    (tmp_path / "metrics.json").write_text(metrics_line())
    run = Run.read(tmp_path, tiny_cfg(tmp_path))
    page = Page(write_report(run, tmp_path / REPORT_FILE).read_text())
    assert page.headings == list(SECTIONS)
    for sentence in ("has not been evaluated", "no test set", "no detections", "no weights"):
        assert sentence in page.text
    assert "train: engine_shapes_train" in page.table("Images and objects")
    assert "the library's defaults" in page.text


def test_data_set_of_another_evaluator_shows_its_metrics(tmp_path):
    entry = {
        "file_name": str(tmp_path / "1.png"), "image_id": 1, "height": 40, "width": 40,
        "annotations": [
            {"bbox": [5, 5, 20, 20], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
        ],
    }  # fmt: skip
    Image.new("RGB", (40, 40)).save(entry["file_name"])
    name = "report_crowd"
    DatasetCatalog.register(name, lambda: [entry])
    MetadataCatalog.get(name).set(thing_classes=["<person>"], evaluator_type="crowdhuman")
    try:
        folder = tmp_path / "run"
        (folder / "inference").mkdir(parents=True)
        found = [{"image_id": 1, "category_id": 0, "bbox": [5, 5, 20, 20], "score": 0.9}]
        (folder / "inference/crowdhuman_detections.json").write_text(json.dumps(found))
        figures = {"bbox/AP": 61.0, "bbox/mMR": 55.5, "bbox/Recall": 80.0}
        (folder / "metrics.json").write_text(metrics_line(**figures))
        cfg = tiny_cfg(folder, DATASETS__TEST=f"('{name}',)", DATASETS__TRAIN=f"('{name}',)")
        page = Page(write_report(Run.read(folder, cfg), folder / REPORT_FILE).read_text())
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert page.table("Final metrics")["bbox"] == {"AP": "61.00", "mMR": "55.50", "Recall": "80.00"}
    assert "not evaluated by COCO's rules" in page.text
    assert "1 found, 0 missed, 0 false" in page.text
    assert "<person>" in page.table("Objects by class")  # escaped, or it were a tag
    assert not [x for x in page.tables if x.startswith("By class")]


def test_a_report_that_fails_does_not_fail_the_training(tmp_path, caplog):
    with caplog.at_level(logging.ERROR, logger=record.__name__):
        assert report_training(tiny_cfg(tmp_path), torch.nn.Identity(), []) is None
    assert str(tmp_path / REPORT_FILE) in caplog.text
    assert "metrics.json" in caplog.text


def test_training_ends_well_without_its_report(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no space on the disk")

    register_tiny_shapes()
    monkeypatch.setattr("asag.report.write_report", broken)
    options = tiny_options(tmp_path, TEST__REPORT=True, SOLVER__MAX_ITER=1)
    assert train_net(["--config-file", str(CONFIG), "--num-gpus", "0", *options]) == 0
    assert (tmp_path / "model_final.pth").is_file() and not (tmp_path / REPORT_FILE).exists()
    assert "no space on the disk" in (tmp_path / "log.txt").read_text()


# Precision and recall.


def random_scene(seed, images=6, classes=2):
    """Ground truth and detections near it, no two scores alike: COCO dict, result list."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    scores = rng.permutation(images * 40) / (images * 40) + 1e-3
    for image_id in range(1, images + 1):
        for _ in range(rng.integers(0, 6)):
            box = [*rng.uniform(0, 100, 2), *rng.uniform(8, 140, 2)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 3 + 2 * int(rng.integers(classes)),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = np.array(box) * rng.uniform(0.75, 1.3, 4)
                label = 3 + 2 * int(rng.integers(classes))
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": rng.choice([annotations[-1]["category_id"], label]).item(),
                        "bbox": near.tolist(),
                        "score": scores[len(results)].item(),
                    }
                )
    content = {
        "images": [{"id": i, "height": 300, "width": 300} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": 3 + 2 * k, "name": f"class {k}"} for k in range(classes)],
        "info": {},
    }
    return content, results


def slow_iou(a, b, crowd):
    sides = [
        min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k]) for k in range(2)
    ]  # fmt: skip
    shared = max(0, sides[0]) * max(0, sides[1])
    return shared / (a[2] * a[3] if crowd else a[2] * a[3] + b[2] * b[3] - shared)


def slow_curve(content, results, category, iou):
    """Precision at 101 recalls, one detection after the other."""
    objects = [x for x in content["annotations"] if x["category_id"] == category]
    taken, right, wrong, points = set(), 0, 0, []
    total = sum(not x["iscrowd"] for x in objects)
    for found in sorted(results, key=lambda x: -x["score"]):
        if found["category_id"] != category:
            continue
        here = [x for x in objects if x["image_id"] == found["image_id"]]
        overlap = {x["id"]: slow_iou(found["bbox"], x["bbox"], x["iscrowd"]) for x in here}
        free = [x for x in here if not x["iscrowd"] and x["id"] not in taken]
        best = max(free, key=lambda x: overlap[x["id"]], default=None)
        if best is not None and overlap[best["id"]] >= iou:
            taken.add(best["id"])
            right += 1
        elif not any(x["iscrowd"] and overlap[x["id"]] >= iou for x in here):
            wrong += 1
        points.append((right / total, right / max(1, right + wrong)))
    return [
        max((precision for recall, precision in points if recall >= r - 1e-9), default=0)
        for r in np.linspace(0, 1, 101)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_curves_equal_a_slow_reference(tmp_path, seed):
    content, results = random_scene(seed)
    file = tmp_path / "ground truth.json"
    file.write_text(json.dumps(content))
    found = coco_accuracy(file, results, class_names=["a", "b"], labels={3: 0, 5: 1})
    slow = {
        (k, iou): slow_curve(content, results, category, iou)
        for k, category in enumerate((3, 5))
        for iou in np.arange(50, 100, 5) / 100
    }
    for label in (0, 1):
        for iou in (0.5, 0.75):
            curve = found.curve(label=label, iou=iou)
            np.testing.assert_allclose(curve, slow[label, iou], atol=1e-6)
            assert found.ap(label=label, iou=iou) == pytest.approx(100 * curve.mean())
    everything = np.mean(list(slow.values()), axis=0)
    np.testing.assert_allclose(found.curve(), everything, atol=1e-6)
    assert found.ap() == pytest.approx(100 * everything.mean())


def test_classes_keep_their_names_whatever_the_order_of_ids(tmp_path):
    content, results = random_scene(0)
    file = tmp_path / "ground truth.json"
    file.write_text(json.dumps(content))
    one = coco_accuracy(file, results, class_names=["a", "b"], labels={3: 0, 5: 1})
    other = coco_accuracy(file, results, class_names=["b", "a"], labels={3: 1, 5: 0})
    assert one.ap(label=0) != one.ap(label=1)
    assert (one.ap(label=0), one.ap(label=1)) == (other.ap(label=1), other.ap(label=0))


def test_class_without_objects_has_no_curve_and_does_not_count(tmp_path):
    content, results = random_scene(1, classes=1)
    content["categories"].append({"id": 9, "name": "absent"})
    file = tmp_path / "ground truth.json"
    file.write_text(json.dumps(content))
    found = coco_accuracy(file, results, class_names=["a", "absent"], labels={3: 0, 9: 1})
    assert np.isnan(found.curve(label=1)).all() and np.isnan(found.ap(label=1))
    np.testing.assert_array_equal(found.curve(), found.curve(label=0))


def test_nothing_found_gives_no_accuracy(tmp_path):
    assert coco_accuracy(tmp_path / "x.json", [], class_names=["a"], labels={1: 0}) is None


# The best and the worst images.


def arrays(content, results):
    """Annotations and detections of every image."""
    gts, founds = [], []
    for image in content["images"]:
        rows = [x for x in content["annotations"] if x["image_id"] == image["id"]]
        annotations = [x | {"bbox_mode": 1, "category_id": x["category_id"]} for x in rows]
        gts.append(GroundTruth.of({"annotations": annotations}))
        rows = [x for x in results if x["image_id"] == image["id"]]
        rows.sort(key=lambda x: -x["score"])
        boxes = np.array([x["bbox"] for x in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([x["category_id"] for x in rows], dtype=np.int64)
        founds.append(ImageDetections(boxes, labels, np.array([x["score"] for x in rows])))
    return gts, founds


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_equal_pycocotools(seed):
    content, results = random_scene(seed)
    gts, founds = arrays(content, results)
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes([dict(x) for x in results]), "bbox")
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.areaRng = evaluation.params.areaRng[:1]
    evaluation.evaluate()
    expected = np.zeros((len(gts), 2), dtype=int)
    for entry in filter(None, evaluation.evalImgs):
        matched, ignored = entry["dtMatches"][0] > 0, entry["dtIgnore"][0] > 0
        expected[entry["image_id"] - 1] += (matched & ~ignored).sum(), ignored.sum()
    for verdict, (right, ignored) in zip(map(judge, founds, gts), expected, strict=True):
        assert (verdict == RIGHT).sum() == right
        assert (verdict == IGNORED).sum() == ignored
    assert expected.sum() > 0


def scene(gt_xyxy, found_xyxy, scores):
    gt = np.array(gt_xyxy, dtype=float).reshape(-1, 4)
    found = np.array(found_xyxy, dtype=float).reshape(-1, 4)
    m, n = len(gt), len(found)
    return (
        ImageDetections(found, np.zeros(n, dtype=np.int64), np.array(scores, dtype=float)),
        GroundTruth(gt, np.zeros(m, dtype=np.int64), np.zeros(m, dtype=bool)),
    )


def test_the_worst_image_has_the_most_misses_and_false_positives():
    a, b, c = [0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]
    scenes = [
        scene([a, b], [a, b], [0.9, 0.8]),  # perfect
        scene([a, b], [a, c], [0.9, 0.7]),  # one missed, one false
        scene([a], [a, a, c], [0.9, 0.8, 0.75]),  # twice, and something else: two false
        scene([a, b, c], [], []),  # three missed
        scene([], [], []),  # empty, and nothing found
        scene([b], [b], [0.85]),  # perfect, but less in it
    ]
    counts, threshold, f1 = count_errors(*zip(*scenes, strict=True))
    assert [(x.found, x.missed, x.false) for x in counts] == [
        (2, 0, 0), (1, 1, 0), (1, 0, 1), (0, 3, 0), (0, 0, 0), (1, 0, 0)
    ]  # fmt: skip
    assert threshold == 0.8
    assert f1 == pytest.approx(2 * 5 / (6 + 9))
    best, worst = best_and_worst(counts, 2)
    assert [x.index for x in worst] == [3, 1]
    assert [x.index for x in best] == [0, 5]
    assert best_and_worst(counts, 0) == ([], [])


def test_of_equally_many_errors_less_found_is_worse_and_more_found_is_better():
    counts = [ImageErrors(0, 5, 1, 0), ImageErrors(1, 1, 0, 1), ImageErrors(2, 3, 1, 0)]
    _, worst = best_and_worst(counts, 1)
    assert [x.index for x in worst] == [1]
    best, _ = best_and_worst([ImageErrors(3, 2, 0, 0), ImageErrors(4, 9, 0, 0)], 1)
    assert [x.index for x in best] == [4]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=12),
    st.integers(0, 4),
)
def test_operating_point_is_the_best_of_all_thresholds(rows, missed):
    scores = np.array([score / 8 for score, _ in rows])
    right = np.array([x for _, x in rows])
    objects = int(right.sum()) + missed
    threshold, f1 = operating_point(scores, right, objects)

    def quality(limit):
        kept = scores >= limit
        return 2 * int(right[kept].sum()) / max(1, int(kept.sum()) + objects)

    assert f1 == pytest.approx(max(quality(x) for x in scores))
    if right.any():
        assert f1 == pytest.approx(quality(threshold))


# Data and matching.


def test_objects_are_counted_by_class_and_size():
    annotations = [
        {"bbox": [0, 0, 10, 10], "bbox_mode": 1, "category_id": 0},
        {"bbox": [0, 0, 32, 32], "bbox_mode": 1, "category_id": 0},
        {"bbox": [0, 0, 40, 40], "bbox_mode": 0, "category_id": 1},
        {"bbox": [0, 0, 100, 100], "bbox_mode": 1, "category_id": 1},
        {"bbox": [0, 0, 100, 100], "bbox_mode": 1, "category_id": 1, "iscrowd": 1},
    ]
    found = DatasetSummary.of([GroundTruth.of({"annotations": annotations}), GroundTruth.of({})], 3)
    assert found.objects.tolist() == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert (found.images, found.empty, found.ignored, found.fullest) == (2, 1, 1, 4)
    assert found.median_side == pytest.approx(np.sqrt((32 * 32 + 40 * 40) / 2))
    assert np.isnan(DatasetSummary.of([], 2).median_side)


@pytest.mark.parametrize("matcher", ["HungarianMatcher", "OptimalTransportMatcher"])
def test_matching_equals_images_one_by_one(tmp_path, matcher):
    root = register_tiny_shapes()
    assert root.is_dir()
    changes = {"MODEL__MATCHER__NAME": matcher, "MODEL__META_ARCHITECTURE": "SparseDetector"}
    cfg = tiny_cfg(tmp_path, MODEL__PROPOSAL_GENERATOR__NUM_QUERIES=12, **changes)
    torch.manual_seed(0)
    model = build_model(cfg)
    dicts = DatasetCatalog.get("engine_shapes_train")
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = matching_statistics(cfg, model, dicts)
    assert torch.equal(rng, torch.get_rng_state()) and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    mapper = SparseDetectionMapper.without_augmentation(cfg)
    model.eval()
    objects, positives, matched, best = 0, np.zeros(2), np.zeros(12), set()
    for entry in dicts:
        batch = [mapper(entry)]
        images = model.preprocess_images(batch)
        sizes = ImageSizes.from_images(images)
        targets = model.read_targets(batch, sizes)
        with torch.no_grad():
            predictions, _ = model.forward_stages(images.tensor, sizes)
            assignment = model.matcher(predictions, targets)[:, 0]
        objects += targets.counts[0]
        for stage in range(2):
            positives[stage] += sum(int(x) >= 0 for x in assignment[stage])
        for query in range(12):
            matched[query] += int(assignment[-1, query]) >= 0
        scores = predictions.logits[-1, 0].max(dim=-1).values
        best |= set(scores.argsort(descending=True)[: targets.counts[0]].tolist())
    assert (found.images, found.objects, found.queries) == (12, objects, 12)
    assert found.positives == pytest.approx(positives / objects)
    assert found.matched.tolist() == matched.tolist()
    assert found.used == (matched > 0).sum() and found.best_scored == len(best)
    if matcher == "HungarianMatcher":
        assert found.positives == (1, 1) and found.unmatched == (0, 0)


def test_matching_stops_when_its_time_is_over_and_knows_its_models(tmp_path):
    register_tiny_shapes()
    cfg = tiny_cfg(tmp_path)
    dicts = DatasetCatalog.get("engine_shapes_train")
    assert matching_statistics(cfg, build_model(cfg), dicts, seconds=0).images == 4
    assert matching_statistics(cfg, torch.nn.Identity(), dicts) is None
    assert matching_statistics(cfg, build_model(cfg), []) is None


# Pieces.


def test_differences_ignore_lists_and_tuples(tmp_path):
    before, now = tiny_cfg(tmp_path), tiny_cfg(tmp_path)
    now.INPUT.MIN_SIZE_TRAIN = list(now.INPUT.MIN_SIZE_TRAIN)
    now.SOLVER.BASE_LR = 0.5
    assert differences(before, now) == {"SOLVER.BASE_LR": (0.0005, 0.5)}


def test_text_is_escaped_and_markup_is_not():
    assert tag("p", "<b> & 'x'", Html("<i>y</i>"), title='"') == (
        '<p title="&quot;">&lt;b&gt; &amp; &#x27;x&#x27;<i>y</i></p>'
    )
    page = Page(table(["class", "n"], [["<script>", 1]], caption="a < b"))
    assert page.tables == {"a < b": [["class", "n"], ["<script>", "1"]]}


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    st.booleans(),
)
def test_charts_stay_inside_their_drawing(values, log):
    chart = line_chart("t", [Line("a", list(enumerate(values)))], x_label="x", log_y=log)
    page = Page(chart)
    (corners,) = [x["points"] for name, x in page.tags if name == "polyline"]
    (box,) = [x["viewbox"] for name, x in page.tags if name == "svg"]
    _, _, width, height = map(float, box.split())
    places = [tuple(map(float, x.split(","))) for x in corners.split()]
    assert len(places) == len(values)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    order = np.argsort(values, kind="stable")
    heights = np.array([y for _, y in places])[order]
    assert (np.diff(heights) <= 0.11).all()  # higher values are drawn higher


def test_a_chart_of_one_point_shows_it_and_of_none_says_so():
    assert "<circle" in line_chart("t", [Line("a", [(3, 0.0)])], x_label="x")
    assert "Nothing was logged" in line_chart("t", [Line("a", [])], x_label="x")


def test_thinning_keeps_the_mean_and_the_end():
    points = [(float(i), float(i % 7)) for i in range(1001)]
    found = thinned(points, 101)
    assert len(found) == 101 and found[-1] == points[-1]
    tens = np.array(points[:-1]).reshape(100, 10, 2)
    np.testing.assert_allclose(found[:-1], tens.mean(axis=1))
    assert thinned(points[:50], 101) == points[:50]


@pytest.mark.parametrize("limit", [200_000, 12_000, 1_000])
def test_pictures_fit_their_share_of_the_page(limit):
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    uri, size = jpeg_uri(noise, limit)
    content = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"), validate=True)
    image = Image.open(io.BytesIO(content))
    assert len(content) <= limit or max(size) <= 90
    assert image.size == size and max(size) <= 720 and image.format == "JPEG"
