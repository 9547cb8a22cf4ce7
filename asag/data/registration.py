"""Any data set that people bring as a pair of registered data sets, in one line.

`register_dataset("path")` finds out what lies there, reads it, checks it, reports what is in it,
and registers `<name>_train` and `<name>_val` with Detectron2.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from asag.data.class_names import with_common_classes
from asag.data.coco_report import DataChecks, DatasetReport, inspect_table
from asag.data.coco_table import CocoTable
from asag.data.columns import check_boxes
from asag.data.division import divide_table
from asag.data.errors import DataIssue, DatasetError
from asag.data.formats import FoundDataset, Split, find_dataset
from asag.data.image_check import shared_images

SPLITS = ("train", "val")

_registered_here: set[str] = set()


@dataclass(frozen=True)
class RegisteredDataset:
    """The data sets that `register_dataset` registered.

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


def register_dataset(
    source: str | Path,
    *,
    name: str | None = None,
    output_dir: str | Path = "output",
    evaluate_on_train: bool = False,
    val_fraction: float | None = None,
    checks: DataChecks | None = None,
) -> RegisteredDataset:
    """Register the training and evaluation sets of a data set in COCO, Pascal VOC or YOLO format.

    Args:
        source: a folder, a data.yaml, a COCO JSON file or a zip; docs/data.md shows the layouts.
        name: prefix of the registered names; by default the name of the source, with a number
            behind it where other data sets are called so.
        output_dir: where copies of the annotations in COCO form go, if any are needed.
        evaluate_on_train: use the training images for evaluation too.
        val_fraction: share of the images of a single split that are kept for evaluation, in (0, 1).
        checks: what is checked beside the entries; None is `DataChecks()`.

    Raises:
        DatasetError: nothing that can be read, no evaluation split, or anything training could not
            work with.
        ValueError: `val_fraction` is out of range, or contradicts another argument.
    """
    found = find_dataset(source)
    splits, notes = _chosen_splits(found, evaluate_on_train, val_fraction)
    return register_coco_splits(
        name or _free_name(_name_of(Path(source).expanduser())),
        train=splits["train"],
        val=splits.get("val"),
        output_dir=output_dir,
        val_fraction=val_fraction,
        checks=checks,
        notes=(*found.notes, *notes),
    )


def register_coco_splits(
    name: str | None,
    *,
    train: Split,
    val: Split | None,
    output_dir: str | Path = "output",
    val_fraction: float | None = None,
    checks: DataChecks | None = None,
    notes: tuple[str, ...] = (),
) -> RegisteredDataset:
    """Register explicitly named splits as `<name>_train` and `<name>_val`.

    Class order is that of the training split's rising category ids; evaluation uses the same order
    and ids, matched by name. Where a file would mislead pycocotools, or is not in COCO format, a
    copy in COCO form is written below `output_dir` and the metadata's `json_file` points to it; the
    original is never touched.

    Args:
        name: prefix of both names; None is a free name after the folder of the training split.
            Registering a name again replaces it.
        train: training split, for example a `CocoSplit`.
        val: evaluation split; None evaluates on the training images.
        output_dir: where copies go.
        val_fraction: with `val` None, share of the training images that become the evaluation set.
        checks: what is checked beside the entries; None is `DataChecks()`.
        notes: sentences for the report of the training split.

    Raises:
        DatasetError: with every issue about the files; nothing is registered then.
        ValueError: `val_fraction` is out of range.
    """
    tables = _read({"train": train} | ({"val": val} if val is not None else {}))
    if val_fraction is not None and val is None:
        tables["train"], tables["val"] = divide_table(tables["train"], val_fraction)
    name = name or _free_name(_name_of(train.source))
    names = {split: f"{name}_{split}" for split in tables}
    for registered in names.values():
        if registered in DatasetCatalog and registered not in _registered_here:
            remedy = "pass another name (name=...), or rename the folder"
            problem = f"the name {registered!r} belongs to another registered data set"
            raise DatasetError([DataIssue(str(train.source), problem, remedy)])
    tables["train"] = replace(tables["train"], notes=(*notes, *tables["train"].notes))
    if "val" in tables:
        train_table, val_table, issues = with_common_classes(tables["train"], tables["val"])
        if issues:
            raise DatasetError(issues)
        tables = {"train": train_table, "val": _compared(train_table, val_table)}
    reports, tables = _inspected(tables, names, checks)
    for split, table in tables.items():
        register_table(names[split], table, Path(output_dir))
    return RegisteredDataset(
        train=names["train"],
        val=names.get("val", names["train"]),
        class_names=tables["train"].class_names,
        reports=tuple(reports),
    )


def _read(splits: Mapping[str, Split]) -> dict[str, CocoTable]:
    """The tables of all splits; raises the issues about all of them at once."""
    tables: dict[str, CocoTable] = {}
    issues: list[DataIssue] = []
    for split, files in splits.items():
        try:
            tables[split] = files.read()
        except DatasetError as error:
            issues += error.issues
    if issues:
        raise DatasetError(issues)
    return tables


