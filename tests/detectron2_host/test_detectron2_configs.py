"""Every shipped configuration passes Detectron2's own `merge_from_file` and `merge_from_list`."""

import itertools
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog

from asag import add_asag_config, load_config
from asag.config.loading import leaves

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path.relative_to(ROOT)
    for folder in ("configs", "projects")
    for path in (ROOT / folder).rglob("*.yaml")
)
# Images of the training splits that cannot be generated here.
NUM_IMAGES = {"coco_2017_train": 118_287, "crowdhuman_train": 15_000}
# Recipes for custom data, with the images of the data they were made for.
CUSTOM_DATA = {"dense_lite0_photos": 2526}


def plain_cfg() -> CfgNode:
    cfg = get_cfg()
    add_asag_config(cfg)
    return cfg


def plain_merge(path: Path) -> CfgNode:
    cfg = plain_cfg()
    cfg.merge_from_file(str(ROOT / path))
    return cfg


def num_images(names: tuple[str, ...]) -> int:
    return sum(NUM_IMAGES.get(name) or len(DatasetCatalog.get(name)) for name in names)


def test_there_are_configurations():
    assert len(SHIPPED) > 150


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_plain_merge_from_file_and_list(path):
    cfg = plain_merge(path)
    assert dict(leaves(cfg)) == dict(leaves(load_config(str(ROOT / path))))
    again = plain_cfg()
    again.merge_from_list(list(itertools.chain(*leaves(cfg))))
    assert again == cfg


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_iterations_equal_the_epochs_at_the_reference_batch(path):
    cfg = plain_merge(path)
    solver = cfg.SOLVER
    if not solver.EPOCHS:  # a part of a configuration, or a length that follows the data
        assert path.name.startswith("Base-") or solver.MAX_ITER == solver.BY_DATA.MIN_ITERS
        return
    images = CUSTOM_DATA.get(path.stem) or num_images(cfg.DATASETS.TRAIN)
    per_epoch = images / solver.REFERENCE_BATCH
    assert round(solver.EPOCHS * per_epoch) == solver.MAX_ITER
    steps = [round(epoch * per_epoch) for epoch in solver.EPOCH_STEPS]
    assert list(solver.STEPS) == [step for step in steps if 0 < step < solver.MAX_ITER]


def test_unknown_keys_are_errors():
    with pytest.raises(KeyError, match=r"Non-existent config key: MODEL\.DECODER\.STAGES"):
        plain_cfg().merge_from_other_cfg(CfgNode({"MODEL": {"DECODER": {"STAGES": 3}}}))
    with pytest.raises(AssertionError, match=r"Non-existent key: MODEL\.DECODER\.STAGES"):
        plain_cfg().merge_from_list(["MODEL.DECODER.STAGES", 3])


def test_wrong_types_name_key_and_expected_type():
    wrong = r"Type mismatch \(<class 'int'> vs\. <class 'str'>\).*MODEL\.DECODER\.NUM_STAGES"
    with pytest.raises(ValueError, match=wrong):
        plain_cfg().merge_from_other_cfg(CfgNode({"MODEL": {"DECODER": {"NUM_STAGES": "six"}}}))
    with pytest.raises(ValueError, match=r"Type mismatch.*NUM_STAGES"):
        plain_cfg().merge_from_list(["MODEL.DECODER.NUM_STAGES", "six"])


def test_studies_are_no_configurations():
    studies = list((ROOT / "projects").rglob("*.study"))
    assert len(studies) >= 3
    for study in studies:
        with pytest.raises(KeyError, match="Non-existent config key"):
            plain_merge(study.relative_to(ROOT))
