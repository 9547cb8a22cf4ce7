"""Reading CrowdHuman's odgt files: what becomes of every entry, size cache, broken files."""

import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from asag.data import crowdhuman
from asag.data.crowdhuman import load_crowdhuman, register_crowdhuman
from asag.data.errors import DatasetError


def person(fbox, **extra):
    return {"tag": "person", "fbox": fbox, "vbox": fbox, "hbox": fbox, "extra": extra}


RECORDS = [
    {"ID": "1,a", "gtboxes": [person([-5, 2, 30.5, 40]), person([1, 1, 9, 9], ignore=1, box_id=2)]},
    {"ID": "2,b", "gtboxes": [{"tag": "mask", "fbox": [3, 4, 5, 6], "extra": {"ignore": 0}}]},
    {"ID": "3,c", "gtboxes": []},
]
SIZES = {"1,a": (64, 48), "2,b": (30, 50), "3,c": (20, 20)}


@pytest.fixture
def folder(tmp_path):
    """A small data set in the original layout."""
    (tmp_path / "Images").mkdir()
    for image_id, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / "Images" / f"{image_id}.jpg")
    write_odgt(tmp_path, RECORDS)
    return tmp_path


def write_odgt(folder, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / "annotation_val.odgt").write_text("\n".join(lines) + "\n")


def load(folder, **kwargs):
    return load_crowdhuman(folder / "annotation_val.odgt", folder / "Images", **kwargs)


def test_dataset_dicts(folder):
    first, second, third = load(folder)
    assert [first["image_id"], second["image_id"], third["image_id"]] == [1, 2, 3]
    assert first["file_name"] == str(folder / "Images" / "1,a.jpg")
    assert (first["width"], first["height"]) == (64, 48)
    assert first["annotations"][0] == {
        "bbox": [-5, 2, 30.5, 40],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
    }
    assert first["annotations"][1]["iscrowd"] == 1  # extra.ignore
    assert second["annotations"][0]["iscrowd"] == 1  # not a person
    assert third["annotations"] == []


def test_boxes_without_extra_are_real(folder):
    write_odgt(folder, [{"ID": "1,a", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3, 4]}]}])
    assert load(folder)[0]["annotations"][0]["iscrowd"] == 0


def test_rotated_images_have_the_size_they_are_loaded_with(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "Images" / "1,a.jpg", exif=exif)
    assert (load(folder)[0]["width"], load(folder)[0]["height"]) == (48, 64)


def test_degenerate_boxes_are_kept_and_counted(folder, caplog):
    write_odgt(folder, [{"ID": "1,a", "gtboxes": [person([1, 2, 0, 4])]}])
    with caplog.at_level("WARNING", logger=crowdhuman.__name__):
        assert len(load(folder)[0]["annotations"]) == 1
    assert "1 boxes without width or height" in caplog.text


def test_sizes_are_cached_until_the_image_changes(folder, monkeypatch):
    load(folder)
    opened = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path.name) or open_image(path))
    load(folder)
    assert opened == []
    Image.new("RGB", (33, 44)).save(folder / "Images" / "2,b.jpg")
    os.utime(folder / "Images" / "2,b.jpg", ns=(1, 1))
    assert (load(folder)[1]["width"], load(folder)[1]["height"]) == (33, 44)
    assert opened == ["2,b.jpg"]


def test_cache_folder_can_be_chosen(folder, tmp_path):
    load(folder, cache_dir=tmp_path / "elsewhere")
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == [
        "annotation_val_image_sizes.json"
    ]
    assert not (folder / "cache").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"1,a.jpg": [1]}', '{"1,a.jpg": 3}'])
def test_damaged_cache_is_rebuilt(folder, content):
    fresh = load(folder)
    (cache,) = (folder / "cache").iterdir()
    cache.write_text(content)
    assert load(folder) == fresh
    assert set(json.loads(cache.read_text())) == {f"{k}.jpg" for k in SIZES}


def test_unwritable_cache_is_no_obstacle(folder, caplog):
    (folder / "cache").write_text("a file where the folder should be")
    with caplog.at_level("WARNING", logger=crowdhuman.__name__):
        assert len(load(folder)) == 3
    assert "cannot be cached" in caplog.text


