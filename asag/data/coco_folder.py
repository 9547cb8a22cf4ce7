"""Any COCO-format folder as a pair of registered data sets, in one line.

`register_coco_folder("path/to/folder")` finds the annotation files and images of the usual layouts,
checks them, reports what is in them, and registers `<folder>_train` and `<folder>_val` with
Detectron2.
"""

import itertools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from asag.data.coco_json import read_coco_table
from asag.data.coco_report import DatasetReport, inspect_table
from asag.data.coco_table import CocoTable
from asag.data.errors import DataIssue, DatasetError

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation")}
LAYOUTS = """\
      annotations/train.json, annotations/val.json, images/        (or images/train/, images/val/)
      annotations/instances_train*.json, instances_val*.json, train*/, val*/             (COCO)
      train/_annotations.coco.json, valid/_annotations.coco.json, images beside them     (Roboflow)
      train.json, val.json, images beside them or in images/"""

_registered_here: set[str] = set()


@dataclass(frozen=True)
class CocoSplit:
    """Where one split lies.

    Attributes:
        json_file: COCO-format annotation file.
        image_roots: folders that its file names may be relative to; the best fitting one is used.
    """

    json_file: Path
    image_roots: tuple[Path, ...]


@dataclass(frozen=True)
class RegisteredFolder:
    """What `register_coco_folder` registered.

    Attributes:
        train: name of the training set in Detectron2's catalogs.
        val: name of the evaluation set; the same as `train` if evaluation on it was asked for.
        class_names: K names; the model's class k is `class_names[k]`.
        reports: one per registered split, to print.
    """

    train: str
    val: str
    class_names: tuple[str, ...]
    reports: tuple[DatasetReport, ...]


def register_coco_folder(
    folder: str | Path,
    *,
    name: str | None = None,
    output_dir: str | Path = "output",
    evaluate_on_train: bool = False,
) -> RegisteredFolder:
    """Register the training and evaluation sets of a folder in one of the usual layouts.

    Args:
        folder: the folder; `find_coco_splits` says which layouts are known.
        name: prefix of the registered names; by default the folder's name, with a number behind it
            where other data sets are called so.
        output_dir: where cleaned copies of annotation files go, if any are needed.
        evaluate_on_train: use the training images for evaluation too, when there is no other split.

    Raises:
        DatasetError: unknown layout, no evaluation split, or anything training could not work with.
    """
    folder = Path(folder).expanduser()
    splits = find_coco_splits(folder)
    if "train" not in splits:
        remedy = f"arrange it in one of these layouts, or name the files yourself:\n{LAYOUTS}"
        raise DatasetError([DataIssue(str(folder), "no training annotations found", remedy)])
    if "val" not in splits and not evaluate_on_train:
        remedy = (
            "split the training file (`python -m asag.data.coco_split "
            f"{splits['train'].json_file}`), or ask for evaluation on the training images "
            "(--evaluate-on-train; in Python evaluate_on_train=True), which overstates accuracy"
        )
        raise DatasetError([DataIssue(str(folder), "no evaluation annotations found", remedy)])
    return register_coco_splits(
        name or _free_name(_name_of(folder)),
        train=splits["train"],
        val=None if evaluate_on_train else splits["val"],
        output_dir=output_dir,
    )


def register_coco_splits(
    name: str, *, train: CocoSplit, val: CocoSplit | None, output_dir: str | Path = "output"
) -> RegisteredFolder:
    """Register explicitly named files as `<name>_train` and `<name>_val`.

    Class order is that of the training file's rising category ids; evaluation uses the same order
    and ids, matched by name. Where a file would mislead pycocotools, a cleaned copy is written
    below `output_dir` and the metadata's `json_file` points to it; the original is never touched.

    Args:
        name: prefix of both names. Registering a name again replaces it.
        train: training split.
        val: evaluation split; None evaluates on the training images.
        output_dir: where cleaned copies go.

    Raises:
        DatasetError: with every issue about the files; nothing is registered then.
    """
    found = {"train": train} | ({"val": val} if val is not None else {})
    names = {split: f"{name}_{split}" for split in found}
    for registered in names.values():
        if registered in DatasetCatalog and registered not in _registered_here:
            remedy = "pass another name (name=...)"
            problem = f"the name {registered!r} belongs to another registered data set"
            raise DatasetError([DataIssue(str(train.json_file), problem, remedy)])

    tables: dict[str, CocoTable] = {}
    issues: list[DataIssue] = []
    for split, files in found.items():
        try:
            tables[split] = read_coco_table(files.json_file, files.image_roots)
        except DatasetError as error:
            issues += error.issues
    if not issues and "val" in tables:
        tables["val"], issues = _with_classes_of(tables["train"], tables["val"])
    if issues:
        raise DatasetError(issues)

    reports = []
    for split, table in tables.items():
        report, usable = inspect_table(table, names[split])
        reports.append(report)
        tables[split] = usable
    for split, table in tables.items():
        register_table(names[split], table, Path(output_dir))
    return RegisteredFolder(
        train=names["train"],
        val=names.get("val", names["train"]),
        class_names=tables["train"].class_names,
        reports=tuple(reports),
    )


