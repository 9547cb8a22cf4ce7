"""Report at the end of training, and the record of the start of the run that it needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import nn

logger = logging.getLogger(__name__)


def write_record(cfg: CfgNode, recipe: CfgNode, recipe_name: str) -> None:
    """Writes run.json into OUTPUT_DIR: recipe, overrides, and locations of the data sets.

    Args:
        cfg: of the run, its data sets registered.
        recipe: the configuration file without overrides.
        recipe_name: path of that file.
    """
    from .run import RunRecord

    RunRecord.of(cfg, recipe, recipe_name).write(Path(cfg.OUTPUT_DIR))


def report_training(
    cfg: CfgNode, model: nn.Module, train_dicts: Sequence[dict[str, Any]]
) -> Path | None:
    """Writes OUTPUT_DIR/report.html; errors are logged, since training has succeeded.

    Args:
        cfg: of the run.
        model: with the weights of the last evaluation, not wrapped; it is not modified.
        train_dicts: training images.

    Returns:
        Path of the page; None if it could not be written.
    """
    start = time.perf_counter()
    folder = Path(cfg.OUTPUT_DIR)
    try:
        from . import REPORT_FILE, Run, write_report

        path = write_report(
            Run.read(folder, cfg), folder / REPORT_FILE, model=model, train_dicts=train_dicts
        )
    except Exception:
        logger.exception(
            f"the training is complete, but its report {folder / 'report.html'} could not be "
            "written; TEST.REPORT False leaves it out"
        )
        return None
    logger.info(f"report {path} (took {time.perf_counter() - start:.1f} s)")
    return path
