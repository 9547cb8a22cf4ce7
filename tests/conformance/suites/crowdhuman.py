"""CrowdHuman metrics compared with figures of the benchmark's published evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from asag.evaluation.crowdhuman_metrics import crowdhuman_metrics_from_coco
from conformance.suites.common import Check, Checks, UnknownCase

SUITE = "crowdhuman"

_METRIC_OF_FIELD = {"ap": "AP", "mmr": "mMR", "recall": "Recall"}
_COUNT_OF_FIELD = {
    "num_boxes": "real_boxes",
    "num_ignored": "ignored_boxes",
}
_KEYS = {
    "": {"ground_truth", "results", "expected"},
    "ground_truth": {"images", "annotations"},
    "expected": set(_METRIC_OF_FIELD.values()),
}


def verify(path: Path) -> Checks:
    """Compares AP, mMR, Recall and, if present, the counts of one json file.

    Raises:
        UnknownCase: the file is not JSON or lacks a key.
    """
    case = _load(path)
    metrics = crowdhuman_metrics_from_coco(case["ground_truth"], case["results"])
    expected = case["expected"]
    for field, key in _METRIC_OF_FIELD.items():
        yield Check(key, getattr(metrics, field), expected[key], 1e-6)
    for field, key in _COUNT_OF_FIELD.items():
        if key in expected:
            yield Check(key, getattr(metrics, field), expected[key], 0.0)


def _load(path: Path) -> dict:
    """Parses the file; its keys must be those of this suite."""
    try:
        case = json.loads(path.read_bytes())
    except ValueError as error:
        raise UnknownCase(f"{path}: not a JSON file ({error})") from error
    for part, keys in _KEYS.items():
        holder = case[part] if part else case
        missing = keys - set(holder) if isinstance(holder, dict) else keys
        if missing:
            where = f"`{part}`" if part else "the file"
            raise UnknownCase(f"{path}: {where} lacks {', '.join(sorted(missing))}")
    return case
