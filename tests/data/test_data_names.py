"""Image and class names that almost fit."""

import os
import unicodedata
import urllib.parse
from pathlib import Path

import pytest
from data_support import evaluate_perfect, write_image, write_roboflow
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.checkpoint.class_names import loose_name, match_names
from asag.data import DatasetError, register_dataset
from asag.data.image_names import find_images, present_files

BEAR = "b\u00e4r"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def found(root: Path, *names: str) -> list[str]:
    """Paths relative to the root; "" without a file."""
    paths = find_images((root,), names).paths
    return [os.path.relpath(x, root) if x else "" for x in paths]


@pytest.mark.parametrize(
    ("file", "name", "difference"),
    [
        ("a/1.png", "a\\1.png", "backslashes"),
        ("1.png", ".\\1.png", "backslashes"),
        ("a/1.png", "D:\\set\\a\\1.png", "the folder of another machine and backslashes"),
        ("1.png", "C:/set/1.png", "the folder of another machine"),
        ("1.png", "/content/set/train/1.png", "the folder of another machine"),
        ("a/1.png", "https://host.org/files/a/1.png?token=x#y", "the address of a server"),
        ("1.png", "file:///home/me/1.png", "the address of a server"),
        ("a/1.png", "s3://bucket/a/1.png", "the address of a server"),
        ("a/1.png", "/data/local-files/?d=set%2Fa/1.png", "the address of a server"),
        ("my cat.png", "my%20cat.png", "percent-encoding"),
        ("my cat.png", "my+cat.png", "percent-encoding"),
        (f"{BEAR}.png", "b%C3%A4r.png", "percent-encoding"),
        ("my cat.png", "my%2520cat.png", "percent-encoding"),
        ("50%.png", "50%25.png", "percent-encoding"),
        ("1.PNG", "1.png", "letter case"),
        ("IMG_1.jpg", "img_1.JPG", "letter case"),
        (f"{BEAR}.png", unicodedata.normalize("NFD", f"{BEAR}.png"), "the Unicode form"),
        (unicodedata.normalize("NFD", f"{BEAR}.png"), f"{BEAR}.png", "the Unicode form"),
        ("1.jpeg", "1.jpg", "the suffix"),
        ("1.tif", "1.TIFF", "the suffix"),
        ("1.png", "1", "the suffix"),
        ("1.png", "images/1.png", "the folder"),
        ("images/1.png", "1.png", "the folder"),
        ("1.png", " 1.png ", "letter case"),
    ],
)
def test_a_name_that_fits_one_file_is_taken_and_reported(tmp_path, file, name, difference):
    touch(tmp_path, file, "other.png")
    result = find_images((tmp_path,), [name, "other.png"])
    assert result.paths == [str(tmp_path / file), str(tmp_path / "other.png")]
    (note,) = result.notes
    assert note.startswith(f"1 image name(s) fit exactly one file but for {difference} (")
    assert present_files(tmp_path, [name]) == [False]


@pytest.mark.parametrize(
    ("files", "name", "hint"),
    [
        (("a/1.png", "b/1.png"), "1.png", "several files fit: a/1.png, b/1.png"),
        (("1.PNG", "1.Png"), "1.png", "several files fit: 1.PNG, 1.Png"),
        (("photo_1.png",), "foto_1.png", "the nearest name there is 'photo_1.png'"),
        (("1.png",), "1.jpg", "the nearest name there is '1.png'"),
        (("zebra.png",), "1.jpg", "files there are named like 'zebra.png'"),
        ((), "1.jpg", "the folder holds no files"),
        (("val/1.png",), "1.png", "the nearest name there is 'val/1.png'"),
        (("val2017/1.png",), "train/1.png", "the nearest name there is 'val2017/1.png'"),
    ],
)
def test_a_name_that_fits_none_or_several_is_not_guessed(tmp_path, files, name, hint):
    touch(tmp_path, *files)
    result = find_images((tmp_path,), [name])
    assert (result.paths, result.notes, result.hint) == ([""], (), hint)


