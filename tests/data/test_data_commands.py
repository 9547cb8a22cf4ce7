"""train_net.py on data as people bring it, from the command to the files it leaves."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from data_support import WIDTH, write_roboflow
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from engine_support import CONFIG, register_tiny_shapes, tiny_cfg, tiny_options
from test_data_formats import write_voc, write_yolo

from asag.data import image_check, register_dataset
from asag.data.image_io import MAX_PIXELS
from asag.engine.defaults import register_data
from asag.report.run import RunRecord
from asag.visualization.pictures import _file_stem
from train_net import build_parser, main


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Caches of its own, and no handlers that outlive a test's captured output."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    for name in ("fvcore", "detectron2", "asag"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
    setup_logger.cache_clear()


def train(output_dir: Path, *flags: object, **changes: object) -> int:
    options = tiny_options(output_dir, SOLVER__MAX_ITER=1, **changes)
    return main(["--config-file", str(CONFIG), *map(str, flags), *options])


def test_a_zip_in_yolo_format_is_divided_trained_and_evaluated(tmp_path, capsys):
    names = [f"{n} cat" for n in range(6)]
    write_yolo(tmp_path / "d", "images", "labels", names)
    (tmp_path / "d" / "classes.txt").write_text("cat\ndog\n")
    archive = shutil.make_archive(str(tmp_path / "signs"), "zip", tmp_path / "d")
    assert train(tmp_path / "out", "--data", archive, "--val-fraction", "0.34") == 0
    printed = capsys.readouterr().out
    assert "signs_train: 4 images" in printed and "signs_val: 2 images" in printed
    assert "evaluation uses a cleaned copy: converted from YOLO text" in printed
    written = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert {x["category_id"] for x in written} <= {0, 1}
    assert {x["file_name"] for x in written} == {f"{x['image_id']}.png" for x in written}
    assert {x["image_id"] for x in written} <= set(names) and len(written) > 0
    assert MetadataCatalog.get("signs_val").evaluator_type == "coco"


def test_voc_data_is_evaluated_by_both_rules(tmp_path, capsys):
    write_voc(tmp_path / "d", ".", ".", [f"{n}" for n in range(6)])
    assert train(tmp_path / "out", "--data", tmp_path / "d", "--val-fraction", "0.5") == 0
    assert "1 difficult object(s) are trained on" in capsys.readouterr().out
    last = json.loads((tmp_path / "out/metrics.json").read_text().splitlines()[-1])
    assert {"bbox/AP", "voc/AP50", "voc/AP50_11_points", "voc/AP50-cat"} <= set(last)


def test_what_a_run_remembers_of_voc_data(tmp_path):
    """The copy in COCO form is registered as what it was made of, without the XML files."""
    write_voc(tmp_path / "d", "images", "annotations", [f"{n}" for n in range(4)])
    made = register_dataset(tmp_path / "d", output_dir=tmp_path / "out", val_fraction=0.5)
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TRAIN=f"('{made.train}',)")
    before = DatasetCatalog.get(made.train)
    record = RunRecord.of(cfg, cfg, "recipe")
    assert set(record.datasets) == {made.train}
    shutil.rmtree(tmp_path / "d" / "annotations")
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove(made.train)
    record.register_datasets()
    assert MetadataCatalog.get(made.train).evaluator_type == "pascal_voc"
    assert DatasetCatalog.get(made.train) == before


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ((), {}, "single split (COCO)"),
        (("--val-fraction", 1.5), {}, "val_fraction is 1.5; it must lie between 0 and 1"),
        (("--val-fraction", 0.5, "--evaluate-on-train"), {}, "not both"),
        (("--val-fraction", 0.5), {"INPUT__MAX_PIXELS": 100}, "INPUT.MAX_PIXELS = 100"),
        (("--val-fraction", 0.5), {"INPUT__MAX_PIXELS": 0}, "INPUT.MAX_PIXELS is 0; it must be"),
    ],
)
def test_arguments_that_are_refused(tmp_path, capsys, flags, changes, message):
    folder = write_roboflow(tmp_path / "d") / "train"
    assert train(tmp_path / "out", "--data", folder, *flags, **changes) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists(), "nothing has begun"


def test_boxes_are_checked_unless_told_otherwise(tmp_path, capsys):
    def corners(name: str, data: dict) -> None:
        for annotation in data["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["bbox"] = [x, y, x + w, y + h]

    folder = write_roboflow(tmp_path / "d", corners)
    assert train(tmp_path / "out", "--data", folder) == 2
    assert "the boxes look like corners [x1, y1, x2, y2]" in capsys.readouterr().err
    args = build_parser().parse_args(["--data", str(folder)])
    assert register_data(args, tiny_cfg(tmp_path / "out", DATASETS__CHECK_BOXES=False)) is not None


def test_images_of_registered_data_are_checked_on_request(tmp_path, capsys):
    root = register_tiny_shapes(tmp_path / "shapes")
    try:
        path = Path(DatasetCatalog.get("engine_shapes_train")[3]["file_name"])
        path.write_bytes(path.read_bytes()[:100])
        assert train(tmp_path / "out", "--check-images") == 2
        assert f"{path}: cannot read image" in capsys.readouterr().err
        assert path.is_relative_to(root)
    finally:
        register_tiny_shapes()


def test_pixels_of_large_sets_are_checked_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("asag.data.image_check.SMALL_SET", WIDTH)
    folder = write_roboflow(tmp_path / "d")
    path = folder / "train" / "002.png"
    path.write_bytes(path.read_bytes()[:150])
    assert train(tmp_path / "out", "--data", folder, "--check-images") == 2
    assert f"{path}: cannot read image" in capsys.readouterr().err
    assert train(tmp_path / "out", "--data", folder) == 2, "in the middle of training"
    assert "002.png" in capsys.readouterr().err


def test_a_folder_named_like_a_registered_data_set(tmp_path):
    """Annotation files in a folder called voc_2007, which Detectron2 registers."""
    folder = write_roboflow(tmp_path / "d")
    (tmp_path / "voc_2007").mkdir()
    flags: list[str] = []
    for split, name in (("train", "train"), ("val", "valid")):
        shutil.copy(folder / name / "_annotations.coco.json", tmp_path / f"voc_2007/{split}.json")
        flags += [f"--{split}-json", str(tmp_path / f"voc_2007/{split}.json")]
        flags += [f"--{split}-images", str(folder / name)]
    made = register_data(build_parser().parse_args(flags), tiny_cfg(tmp_path / "out"))
    assert made.train == "voc_2007_2_train"


@pytest.mark.parametrize(
    ("image_id", "file_name", "stem"),
    [
        (7, "a/x.png", "7_x"),
        ("x", "a/x.png", "x"),
        ("a/x", "d/a/x.png", "x"),
        ("n 1", "x.png", "n_1_x"),
        ("\u732b" * 90, "\u732b" * 80 + "1.png", "\u732b" * 66 + "1"),
    ],
)
def test_names_of_drawn_images_fit_any_disk(image_id, file_name, stem):
    found = _file_stem({"image_id": image_id, "file_name": file_name})
    assert found == stem and len(f"{found}.png".encode()) < 255


def test_keys_and_options_of_the_page_exist():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"\b(?:INPUT|DATASETS|SOLVER|TEST|MODEL)\.[A-Z_.]+[A-Z]", page))
    cfg = tiny_cfg("unused")
    assert {"INPUT.MAX_PIXELS", "DATASETS.CHECK_BOXES"} <= keys
    assert all(key.split(".")[1] in cfg[key.split(".")[0]] for key in keys)
    assert f"{MAX_PIXELS:,}" in page and cfg.INPUT.MAX_PIXELS == MAX_PIXELS
    assert f"{image_check.SMALL_SET // 10**6} million pixels" in page
    options = {x for action in build_parser()._actions for x in action.option_strings}
    assert set(re.findall(r"--[a-z-]+", page)) <= options


def test_help_names_what_data_takes():
    text = build_parser().format_help()
    assert "folder, data.yaml, COCO json or zip" in text
