"""The report of runs that went wrong, and of odd names and numbers."""

import json
from html.parser import HTMLParser

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from engine_support import register_tiny_shapes, tiny_cfg, write_coco_folder

from asag.data import DatasetError
from asag.report import REPORT_FILE, Run, RunRecord, write_report
from asag.report.accuracy import read_detections
from asag.report.charts import Line, line_chart
from asag.report.html import join, tag
from asag.report.page import SECTIONS
from asag.report.result_sections import accuracy_tables, images, precision_recall
from asag.report.results import compare_with_data


def write_metrics(folder, **values):
    line = json.dumps({"iteration": 19, **values}) + "\n"
    (folder / "metrics.json").write_text(line)


def page_of(folder, **given):
    run = Run.read(folder, tiny_cfg(folder))
    return write_report(run, folder / REPORT_FILE, **given).read_text(encoding="utf-8")


def test_run_without_a_single_finite_number(tmp_path):
    register_tiny_shapes()
    write_metrics(tmp_path, total_loss=float("nan"), lr=float("inf"))
    page = page_of(tmp_path)
    assert "<dt>iterations</dt><dd>0</dd>" in page
    assert "nan" not in page.lower().partition("<h2>configuration</h2>")[0]


def test_weights_that_are_no_numbers_leave_out_the_matching_alone(tmp_path):
    register_tiny_shapes()
    write_metrics(tmp_path, total_loss=1.0)
    cfg = tiny_cfg(tmp_path)
    model = build_model(cfg)
    for parameter in model.roi_heads.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    page = page_of(tmp_path, model=model, train_dicts=DatasetCatalog.get("engine_shapes_train"))
    assert all(f"<h2>{title}</h2>" in page for title in SECTIONS)
    assert "NaN or infinite" in page


def test_one_lost_data_set_does_not_hide_the_others(tmp_path):
    data = write_coco_folder(tmp_path / "edge_shapes")
    (file,) = (data / "val").glob("*.json")
    kept = {"json_file": str(file), "image_root": str(data / "val")}
    lost = kept | {"json_file": str(file.with_name("gone.json"))}
    record = RunRecord("recipe.yaml", {}, {"edge_lost": lost, "edge_kept": kept})
    try:
        with pytest.raises(DatasetError, match=r"gone\.json"):
            record.register_datasets()
        assert "edge_kept" in DatasetCatalog.list()
        assert "edge_lost" not in DatasetCatalog.list()
    finally:
        DatasetCatalog.pop("edge_kept", None)


def test_curves_leave_out_what_is_no_number():
    nan, inf = float("nan"), float("inf")
    chart = line_chart("t", [Line("a", [(0, 1.0), (1, nan), (2, inf), (3, 2.0)])], x_label="x")
    assert "nan" not in chart and "inf" not in chart
    assert chart.count("<circle") == 2
    assert "Nothing was logged" in line_chart("t", [Line("a", [(0, nan)])], x_label="x")


@pytest.mark.parametrize("content", ["[1]", "[null]", '[{"image_id": 1}]', "{}", "[", '"x"'])
def test_files_that_are_no_detections_are_named(tmp_path, content):
    file = tmp_path / "found.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"found\.json"):
        read_detections(file)


def test_a_later_row_without_a_score_is_noticed(tmp_path):
    row = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    file = tmp_path / "found.json"
    file.write_text(json.dumps([row, {k: v for k, v in row.items() if k != "score"}]))
    with pytest.raises(ValueError, match=r"found\.json"):
        read_detections(file)


def test_names_that_utf8_cannot_write():
    assert tag("p", "caf\udce9", title="\udce9").encode("utf-8") == b'<p title="?">caf?</p>'


@pytest.mark.parametrize("detected", [True, False], ids=["some detections", "none"])
@pytest.mark.parametrize("classes", [1, 80])
def test_many_classes_of_odd_names(tmp_path, classes, detected):
    """Every other class has an object; the first of them is found."""
    names = [f"<b onclick='x'>&\"{k}</b>" for k in range(classes)]
    box = [10.0, 10.0, 40.0, 40.0]
    objects = [
        {"id": k + 1, "image_id": 1, "category_id": k + 1, "bbox": box, "area": 1600, "iscrowd": 0}
        for k in range(0, classes, 2)
    ]
    image = {"id": 1, "file_name": "<i>.png", "height": 80, "width": 80}
    categories = [{"id": k + 1, "name": x} for k, x in enumerate(names)]
    gt = tmp_path / "ground truth.json"
    gt.write_text(json.dumps({"images": [image], "annotations": objects, "categories": categories}))
    annotations = [
        {"bbox": box, "bbox_mode": 1, "category_id": x["category_id"] - 1, "iscrowd": 0}
        for x in objects
    ]
    entry = {"file_name": str(tmp_path / "<i>.png"), "image_id": 1, "height": 80, "width": 80}
    found = tmp_path / "found.json"
    rows = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9}] if detected else []
    found.write_text(json.dumps(rows))
    DatasetCatalog.register("edge_names", lambda: [entry | {"annotations": annotations}])
    MetadataCatalog.get("edge_names").set(
        thing_classes=names,
        thing_dataset_id_to_contiguous_id={k + 1: k for k in range(classes)},
        evaluator_type="coco",
        json_file=str(gt),
    )
    try:
        result = compare_with_data("edge_names", found)
    finally:
        DatasetCatalog.remove("edge_names")
        MetadataCatalog.remove("edge_names")
    page = join(accuracy_tables(result, {}), precision_recall([result]), images(result, 2))
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: tags.append((name, dict(attributes)))
    parser.feed(page)
    assert not [x for x in tags if x[0] in ("b", "i") or "onclick" in x[1]]
    assert "An image cannot be shown" in page and "&lt;i&gt;.png" in page
    assert "nan" not in page.lower()
    curves = [x for x in tags if x[0] == "svg"]
    drawn = 1 if classes == 1 else 1 + classes // 2
    assert len(curves) == (drawn if detected else 0)
    assert ("found nothing at all" in page) == (not detected)