GOOD = json.dumps(RECORDS[0])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"ID": "2,b", "gtboxes": [', "not JSON"),
        ("[1, 2]", "a JSON list, expected an object"),
        ('{"gtboxes": []}', "`ID` is None"),
        ('{"ID": 5, "gtboxes": []}', "`ID` is 5"),
        ('{"ID": "2,b"}', "`gtboxes` of image 2,b is None"),
        ('{"ID": "2,b", "gtboxes": [7]}', "image 2,b: entry 7"),
        ('{"ID": "2,b", "gtboxes": [{"tag": "person"}]}', "image 2,b: `fbox` is None"),
        ('{"ID": "2,b", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3]}]}', "`fbox` is [1, 2, 3]"),
        ('{"ID": "2,b", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3, NaN]}]}', "`fbox` is"),
        ('{"ID": "2,b", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3, "4"]}]}', "`fbox` is"),
        (
            '{"ID": "2,b", "gtboxes": [{"tag": "person", "fbox": [1, 2, 3, 4], "extra": 1}]}',
            "`extra` is 1",
        ),
        (GOOD, "ID '1,a' is already on line 1"),
    ],
)
def test_broken_line_is_named_with_number_reason_and_remedy(folder, line, reason):
    write_odgt(folder, [GOOD, "", line])
    with pytest.raises(DatasetError) as caught:
        load(folder)
    (issue,) = caught.value.issues
    assert issue.file == f"{folder / 'annotation_val.odgt'}:3"
    assert reason in issue.problem
    assert "crowdhuman.org" in issue.remedy


def test_all_broken_lines_are_listed(folder):
    write_odgt(folder, ["{", GOOD, "}", "[]"])
    with pytest.raises(DatasetError) as caught:
        load(folder)
    assert [c.file.rpartition(":")[2] for c in caught.value.issues] == ["1", "3", "4"]


def test_binary_file_is_refused(folder):
    (folder / "annotation_val.odgt").write_bytes(b"PK\x03\x04\xff\xfe\x80")
    with pytest.raises(DatasetError, match="not text"):
        load(folder)


def test_empty_file_is_refused(folder):
    write_odgt(folder, [])
    with pytest.raises(DatasetError, match="the file is empty"):
        load(folder)


def test_missing_annotation_file_is_named(folder):
    (folder / "annotation_val.odgt").unlink()
    with pytest.raises(DatasetError, match=r"annotation_val\.odgt.*No such file"):
        load(folder)


def test_missing_image_is_named(folder):
    (folder / "Images" / "2,b.jpg").unlink()
    with pytest.raises(DatasetError) as caught:
        load(folder)
    (issue,) = caught.value.issues
    assert issue.file.endswith("2,b.jpg")
    assert "no such image" in issue.problem
    assert "unpack" in issue.remedy


def test_missing_image_folder_is_one_complaint(folder):
    (folder / "Images").rename(folder / "images_elsewhere")
    with pytest.raises(DatasetError) as caught:
        load(folder)
    (issue,) = caught.value.issues
    assert issue.file == str(folder / "Images")
    assert "none of the 3 images" in issue.problem


def test_unreadable_image_is_named(folder):
    (folder / "Images" / "2,b.jpg").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"2,b\.jpg: not a readable image"):
        load(folder)


def test_default_names_are_lazy_and_follow_the_environment(folder, monkeypatch):
    root = folder / "root"
    root.mkdir()
    (root / "crowdhuman").symlink_to(folder, target_is_directory=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    assert len(DatasetCatalog.get("crowdhuman_val")) == 3
    with pytest.raises(DatasetError, match=r"annotation_train\.odgt"):
        DatasetCatalog.get("crowdhuman_train")
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"crowdhuman_{split}")
        assert metadata.thing_classes == ["person"]
        assert metadata.evaluator_type == "crowdhuman"


def test_registering_twice_by_default_changes_nothing():
    before = DatasetCatalog.list()
    crowdhuman.register_default_crowdhuman()
    assert DatasetCatalog.list() == before


def test_explicit_paths(folder):
    name = "crowdhuman_of_a_test"
    register_crowdhuman(name, folder / "annotation_val.odgt", str(folder / "Images"))
    try:
        assert len(DatasetCatalog.get(name)) == 3
        assert MetadataCatalog.get(name).evaluator_type == "crowdhuman"
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