def test_the_closest_of_several_is_taken(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png", "b/x/1.png", "1.PNG", "Case.png", "case.png")
    assert found(tmp_path, "/home/me/b/1.png", "C:\\b\\X\\1.png") == ["b/1.png", "b/x/1.png"]
    assert found(tmp_path, "z\\case.png") == ["case.png"]
    assert found(tmp_path, "train/a/1.png", "val/b/1.png") == ["a/1.png", "b/1.png"]


def test_two_names_never_share_a_file(tmp_path):
    touch(tmp_path, "1.png", "2.png")
    assert found(tmp_path, "a/1.png", "b/1.png", "a/2.png") == ["", "", "2.png"]
    assert found(tmp_path, "1.png", "x\\1.png") == ["1.png", ""]
    assert found(tmp_path, "x\\1.png", "x\\1.png") == ["1.png", "1.png"], "the same name twice"
    hint = find_images((tmp_path,), ["1.png", "x\\1.png"]).hint
    assert hint == "1.png would fit several names"


def test_the_folder_that_holds_most_is_taken(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png", "b/2.png", "c/x/3.PNG")
    roots = [tmp_path / x for x in "abc"]
    assert find_images(roots, ["1.png", "2.png"]).root == tmp_path / "b"
    assert find_images(roots, ["1.png", "9.png"]).root == tmp_path / "a"
    result = find_images(roots, ["3.png"])
    assert (result.root, result.paths) == (tmp_path / "c", [str(tmp_path / "c/x/3.PNG")])


def test_broken_links_and_folders_are_no_files(tmp_path):
    touch(tmp_path, "real/1.png")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "2.png").symlink_to("real/1.png")
    (tmp_path / "3.png").symlink_to("gone.png")
    (tmp_path / "4.png").mkdir()
    (tmp_path / "loop").symlink_to(".")
    names = ["linked/1.png", "2.png", "3.png", "4.png", "loop/2.png"]
    assert present_files(tmp_path, names) == [True, True, False, False, True]
    assert found(tmp_path, "3.png", "4.png", "LINKED\\1.PNG") == ["", "", "linked/1.png"]
    (tmp_path / "linked").unlink()
    assert found(tmp_path, "x/REAL/1.PNG") == ["real/1.png"]


NAMES = st.lists(
    st.text(st.sampled_from("abcXYZ019 _-%+\u00e4\u00df\u1e9b\u5f69\u3042"), min_size=1, max_size=6)
    .filter(lambda x: x == x.strip())
    .map(lambda x: f"{x}.png"),
    min_size=1,
    max_size=5,
    unique_by=lambda x: unicodedata.normalize("NFKC", urllib.parse.unquote(x)).casefold(),
)
MANGLED = {
    "backslashes": lambda x: "images\\" + x,
    "machine": lambda x: "/home/me/set/" + x,
    "drive": lambda x: "E:\\set\\" + x,
    "address": lambda x: "https://host/bucket/" + urllib.parse.quote(x),
    "percent": lambda x: "a/" + urllib.parse.quote(x),
    "NFD": lambda x: "a/" + unicodedata.normalize("NFD", x),
    "upper": lambda x: "a/" + x[:-4] + ".PNG",
}


@settings(deadline=None, max_examples=60)
@given(NAMES, st.sampled_from(sorted(MANGLED)))
def test_mangled_names_find_their_own_file(tmp_path_factory, names, kind):
    root = tmp_path_factory.mktemp("mangled")
    touch(root, *names)
    asked = [MANGLED[kind](x) for x in names]
    if kind in ("address", "percent") or not any("%" in x or "+" in x for x in names):
        assert found(root, *asked) == names
    else:  # a name with a percent sign may be read in two ways: another file is never taken
        assert all(x in ("", y) for x, y in zip(found(root, *asked), names, strict=True))


# The same in a data set.


def move(folder: Path, old: str, new: str) -> None:
    (folder / new).parent.mkdir(parents=True, exist_ok=True)
    (folder / old).rename(folder / new)


@pytest.mark.parametrize(
    ("named", "stored"),
    [
        (lambda split, x: f"images\\{x}", lambda x: f"images/{x}"),
        (lambda split, x: x, lambda x: x.replace(".png", ".PNG")),
        (lambda split, x: f"{BEAR}_{x}", lambda x: unicodedata.normalize("NFD", f"{BEAR}_{x}")),
        (lambda split, x: f"/content/drive/My Drive/set/{split}/{x}", lambda x: x),
        (lambda split, x: f"http://host/{split}/image%20{x}", lambda x: f"image {x}"),
    ],
    ids=["backslashes", "letter case", "Unicode form", "another machine", "address"],
)
def test_a_data_set_with_names_that_almost_fit(tmp_path, named, stored):
    """Both splits have images of the same names, which must not be taken for each other."""
    folder = tmp_path / "d"

    def change(split: str, data: dict) -> None:
        for image in data["images"]:
            old = image["file_name"]
            move(folder / split, old, stored(old))
            image["file_name"] = named(split, old)

    made = register_dataset(write_roboflow(folder, change), output_dir=tmp_path)
    assert [(x.images, x.missing_files) for x in made.reports] == [(4, 0), (2, 0)]
    for report, count in zip(made.reports, (4, 2), strict=True):
        (note,) = report.warnings
        assert note.startswith(f"{count} image name(s) fit exactly one file but for ")
    results, _ = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_images_of_the_other_split_are_not_taken(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    for file in (folder / "valid").glob("*.png"):
        file.unlink()
    with pytest.raises(DatasetError, match=r"2 of 2 image files are not in .*valid \(first: 001"):
        register_dataset(folder, output_dir=tmp_path)


def test_one_missing_file_is_told_with_the_nearest_name(tmp_path):
    folder = write_roboflow(tmp_path / "d")
    move(folder / "train", "002.png", "copy of 002.png")
    made = register_dataset(folder, output_dir=tmp_path)
    (note, _) = made.reports[0].warnings
    assert note.startswith("1 image file(s) do not exist; these images are dropped (first: 002.png")
    assert "the nearest name there is" in note


# Class names.


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("cat", "Cat", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("traffic light", "traffic_light", True),
        ("traffic light", "Traffic  Light ", True),
        ("\uff23\uff21\uff34", "cat", True),
        ("stra\u00dfe", "STRASSE", True),
        ("cat", "cats", False),
        ("cat", "c at", False),
        ("\u732b", "\u72ac", False),
    ],
)
def test_forms_of_class_names(one, other, same):
    assert (loose_name(one) == loose_name(other)) == same


@pytest.mark.parametrize(
    ("names", "known", "rows"),
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["A", "b"], ["a", "B"], [0, 1]),
        (["a", "A"], ["a", "A"], [0, 1]),
        (["a", "A"], ["a"], [0, None]),
        (["A"], ["a", "\uff21 "], [None]),
        (["A", "a "], ["a"], [None, None]),
        (["c"], ["a"], [None]),
        (["x-y"], ["x_y", "x y"], [None]),
        ([], ["a"], []),
    ],
)
def test_names_are_paired_one_to_one(names, known, rows):
    assert match_names(names, known) == rows