def _inspected(
    tables: Mapping[str, CocoTable], names: Mapping[str, str], checks: DataChecks | None
) -> tuple[list[DatasetReport], dict[str, CocoTable]]:
    """Reports and usable tables of all splits; raises the issues about all of them at once."""
    reports, usable = [], {}
    issues: list[DataIssue] = []
    for split, table in tables.items():
        try:
            report, usable[split] = inspect_table(table, names[split], checks)
            reports.append(report)
        except DatasetError as error:
            issues += error.issues
    if issues:
        raise DatasetError(issues)
    if checks is None or checks.boxes:
        check_boxes(*usable.values())  # what each split has too few boxes to tell
    return reports, usable


def _compared(train: CocoTable, val: CocoTable) -> CocoTable:
    """The evaluation table with notes about classes that only it has boxes of, and about training
    images in it."""
    notes = list(val.notes)
    counts = [np.bincount(x.box_class, minlength=len(x.class_names)) for x in (train, val)]
    only_here = np.flatnonzero((counts[0] == 0) & (counts[1] > 0))
    if len(only_here):
        named = ", ".join(f"{val.class_names[k]} ({counts[1][k]})" for k in only_here)
        notes.append(
            "classes with boxes here but none in the training split, which cannot be learned: "
            f"{named}"
        )
    shared = shared_images(val.image_files, train.image_files)
    if shared:
        notes.append(
            f"{shared} of {len(val.image_files)} images are training images as well, which "
            "overstates accuracy"
        )
    return replace(val, notes=tuple(notes))


def _chosen_splits(
    found: FoundDataset, evaluate_on_train: bool, val_fraction: float | None
) -> tuple[dict[str, Split], list[str]]:
    """The training split, and the evaluation split if there is one and it is to be used."""
    train, val = found.splits["train"], found.splits.get("val")
    notes = []
    if val is None and "test" in found.splits and val_fraction is None and not evaluate_on_train:
        val = found.splits["test"]
        notes.append(f"there is no split val: {val.source} is used for evaluation")
    if val_fraction is not None:
        if evaluate_on_train:
            raise ValueError("pass either --val-fraction or --evaluate-on-train, not both")
        if val is not None:
            problem = f"it has an evaluation split already: {val.source}"
            remedy = "leave --val-fraction out, or pass the training annotations alone"
            raise DatasetError([DataIssue(str(found.path), problem, remedy)])
    elif val is None and not evaluate_on_train:
        raise _without_evaluation(found)
    if evaluate_on_train or val is None:
        return {"train": train}, notes
    return {"train": train, "val": val}, notes


def _without_evaluation(found: FoundDataset) -> DatasetError:
    remedy = (
        "keep a share of the images for evaluation with --val-fraction 0.2 (in Python "
        "val_fraction=0.2), or evaluate on the training images with --evaluate-on-train "
        "(evaluate_on_train=True), which overstates accuracy"
    )
    if found.path.is_file() and found.path.suffix.lower() == ".json":
        for folder in (found.path.parent, found.path.parent.parent):
            try:
                around = find_dataset(folder).splits
            except DatasetError:
                continue
            if "train" in around and len(around) > 1:
                remedy = f"pass the folder with all splits ({folder}); or {remedy}"
                break
    problem = f"no evaluation annotations found: this is a single split ({found.format})"
    notes = getattr(found.splits["train"], "notes", ())
    problem += f"; {'; '.join(notes)}" if notes else ""
    return DatasetError([DataIssue(str(found.path), problem, remedy)])


def register_table(name: str, table: CocoTable, output_dir: Path) -> None:
    """Register a table under a name, with the metadata that Detectron2's COCOEvaluator needs."""
    json_file = table.source
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
        evaluator_type=table.evaluator_type,
        thing_classes=list(table.class_names),
        thing_dataset_id_to_contiguous_id={i: k for k, i in enumerate(table.category_ids)},
        # Where the format has no ids of its own, names say more.
        file_names_in_results=table.source.suffix.lower() != ".json",
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
    for position in np.flatnonzero(table.difficult[order]):
        annotations[position]["difficult"] = 1
    ends = np.cumsum(np.bincount(table.box_image, minlength=len(table.image_ids))).tolist()
    starts = [0, *ends[:-1]]
    return [
        {
            "file_name": file_name,
            "height": height,
            "width": width,
            "image_id": image_id,
            "annotations": annotations[start:end],
        }
        for file_name, (height, width), image_id, start, end in zip(
            table.image_files, table.image_hw.tolist(), table.image_ids, starts, ends, strict=True
        )
    ]


def _name_of(source: Path) -> str:
    """A name for a data set: that of its folder, or of the zip."""
    place = source.resolve()
    if source.is_file() and source.suffix.lower() != ".zip":
        place = place.parent
    return re.sub(r"\W+", "_", place.stem if source.is_file() else place.name).strip("_") or "data"


def _free_name(name: str) -> str:
    """The name, or the first of `name_2`, `name_3`, ... that no data set from elsewhere has."""
    candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(candidate for candidate in candidates if not _foreign(candidate))


def _foreign(name: str) -> bool:
    """Returns True if a split of this name was registered by other means than this module."""
    splits = {f"{name}_{split}" for split in SPLITS}
    return bool(splits & set(DatasetCatalog.list()) - _registered_here)
