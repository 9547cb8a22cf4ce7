"""Images are opened before training: sizes, damage, limits, links, and the cache."""

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from data_support import HEIGHT, WIDTH, write_image, write_roboflow
from detectron2.data import DatasetCatalog
from PIL import Image

from asag.data import (
    DataChecks,
    DatasetError,
    ImageReadError,
    image_check,
    read_image,
    register_dataset,
)
from asag.data.image_check import ImageFacts, inspect_images, shared_images
from asag.data.image_io import MAX_PIXELS, excess, open_image, read_size


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_check, "_known", {})
    monkeypatch.setattr(image_check, "_loaded", set())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # Pillow's default
    return tmp_path / "cache" / "asag" / "images"


def cut(path: Path, size: int = 150) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_truncated_image_is_named_before_training(tmp_path, split):
    folder = write_roboflow(tmp_path / "d")
    path = cut(folder / split / "002.png")
    with pytest.raises(DatasetError) as error:
        register_dataset(folder, output_dir=tmp_path)
    (issue,) = error.value.issues
    assert issue.file == str(path)
    assert "truncated" in issue.problem and "replace the image" in issue.remedy


def test_every_damaged_image_of_both_splits_is_named(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    for name in ("train/001.png", "train/004.png", "valid/001.png"):
        (folder / name).write_text("Sign in to download")
    with pytest.raises(DatasetError) as error:
        register_dataset(folder, output_dir=tmp_path)
    assert [Path(x.file).name for x in error.value.issues] == ["001.png", "004.png", "001.png"]


def test_large_sets_are_decoded_on_request_only(tmp_path, monkeypatch):
    folder = write_roboflow(tmp_path / "d")
    cut(folder / "train" / "002.png")  # the header is there
    monkeypatch.setattr(image_check, "SMALL_SET", 3 * WIDTH * HEIGHT)
    made = register_dataset(folder, output_dir=tmp_path)
    assert made.reports[0].images == 4
    with pytest.raises(DatasetError, match=r"002\.png: cannot read image"):
        register_dataset(folder, output_dir=tmp_path, checks=DataChecks(decode_images=True))
    monkeypatch.setattr(image_check, "SMALL_SET", 4 * WIDTH * HEIGHT)
    with pytest.raises(DatasetError, match=r"002\.png: cannot read image"):
        register_dataset(folder, output_dir=tmp_path)
    unchecked = DataChecks(decode_images=False)
    assert register_dataset(folder, output_dir=tmp_path, checks=unchecked).reports[0].images == 4


@pytest.mark.parametrize("split", ["train", "valid"])
def test_broken_links_are_missing_files(tmp_path, split):
    folder = write_roboflow(tmp_path / "d", train=4, val=3)
    path = folder / split / "001.png"
    path.unlink()
    path.symlink_to("../../gone/001.png")
    made = register_dataset(folder, output_dir=tmp_path)
    report = made.reports[split == "valid"]
    assert report.missing_files == 1
    table = report.table()
    assert "1 image file(s) do not exist; these images are dropped (first: 001.png; " in table
    assert "it links to ../../gone/001.png, which is not there" in table
    names = [Path(x["file_name"]).name for x in DatasetCatalog.get(report.name)]
    assert "001.png" not in names and len(names) == report.images - 1


def test_links_that_work_are_followed(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    (folder / "train").rename(tmp_path / "elsewhere")
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    assert register_dataset(folder, output_dir=tmp_path).reports[0].missing_files == 0


def test_unreadable_files_are_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root can read everything")
    folder = write_roboflow(tmp_path / "d")
    (folder / "train" / "001.png").chmod(0)
    with pytest.raises(DatasetError, match=r"001\.png: .*ermission"):
        register_dataset(folder, output_dir=tmp_path)


def test_another_size_than_annotated(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    write_image(folder / "valid" / "001.png", (HEIGHT, WIDTH))
    write_image(folder / "valid" / "002.png", (80, 64))
    with pytest.raises(DatasetError) as error:
        register_dataset(folder, output_dir=tmp_path)
    first, second = error.value.issues
    assert "has 128 x 160 pixels (width and height are exchanged, or" in first.problem
    assert second.problem == "has 80 x 64 pixels, but its annotation says 160 x 128"


# The limit.


def test_the_limit_is_checked_before_training(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    checks = DataChecks(max_pixels=WIDTH * HEIGHT - 1)
    with pytest.raises(DatasetError, match=r"160 x 128 = 0 million .* INPUT\.MAX_PIXELS = 20479"):
        register_dataset(folder, output_dir=tmp_path, checks=checks)
    checks = DataChecks(max_pixels=WIDTH * HEIGHT)
    assert register_dataset(folder, output_dir=tmp_path, checks=checks).reports[0].images == 4


@pytest.mark.parametrize("size", [(15_000, 12_000), (20_000, 20_000)])
def test_the_default_limit(tmp_path, size):
    """Also where Pillow alone refuses to open the file, above twice its own limit."""
    path = str(write_image(tmp_path / "large.png"))
    content = bytearray(Path(path).read_bytes())
    content[16:24] = struct.pack(">II", *size)  # of the header
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    Path(path).write_bytes(content)
    for read in (read_size, open_image, lambda x: read_image(x, "RGB")):
        with pytest.raises(ImageReadError, match=r"large\.png: .* more than INPUT\.MAX_PIXELS"):
            read(path)
    (fact,) = inspect_images([path])
    assert "INPUT.MAX_PIXELS" in fact.error
    assert fact.issue(path).remedy.endswith("or raise the key")
    pixels = size[0] * size[1]
    assert read_size(path, max_pixels=pixels) == (size[1], size[0])
    (fact,) = inspect_images([path], max_pixels=pixels)
    assert fact == ImageFacts(size[1], size[0])


def test_limits_of_pillow_count_where_they_are_higher(monkeypatch):
    assert excess(15_000, 12_000, None) and not excess(1000, 1000, None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * MAX_PIXELS)
    assert not excess(15_000, 12_000, None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert not excess(10**6, 10**6, None)
    assert excess(1000, 1000, 10)


# Sizes.


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_image(tmp_path, name, orientation):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    if orientation:
        exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif)
    path = str(tmp_path / name)
    assert read_size(path) == open_image(path).size[::-1]
    assert read_size(path) == ((40, 20) if orientation in (6, 8) else (20, 40))


def test_decoding_corrects_the_size_of_the_header(tmp_path):
    """A PNG whose orientation stands behind its pixels."""
    image = Image.new("RGB", (40, 20))
    image.save(tmp_path / "a.png")
    exif = image.getexif()
    exif[0x0112] = 6
    block = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:-12] + chunk + content[-12:])
    path = str(tmp_path / "a.png")
    assert open_image(path).size == (20, 40)
    assert inspect_images([path]) == [ImageFacts(20, 40)]
    assert inspect_images([path], decode=True) == [ImageFacts(40, 20, decoded=True)]


# The cache.


def count_reads(monkeypatch) -> list[str]:
    """Paths whose header is read or whose pixels are decoded from now on."""
    seen: list[str] = []
    for name in ("read_size", "open_image"):
        real = getattr(image_check, name)
        monkeypatch.setattr(
            image_check,
            name,
            lambda path, real=real, **values: seen.append(Path(path).name) or real(path, **values),
        )
    return seen


def test_unchanged_files_are_read_once(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(image_check, "_MIN_CACHED", 1)
    paths = [str(write_image(tmp_path / f"{n}.png")) for n in range(3)]
    seen = count_reads(monkeypatch)
    facts = inspect_images(paths)
    assert sorted(seen) == ["0.png", "1.png", "2.png"]
    assert facts == [ImageFacts(HEIGHT, WIDTH)] * 3
    seen.clear()
    assert inspect_images(paths) == facts and seen == []
    inspect_images(paths, decode=True)
    assert sorted(seen) == ["0.png", "1.png", "2.png"], "pixels had not been decoded"
    seen.clear()
    monkeypatch.setattr(image_check, "_known", {})  # as in a new process
    monkeypatch.setattr(image_check, "_loaded", set())
    decoded = inspect_images(paths, decode=True)
    assert seen == [] and all(x.decoded for x in decoded)
    (file,) = cache.iterdir()
    assert len(json.loads(file.read_text())) == 3
    write_image(tmp_path / "1.png", (30, 20))
    os.utime(tmp_path / "2.png", ns=(0, 0))
    assert inspect_images(paths)[1] == ImageFacts(20, 30)
    assert sorted(seen) == ["1.png", "2.png"], "another size, another time"


def test_failures_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(image_check, "_MIN_CACHED", 1)
    path = cut(write_image(tmp_path / "a.png"), 10)
    assert inspect_images([str(path)])[0].error
    stamp = path.stat()
    write_image(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert not inspect_images([str(path)])[0].error


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [1, 2]}', "null"])
def test_a_damaged_cache_is_an_empty_one(tmp_path, monkeypatch, cache, content):
    monkeypatch.setattr(image_check, "_MIN_CACHED", 1)
    path = str(write_image(tmp_path / "a.png"))
    inspect_images([path])
    (file,) = cache.iterdir()
    file.write_text(content)
    monkeypatch.setattr(image_check, "_known", {})
    monkeypatch.setattr(image_check, "_loaded", set())
    assert inspect_images([path]) == [ImageFacts(HEIGHT, WIDTH)]


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(image_check, "_MIN_CACHED", 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = str(write_image(tmp_path / "a.png"))
    assert inspect_images([path]) == [ImageFacts(HEIGHT, WIDTH)]


def test_shared_images(tmp_path):
    a, b = (str(write_image(tmp_path / x)) for x in ("a.png", "b.png"))
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(a).read_bytes())
    assert shared_images([str(copy), b], [a]) == 1
    assert shared_images([b, "", str(tmp_path / "gone.png")], [a, ""]) == 0
    assert shared_images([a], [a]) == 1