@pytest.mark.parametrize(
    ("spelled", "shown"),
    [
        ({"cat": "Cat"}, "'Cat' is 'cat'"),
        ({"cat": "cat ", "dog": "DOG"}, "'cat ' is 'cat', 'DOG' is 'dog'"),
    ],
)
def test_classes_spelled_differently_are_matched_and_reported(tmp_path, spelled, shown):
    def change(name: str, data: dict) -> None:
        for entry in data["categories"]:
            if name == "valid":
                entry["name"] = spelled.get(entry["name"], entry["name"])

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path)
    assert made.class_names == ("cat", "dog")
    assert f"classes spelled differently in the training split: {shown}" in made.reports[1].warnings
    results, _ = evaluate_perfect(made, tmp_path / "inference")
    assert results["bbox"]["AP-dog"] == pytest.approx(100)


def test_class_names_that_look_the_same_are_shown_with_escapes(tmp_path):
    def change(name: str, data: dict) -> None:
        form = "NFD" if name == "valid" else "NFC"
        data["categories"][0]["name"] = unicodedata.normalize(form, "caf\u00e9")

    made = register_dataset(write_roboflow(tmp_path / "d", change), output_dir=tmp_path)
    assert made.class_names == ("caf\u00e9", "dog")
    assert "'cafe\\u0301' is 'caf\\xe9'" in made.reports[1].table()


def test_a_class_with_boxes_in_one_split_only(tmp_path):
    def only_in_val(name: str, data: dict) -> None:
        if name == "train":
            data["annotations"] = [a for a in data["annotations"] if a["category_id"] == 1]

    made = register_dataset(write_roboflow(tmp_path / "a", only_in_val), output_dir=tmp_path)
    note = (
        "classes with boxes here but none in the training split, which cannot be learned: dog (3)"
    )
    assert note in made.reports[1].warnings

    def undeclared(name: str, data: dict) -> None:
        only_in_val(name, data)
        if name == "train":
            data["categories"].pop()

    folder = write_roboflow(tmp_path / "b", undeclared)
    with pytest.raises(DatasetError, match=r"adds \['dog'\]; 3 box\(es\) of 'dog' could never"):
        register_dataset(folder, output_dir=tmp_path)


def test_images_named_alike_elsewhere_do_not_matter(tmp_path):
    """A folder of masks, and a hidden one, beside the images."""
    folder = write_roboflow(tmp_path / "d")
    write_image(folder / "train" / ".thumbnails" / "001.PNG")
    write_image(folder / "train" / "masks" / "001.png")
    made = register_dataset(folder, output_dir=tmp_path)
    assert made.reports[0].warnings == []
