"""Names of formats that cannot be read, and how to convert them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asag.data.errors import DataIssue, DatasetError
from asag.data.image_names import image_suffixes, walk
from asag.data.json_files import load_json

READABLE = "COCO, Pascal VOC or YOLO"
_EXPORT = f"export it as COCO, or convert it to {READABLE}"
_READ = (
    f"pass a folder, a zip, a data.yaml or a COCO JSON file; {READABLE} are read, in the layouts "
    "of docs/data.md"
)
_MAX_FILES = 20_000  # of a folder that are looked at to name it

# Suffix -> what such a file is, how to go on.
_SUFFIXES = {
    ".csv": ("a table (CSV)", "export the data as COCO JSON; Roboflow and VIA offer it"),
    ".tfrecord": ("TensorFlow's TFRecord", "export the data as COCO JSON; Roboflow offers it"),
    ".tfrecords": ("TensorFlow's TFRecord", "export the data as COCO JSON; Roboflow offers it"),
    ".record": ("TensorFlow's TFRecord", "export the data as COCO JSON; Roboflow offers it"),
    ".parquet": (
        "a table of Hugging Face datasets (Parquet)",
        "write images and COCO JSON from it with the package datasets",
    ),
    ".arrow": (
        "a table of Hugging Face datasets (Arrow)",
        "write images and COCO JSON from it with the package datasets",
    ),
    ".jsonl": ("a list of JSON lines", f"write one COCO JSON file, or convert it to {READABLE}"),
    ".ndjson": ("a list of JSON lines", f"write one COCO JSON file, or convert it to {READABLE}"),
    ".odgt": (
        "CrowdHuman's annotation format",
        "register it with asag.data.register_crowdhuman and name it in DATASETS.TRAIN",
    ),
    ".mat": ("a MATLAB file", f"convert it to {READABLE}"),
    ".h5": ("an HDF5 file", f"convert it to {READABLE}"),
    ".npz": ("a NumPy archive", f"convert it to {READABLE}"),
    ".pkl": ("a Python pickle", f"convert it to {READABLE}"),
    ".tar": ("a tar archive", "unpack it (tar -xf) and pass the folder"),
    ".tgz": ("a tar archive", "unpack it (tar -xf) and pass the folder"),
    ".gz": ("a compressed file", "unpack it (tar -xf, gunzip) and pass the folder or file"),
    ".bz2": ("a compressed file", "unpack it (tar -xf, bunzip2) and pass the folder or file"),
    ".xz": ("a compressed file", "unpack it (tar -xf, unxz) and pass the folder or file"),
    ".zst": ("a compressed file", "unpack it (unzstd) and pass the folder or file"),
    ".rar": ("a RAR archive", "unpack it and pass the folder"),
    ".7z": ("a 7-Zip archive", "unpack it and pass the folder"),
    ".mp4": ("a video", "detect in it with demo/demo.py; training needs annotated images"),
    ".avi": ("a video", "detect in it with demo/demo.py; training needs annotated images"),
    ".mov": ("a video", "detect in it with demo/demo.py; training needs annotated images"),
}


def describe_json(data: Any) -> tuple[str, str] | None:
    """Names a JSON value that is no COCO file of boxes.

    Returns:
        Name of the format and remedy; None for what is not known.
    """
    return _describe_list(data) if isinstance(data, list) else _describe_object(data)


def _describe_list(data: list[Any]) -> tuple[str, str] | None:
    first = data[0] if data and isinstance(data[0], dict) else {}
    if {"image_id", "bbox", "score"} <= first.keys():
        return "a COCO list of detections, not of annotations", "pass the annotations instead"
    if {"image_id", "bbox"} <= first.keys():
        return "a list of annotations without images and categories", "export the whole COCO file"
    if "data" in first and {"annotations", "completions"} & first.keys():
        return "Label Studio's own JSON", "export the project as COCO (with images)"
    if {"image", "annotations"} <= first.keys():
        return "CreateML's JSON", "export the data as COCO; Roboflow converts it"
    if {"name", "labels"} <= first.keys():
        return "BDD100K's or Scalabel's JSON", "convert it with `python -m scalabel.label.to_coco`"
    if {"External ID", "Label"} <= first.keys() or {"data_row", "projects"} <= first.keys():
        return "Labelbox's JSON", _EXPORT
    return None


def _describe_object(data: Any) -> tuple[str, str] | None:
    if not isinstance(data, dict):
        return None
    keys = data.keys()
    values = [x for x in list(data.values())[:5] if isinstance(x, dict)]
    if {"shapes", "imagePath"} <= keys:
        return "LabelMe's JSON (one file an image)", "convert the folder with labelme2coco"
    if "_via_img_metadata" in keys or any({"filename", "regions"} <= x.keys() for x in values):
        return "VIA's JSON", "export it from VIA as COCO"
    if "samples" in keys:
        return "FiftyOne's own JSON", "export it from FiftyOne as COCODetectionDataset"
    if {"objects", "size"} <= keys or "classTitle" in keys:
        return "Supervisely's JSON", "export the project as COCO"
    if {"items", "categories"} <= keys:
        return "Datumaro's JSON", "convert it with `datum convert -f coco`"
    if keys >= {"features", "type"}:
        return "GeoJSON", f"convert it to {READABLE} with boxes in pixels"
    annotations = data.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    if isinstance(first, dict) and "bbox" not in first:
        if "segments_info" in first:
            return "a COCO file of panoptic segmentation", "pass the file of instances"
        if "caption" in first:
            return "a COCO file of captions", "pass the file of instances"
    return None


def describe_file(path: Path) -> DataIssue:
    """Names a file that cannot be read as a data set."""
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES:
        what, remedy = _SUFFIXES[suffix]
    elif suffix in image_suffixes():
        what, remedy = "a single image", "pass the folder of the data set"
    elif suffix == ".txt":
        what, remedy = "a text file", "pass the folder of the data set, or its data.yaml"
    else:
        what, remedy = "no data set that is known", _READ
    return DataIssue(str(path), f"this is {what}", remedy)


def describe_folder(folder: Path) -> DatasetError:
    """Names what lies in a folder in which no data set was found."""
    what, remedy = next(_guesses(folder), (None, None))
    if what is None:
        return DatasetError([DataIssue(str(folder), "no training annotations found", _READ)])
    problem = f"no training annotations found: this is {what}"
    return DatasetError([DataIssue(str(folder), problem, remedy)])


def _guesses(folder: Path) -> Iterator[tuple[str, str]]:
    files = [Path(place, x) for place, found in walk(folder) for x in found][:_MAX_FILES]
    if not files:
        yield "an empty folder", "check the path; unpack the archive if there is one"
        return
    names = {x.name.lower() for x in files}
    folders = {part.lower() for x in files for part in x.parts[:-1]}
    suffixes = {x.suffix.lower() for x in files}
    if any(x.endswith("createml.json") for x in names):
        yield _describe_list([{"image": "", "annotations": []}])
    if {"labeltxt", "labeltxt-v1.0", "labeltxt-v1.5"} & folders:
        yield "DOTA's text of rotated boxes", f"convert it to {READABLE} (boxes without rotation)"
    if "label_2" in folders:
        yield "KITTI's text", "convert it with `datum convert -f coco`"
    if "wider_face_split" in folders or "wider_face_train_bbx_gt.txt" in names:
        yield "WIDER FACE's text", f"convert it to {READABLE}"
    if "ann" in folders and "meta.json" in names:
        yield _describe_object({"objects": [], "size": {}})
    yield from _guesses_by_content(folder, files)
    for suffix in (".zip", *_SUFFIXES):
        if suffix in suffixes:
            example = next(x for x in files if x.suffix.lower() == suffix)
            known = ("an archive that is still packed", "pass the zip, or unpack it")
            what, remedy = _SUFFIXES.get(suffix, known)
            yield f"{what} ({example})", remedy
    if suffixes & image_suffixes():
        yield (
            f"a folder of images without annotations ({len(files)} files)",
            "label them first, for example with CVAT, Label Studio or Roboflow, and export COCO",
        )


def _guesses_by_content(folder: Path, files: list[Path]) -> Iterator[tuple[str, str]]:
    """Looks into the first JSON and XML files."""
    for path in [x for x in files if x.suffix.lower() == ".json"][:3]:
        try:
            known = describe_json(load_json(folder / path))
        except DatasetError:
            continue
        if known:
            yield f"{known[0]} ({path})", known[1]
    for path in [x for x in files if x.suffix.lower() == ".xml"][:3]:
        head = (folder / path).read_bytes()[:2000]
        if b"<annotations" in head:
            yield f"CVAT's XML ({path})", "export the task as COCO 1.0"
