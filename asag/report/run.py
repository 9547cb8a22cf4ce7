"""Files of a run's folder, read for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import get_asag_cfg
from ..config.loading import Changes, differences, load_config
from ..data.coco_json import read_coco_table
from ..data.coco_report import DataChecks, inspect_table
from ..data.errors import DataIssue, DatasetError
from ..data.registration import register_table
from ..evaluation.coco import EVALUATOR_TYPES, RESULTS_FILE
from ..evaluation.crowdhuman import DETECTIONS_FILE
from ..files import atomic_writer
from ..visualization.curves import Series, read_metrics

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
ENVIRONMENT_FILE = "environment.txt"
RECORD_FILE = "run.json"
# The boxes were accepted when the run started; images may have changed since.
ACCEPTED = DataChecks(decode_images=False, boxes=False)
PLACES = ("json_file", "image_root")  # of a data set, in its metadata


class RunFolderError(ValueError):
    """A folder lacks a part that the report needs; the message names it."""


@dataclass(frozen=True)
class RunRecord:
    """Facts of a run that config.yaml does not have.

    Attributes:
        recipe: the configuration file that the run started from.
        changes: overrides of the command line.
        datasets: locations of the files by name (COCO format only).
    """

    recipe: str
    changes: Changes
    datasets: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, cfg: CfgNode, recipe: CfgNode, recipe_name: str) -> RunRecord:
        """Makes the record at the start of a run; its data sets must be registered."""
        known = DatasetCatalog.list()
        names = [x for x in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if x in known]
        found = {}
        for name in dict.fromkeys(names):
            metadata = MetadataCatalog.get(name)
            places = {key: metadata.get(key) for key in PLACES}
            if metadata.get("evaluator_type") in EVALUATOR_TYPES and all(places.values()):
                found[name] = {key: str(Path(x).absolute()) for key, x in places.items()}
        return cls(recipe_name, differences(recipe, cfg), found)

    def write(self, folder: Path) -> None:
        """Writes run.json."""
        content = {"recipe": self.recipe, "changes": self.changes, "datasets": self.datasets}
        with atomic_writer(folder / RECORD_FILE) as file:
            json.dump(content, file, indent=1, default=str)

    @classmethod
    def read(cls, folder: Path) -> RunRecord | None:
        """Reads the record of a folder; None if it has none.

        Raises:
            RunFolderError: the file was not written by `write`.
        """
        path = folder / RECORD_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            changes = {key: (before, now) for key, (before, now) in content["changes"].items()}
            return cls(content["recipe"], changes, dict(content["datasets"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(f"{path} is damaged ({error!r}); delete it") from error

    def register_datasets(self) -> None:
        """Registers the data sets that are not registered in this process.

        Raises:
            DatasetError: files are missing or not usable any more; all other data sets are
                registered.
        """
        issues: list[DataIssue] = []
        for name, entry in self.datasets.items():
            if name in DatasetCatalog.list():
                continue
            try:
                table = read_coco_table(Path(entry["json_file"]), (Path(entry["image_root"]),))
                _, usable = inspect_table(table, name, ACCEPTED)
            except DatasetError as error:
                issues += error.issues
                continue
            register_table(name, usable, Path(entry["json_file"]).parent)
        if issues:
            raise DatasetError(issues)


@dataclass(frozen=True)
class Run:
    """The folder of a run.

    Attributes:
        folder: OUTPUT_DIR.
        cfg: the configuration of the run.
        series: (iteration, value) by name of the quantity.
        environment: content of environment.txt; "" without the file.
        record: None for a run that was not started by train_net.py.
    """

    folder: Path
    cfg: CfgNode
    series: Series
    environment: str
    record: RunRecord | None

    @classmethod
    def read(cls, folder: Path, cfg: CfgNode | None = None) -> Run:
        """Reads a folder.

        Args:
            folder: OUTPUT_DIR of a run.
            cfg: its configuration; default: its config.yaml.

        Raises:
            RunFolderError: the folder or one of its files is missing or damaged.
        """
        if not folder.is_dir():
            raise RunFolderError(f"{folder}: no such folder; give the OUTPUT_DIR of a run")
        lacking = [
            f"{name} ({why})"
            for name, why, needed in (
                (CONFIG_FILE, "every training writes it at its start", cfg is None),
                (
                    METRICS_FILE,
                    "training writes into it every 20 iterations and at its end",
                    True,
                ),
            )
            if needed and not (folder / name).is_file()
        ]
        if lacking:
            raise RunFolderError(
                f"{folder} is not the folder of a run, or the run has just started: it "
                f"lacks {' and '.join(lacking)}"
            )
        try:
            cfg = cfg or load_config(str(folder / CONFIG_FILE))
            series = read_metrics(folder / METRICS_FILE)
        except (KeyError, ValueError) as error:
            raise RunFolderError(f"{folder}: {error.args[0]}") from error
        environment = folder / ENVIRONMENT_FILE
        text = environment.read_text(encoding="utf-8") if environment.is_file() else ""
        return cls(folder, cfg, series, text, RunRecord.read(folder))

    @property
    def iterations(self) -> int:
        """Number of logged iterations; 0 if no finite number was logged."""
        return 1 + max((points[-1][0] for points in self.series.values()), default=-1)

    def changes(self) -> tuple[str, Changes]:
        """Returns the reference of the configuration and the differences from it."""
        if self.record is not None:
            return self.record.recipe, self.record.changes
        return "the library's defaults", differences(get_asag_cfg(), self.cfg)

    def detections_file(self, dataset: str, folder: Path | None = None) -> Path | None:
        """Returns the COCO result list of the last evaluation on a data set; None without one.

        Args:
            dataset: a name of DATASETS.TEST.
            folder: output folder of the evaluation; default: `inference` of the run.
        """
        folder = folder or self.folder / "inference"
        if len(self.cfg.DATASETS.TEST) > 1:
            folder = folder / dataset
        return next(
            (x for n in (RESULTS_FILE, DETECTIONS_FILE) if (x := folder / n).is_file()), None
        )

    def final_metrics(self) -> dict[str, float]:
        """Returns the figures of the last evaluation by `task/figure` or `data set/task/figure`."""
        figures = {
            name: points[-1]
            for name, points in self.series.items()
            if "/" in name and not name.startswith("val_loss/")
        }
        last = max((iteration for iteration, _ in figures.values()), default=0)
        return {name: value for name, (iteration, value) in figures.items() if iteration == last}