def find_coco_splits(folder: str | Path) -> dict[str, CocoSplit]:
    """Find the "train" and "val" splits of a folder; a split that is not there is left out.

    Raises:
        DatasetError: the folder does not exist, or several files could be the same split.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DatasetError([DataIssue(str(folder), "no such folder", "check the path")])
    splits = {}
    for split, aliases in SPLIT_FOLDERS.items():
        candidates = _annotation_files(folder, aliases)
        if len(candidates) > 1:
            found = ", ".join(str(c.relative_to(folder)) for c in candidates)
            problem = f"several files could be the {split} annotations: {found}"
            remedy = "keep one of them, or name the annotation file and image folder yourself"
            raise DatasetError([DataIssue(str(folder), problem, remedy)])
        if candidates:
            splits[split] = CocoSplit(candidates[0], _image_roots(folder, candidates[0], aliases))
    return splits


def register_table(name: str, table: CocoTable, output_dir: Path) -> None:
    """Register a table under a name, with what Detectron2's COCOEvaluator needs."""
    json_file = table.json_file
    if table.repairs:
        json_file = output_dir / "datasets" / f"{name}.json"
        table.write(json_file)
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    _registered_here.add(name)
    DatasetCatalog.register(name, lambda: dataset_dicts(table))
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(table.image_root),
        evaluator_type="coco",
        thing_classes=list(table.class_names),
        thing_dataset_id_to_contiguous_id={i: k for k, i in enumerate(table.category_ids)},
    )


def dataset_dicts(table: CocoTable) -> list[dict]:
    """A table in Detectron2's standard form: one dict an image in file order, boxes XYWH_ABS."""
    order = np.argsort(table.box_image, kind="stable")
    columns = zip(
        table.boxes_xywh[order].tolist(),
        table.box_class[order].tolist(),
        table.iscrowd[order].astype(np.int64).tolist(),
        strict=True,
    )
    annotations = [
        {
            "bbox": box,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": label,
            "iscrowd": crowd,
        }
        for box, label, crowd in columns
    ]
    ends = np.cumsum(np.bincount(table.box_image, minlength=len(table.image_ids))).tolist()
    starts = [0, *ends[:-1]]
    root = str(table.image_root)
    return [
        {
            "file_name": os.path.join(root, file_name),
            "height": height,
            "width": width,
            "image_id": image_id,
            "annotations": annotations[start:end],
        }
        for file_name, (height, width), image_id, start, end in zip(
            table.file_names, table.image_hw.tolist(), table.image_ids, starts, ends, strict=True
        )
    ]


def _name_of(folder: Path) -> str:
    return re.sub(r"\W+", "_", folder.resolve().name).strip("_") or "data"


def _free_name(name: str) -> str:
    """The name, or the first of `name_2`, `name_3`, ... that no data set from elsewhere has."""
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if not _foreign(candidate))


def _foreign(name: str) -> bool:
    """Whether a split of this name was registered by other means than this module."""
    splits = {f"{name}_{split}" for split in SPLIT_FOLDERS}
    return bool(splits & set(DatasetCatalog.list()) - _registered_here)


def _annotation_files(folder: Path, aliases: tuple[str, ...]) -> list[Path]:
    """Files of the first layout that has any for this split."""
    patterns = (
        [f"annotations/{alias}.json" for alias in aliases],
        [f"annotations/instances_{alias}*.json" for alias in aliases],
        [f"annotations/*_{alias}.json" for alias in aliases],
        [f"{alias}/_annotations.coco.json" for alias in aliases],
        [f"{alias}/annotations.json" for alias in aliases],
        [f"{alias}.json" for alias in aliases],
    )
    for layout in patterns:
        files = sorted({file for pattern in layout for file in folder.glob(pattern)})
        if files:
            return files
    return []


def _image_roots(folder: Path, json_file: Path, aliases: tuple[str, ...]) -> tuple[Path, ...]:
    """Existing folders that may hold the images of an annotation file, likeliest first."""
    stem = json_file.stem.removeprefix("instances_")
    places = [stem, *aliases]
    roots = [json_file.parent] if json_file.parent.name in aliases else []
    roots += [folder / "images" / place for place in places] + [folder / place for place in places]
    roots += [folder / "images", json_file.parent, folder]
    return tuple(dict.fromkeys(root for root in roots if root.is_dir()))


def _with_classes_of(train: CocoTable, val: CocoTable) -> tuple[CocoTable, list[DataIssue]]:
    """The evaluation table with the training table's class order and ids, matched by name."""
    if (train.class_names, train.category_ids) == (val.class_names, val.category_ids):
        return val, []
    lacking = [name for name in train.class_names if name not in val.class_names]
    extra = [name for name in val.class_names if name not in train.class_names]
    if lacking or extra:
        parts = [f"lacks {lacking}"] * bool(lacking) + [f"adds {extra}"] * bool(extra)
        problem = f"its classes differ from {train.json_file.name}'s: it {' and '.join(parts)}"
        remedy = "declare the same category names in both files (a class may have no boxes)"
        return val, [DataIssue(str(val.json_file), problem, remedy)]
    new_label = np.array([train.class_names.index(name) for name in val.class_names])
    relabeled = replace(
        val,
        class_names=train.class_names,
        category_ids=train.category_ids,
        box_class=new_label[val.box_class],
        repairs=(*val.repairs, "category ids or their order differ from the training file's"),
    )
    return relabeled, []
