"""Rows of the classifiers follow their class from one data set to another, and the log says where
every tensor came from."""

from __future__ import annotations

import logging
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from engine_support import CONFIG, tiny_cfg, tiny_options, write_coco_folder
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import train_net
from asag import load_config
from asag.checkpoint import DETR, SPARSE_RCNN
from asag.checkpoint.class_heads import ClassTransfer, adopt_classes, class_heads, coco_row_names
from asag.checkpoint.loading import PublishedCheckpointer
from asag.checkpoint.report import BATCH_COUNTER, part_of
from asag.engine import defaults
from asag.engine.trainer import Trainer
from asag.modeling.layers.init import prior_bias

CONFIGS = CONFIG.parents[1]
TINY = sorted(CONFIGS.glob("*/*tiny.yaml"))
COCO = coco_row_names(80)


def build(path: Path, classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES"]
    model = build_model(load_config(str(path), [*options, str(classes)]))
    with torch.no_grad():
        for name in class_heads(model.state_dict()):
            if name.endswith("bias") and seed:  # no two rows are equal
                model.state_dict()[name].normal_()
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def load(model: nn.Module, data: dict, path: Path, names: list[str] | None) -> None:
    torch.save(data, path)
    PublishedCheckpointer(model, class_names=names).load(str(path))


class TestEveryModel:
    @pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
    def test_all_that_depends_on_the_classes_is_found(self, path: Path) -> None:
        with torch.device("meta"):
            shapes = []
            for k in (3, 5):
                cfg = load_config(str(path), ["MODEL.ROI_HEADS.NUM_CLASSES", str(k)])
                cfg.defrost()
                cfg.MODEL.DEVICE = "meta"
                shapes.append({n: v.shape for n, v in build_model(cfg).state_dict().items()})
        changed = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
        assert changed and changed == set(class_heads(shapes[0]))
        assert shapes[0].keys() == shapes[1].keys()

    @pytest.mark.parametrize(
        "name", ["SparseRCNN/sparse_rcnn_tiny", "DETR/detr_tiny", "ASAG/asag_tiny"]
    )
    def test_known_class_keeps_its_rows_and_a_new_one_is_fresh(
        self, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = CONFIGS / f"{name}.yaml"
        trained, model = build(path, 3, seed=1), build(path, 2)
        before = snapshot(model)
        data = {"model": trained.state_dict(), "class_names": ["a", "b", "c"]}
        with caplog.at_level(logging.INFO):
            load(model, data, tmp_path / "x.pth", ["c", "d"])
        old, new = trained.state_dict(), model.state_dict()
        heads = class_heads(new)
        background = "detr" in name
        for head in heads:
            assert len(new[head]) == 2 + background
            assert torch.equal(new[head][0], old[head][2])
            assert torch.equal(new[head][1], before[head][1])
            if background:
                assert torch.equal(new[head][2], old[head][3])
            if head.endswith("bias") and not background:
                assert float(new[head][1]) == pytest.approx(prior_bias(0.01))
        for other in new.keys() - set(heads):
            assert torch.equal(new[other], old[other]), other
        assert "1 of 2 classes of the data are known" in caplog.text
        assert "row 2, c" in caplog.text and "new" in caplog.text
        assert "2 of the file's are not in the data: a, b" in caplog.text


class TestTransfer:
    @given(
        st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans()
    )
    def test_equals_a_loop_over_names(
        self, seed: int, k: int, r: int, ours_softmax: bool, theirs_softmax: bool
    ) -> None:
        draw = random.Random(seed)
        pool = [f"class {i}" for i in range(8)]
        data, file = draw.sample(pool, k), draw.sample(pool, r)
        fresh = -torch.rand(k + ours_softmax, 3)
        trained = torch.rand(r + theirs_softmax, 3)
        filled = ClassTransfer.by_name(data, file).fill(fresh, trained)
        expected = fresh.clone()
        for i, name in enumerate(data):
            if name in file:
                expected[i] = trained[file.index(name)]
        if ours_softmax and theirs_softmax and set(data) & set(file):
            expected[k] = trained[r]
        assert torch.equal(filled, expected)
        assert bool((fresh <= 0).all()), "the fresh model's own rows are not written to"

    def test_spelling(self) -> None:
        transfer = ClassTransfer.by_name(
            ["traffic light", "CAR", "Bus"], ["bus", "Traffic  Light "]
        )
        assert transfer.rows == (1, None, 0)
        transfer = ClassTransfer.by_name(["Ship", "ship", "SHIP"], ["ship", "Ship"])
        assert transfer.rows == (1, 0, 0), "an equal spelling comes first"
        names = ["traffic_light", "caf\u00e9", "\uff23\uff21\uff32", "cell-phone"]
        file = ["car", "cafe\u0301", "cell phone", "traffic light"]
        assert ClassTransfer.by_name(names, file).rows == (3, 1, 0, 2)

    def test_rows_without_a_class_match_nothing(self) -> None:
        assert ClassTransfer.by_name(["None", ""], [None, "x"]).rows == (None, None)

    def test_long_tables_are_cut(self) -> None:
        names = [f"class {i}" for i in range(100)]
        text = ClassTransfer.by_name(names, names[::-1]).describe()
        assert len(text.splitlines()) == 44 and "... and 60 more" in text

    def test_coco_rows(self) -> None:
        assert len(COCO) == 80 and coco_row_names(81) == COCO
        numbered = coco_row_names(91)
        assert numbered[0] is None and numbered[1] == "person" and numbered[90] == "toothbrush"
        assert [x for x in numbered if x] == COCO and coco_row_names(92) == numbered
        assert coco_row_names(20) is None


class TestFitting:
    """`adopt_classes` on a classifier and something else."""

    @staticmethod
    def state(rows: int, start: float = 0.0) -> dict[str, Tensor]:
        bias = start + torch.arange(float(rows))
        weight = bias[:, None].expand(-1, 2).clone()
        return {"x.class_logits.weight": weight, "x.class_logits.bias": bias, "y": torch.ones(1)}

    def adopt(self, rows: int, data: list[str], file: list[str] | None) -> tuple:
        fresh = self.state(len(data), start=-10)
        state, transfer = adopt_classes(self.state(rows), fresh, data, file)
        return [float(x) for x in state.get("x.class_logits.bias", ())], transfer

    def test_same_classes_are_left_alone(self) -> None:
        assert self.adopt(2, ["a", "b"], ["a", "b"]) == ([0, 1], None)

    def test_permuted_more_and_fewer(self) -> None:
        assert self.adopt(2, ["b", "a"], ["a", "b"])[0] == [1, 0]
        assert self.adopt(2, ["b", "c", "a"], ["a", "b"])[0] == [1, -9, 0]
        assert self.adopt(3, ["c"], ["a", "b", "c"])[0] == [2]

    def test_equal_number_of_strange_classes_starts_anew(self) -> None:
        rows, transfer = self.adopt(2, ["c", "d"], ["a", "b"])
        assert rows == [-10, -9] and transfer.all_new
        assert "0 of 2 classes of the data are known" in transfer.describe()

    @pytest.mark.parametrize("file", [None, [], ["of", "another", "file", "altogether"]])
    def test_without_usable_names(self, file: list[str] | None) -> None:
        assert self.adopt(2, ["c", "d"], file) == ([0, 1], None)
        rows, transfer = self.adopt(2, ["c", "d", "e"], file)
        assert rows == [] and "names no classes" in transfer.describe()

    def test_wrong_width_is_left_to_the_report(self) -> None:
        state = self.state(2) | {"x.class_logits.weight": torch.ones(2, 7)}
        fitted, _ = adopt_classes(state, self.state(2), ["b", "a"], ["a", "b"])
        assert fitted["x.class_logits.weight"].shape == (2, 7)
        assert fitted["x.class_logits.bias"].tolist() == [1, 0]

    def test_half_precision_files(self) -> None:
        state = {k: v.half() for k, v in self.state(2).items()}
        fitted, _ = adopt_classes(state, self.state(2), ["b", "a"], ["a", "b"])
        assert fitted["x.class_logits.bias"].dtype == torch.float32


class TestPublishedWeights:
    def test_coco_classes_are_known_by_name(self, caplog, tmp_path: Path) -> None:
        path = CONFIGS / "SparseRCNN/sparse_rcnn_tiny.yaml"
        trained, model = build(path, 80, seed=1), build(path, 3)
        before = snapshot(model)
        data = {"model": SPARSE_RCNN.to_theirs(trained.state_dict())}
        with caplog.at_level(logging.INFO):
            load(model, data, tmp_path / "x.pth", ["dog", "Traffic  light", "unicorn"])
        for head in class_heads(before):
            old, new = trained.state_dict()[head], model.state_dict()[head]
            assert torch.equal(new[:2], old[[COCO.index("dog"), COCO.index("traffic light")]])
            assert torch.equal(new[2], before[head][2])
        assert "taken for trained on COCO's classes" in caplog.text

    @pytest.mark.parametrize("named", [False, True], ids=["names of COCO", "names in the file"])
    def test_a_row_for_each_category_number(self, tmp_path: Path, named: bool) -> None:
        path = CONFIGS / "DETR/detr_tiny.yaml"
        trained = build(path, 91, seed=1)
        data = {"model": DETR.to_theirs(trained.state_dict())}
        numbered = coco_row_names(91)
        if named:
            data["class_names"] = [x or "N/A" for x in numbered]
        old = trained.state_dict()["roi_heads.class_logits.bias"]
        few = build(path, 2)
        load(few, data, tmp_path / "x.pth", ["toothbrush", "person"])
        assert torch.equal(few.roi_heads.class_logits.bias, old[[90, 1, 91]])
        coco = build(path, 80)
        load(coco, data, tmp_path / "x.pth", COCO)
        used = [i for i, x in enumerate(numbered) if x] + [91]
        assert torch.equal(coco.roi_heads.class_logits.bias, old[used])

    def test_names_follow_the_rows_that_are_kept(self, tmp_path: Path) -> None:
        path = CONFIGS / "DETR/detr_tiny.yaml"
        names = [x or "N/A" for x in coco_row_names(91)]
        state = DETR.to_theirs(build(path, 91, seed=1).state_dict())
        torch.save({"model": state, "class_names": names}, tmp_path / "x.pth")
        extra = PublishedCheckpointer(build(path, 80)).load(str(tmp_path / "x.pth"))
        assert extra["class_names"] == COCO


class TestReport:
    PATH = CONFIGS / "SparseRCNN/sparse_rcnn_tiny.yaml"

    def report(self, caplog: pytest.LogCaptureFixture) -> tuple[int, str]:
        (record,) = [x for x in caplog.records if "tensors loaded" in x.message]
        return record.levelno, record.message

    def load(self, caplog, tmp_path: Path, state: dict, names: list | None = None) -> tuple:
        with caplog.at_level(logging.INFO):
            load(build(self.PATH, 2), {"model": state}, tmp_path / "x.pth", names)
        return self.report(caplog)

    def test_complete(self, caplog, tmp_path: Path) -> None:
        state = build(self.PATH, 2, seed=1).state_dict()
        level, text = self.load(caplog, tmp_path, SPARSE_RCNN.to_theirs(state))
        assert level == logging.INFO and len(text.splitlines()) == 1
        assert "(the Sparse R-CNN release)" in text and "nothing fresh, nothing left out" in text
        count = sum(not k.endswith(BATCH_COUNTER) for k in state)
        assert f"{count} of the model's {count} tensors loaded, " in text

    def test_backbone_to_train_from(self, caplog, tmp_path: Path) -> None:
        state = build(self.PATH, 2, seed=1).state_dict()
        backbone = {k: v for k, v in state.items() if k.startswith("backbone.")}
        level, text = self.load(caplog, tmp_path, backbone, ["a", "b"])
        assert level == logging.INFO
        assert f"{len(state) - len(backbone)} start fresh" in text
        row = next(x for x in text.splitlines() if x.startswith("roi_heads.stages"))
        assert row.split()[1:] == [str(sum(k.startswith("roi_heads.stages") for k in state))]

    def test_detectron2_backbone(self, caplog, tmp_path: Path) -> None:
        """In a pickle of arrays, under names without the detector's prefix."""
        trained, model = build(self.PATH, 2, seed=1), build(self.PATH, 2)
        prefix = "backbone.bottom_up."
        arrays = {
            k.removeprefix(prefix): v.numpy()
            for k, v in trained.state_dict().items()
            if k.startswith(prefix)
        }
        arrays["stem.fc.weight"] = np.zeros((10, 4), np.float32)
        data = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
        (tmp_path / "R.pkl").write_bytes(pickle.dumps(data))
        with caplog.at_level(logging.INFO):
            PublishedCheckpointer(model, class_names=["a", "b"]).load(str(tmp_path / "R.pkl"))
        for name, value in model.state_dict().items():
            assert not name.startswith(prefix) or torch.equal(value, trained.state_dict()[name])
        level, text = self.report(caplog)
        assert level == logging.INFO and "by torchvision, matched by Detectron2" in text
        assert "left out: stem.fc.weight" in text

    def test_the_backbone_of_another_detector_is_a_warning(self, caplog, tmp_path: Path) -> None:
        state = build(self.PATH, 2, seed=1).state_dict()
        state = {k.replace("roi_heads.", "decoder."): v for k, v in state.items()}
        state = {k: v for k, v in state.items() if not k.startswith("proposal_generator.")}
        assert self.load(caplog, tmp_path, state)[0] == logging.WARNING

    def test_every_kind_of_trouble_is_counted(self, caplog, tmp_path: Path) -> None:
        state = dict(build(self.PATH, 2, seed=1).state_dict())
        del state["roi_heads.stages.0.norm.weight"]
        state["roi_heads.stages.1.norm.weight"] = torch.ones(3)
        state["a.stranger"] = torch.ones(1)
        level, text = self.load(caplog, tmp_path, state)
        assert level == logging.WARNING
        assert (
            "1 start fresh (at random), 1 because of another shape; 1 of the file left out" in text
        )
        assert "roi_heads.stages.1.norm.weight: (3,) in the file, (" in text
        assert "left out: a.stranger" in text
        assert len(text.splitlines()) < 20

    def test_unnamed_classes_of_another_number_are_said_to_start_anew(
        self, caplog, tmp_path: Path
    ) -> None:
        state = build(self.PATH, 3, seed=1).state_dict()
        level, text = self.load(caplog, tmp_path, state, ["c", "d"])
        heads = len(class_heads(state))
        assert level == logging.WARNING and f"{heads} start fresh" in text
        assert "names no classes" in caplog.text

    def test_without_names_of_the_data_shapes_are_reported(self, caplog, tmp_path: Path) -> None:
        state = build(self.PATH, 3, seed=1).state_dict()
        level, text = self.load(caplog, tmp_path, state)
        heads = len(class_heads(state))
        assert level == logging.WARNING and f"{heads} because of another shape" in text

    def test_nothing_of_this_model(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"nothing in .*x\.pth belongs to this model.*like q\.w"
        ):
            load(build(self.PATH, 2), {"q.w": torch.ones(1)}, tmp_path / "x.pth", None)

    def test_a_parameter_with_two_names_needs_one(self, caplog, tmp_path: Path) -> None:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        state = model.state_dict()
        del state["b.weight"]
        with caplog.at_level(logging.INFO):
            load(model, {"model": state}, tmp_path / "x.pth", None)
        assert "nothing fresh" in self.report(caplog)[1]

    def test_parts(self) -> None:
        assert part_of("roi_heads.stages.3.norm.weight") == "roi_heads.stages"
        assert part_of("backbone.fpn_lateral2.weight") == "backbone.fpn_lateral*"
        assert part_of("weight") == "weight"


def test_fine_tuning_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights of three classes, data of two, one of them among the three."""
    monkeypatch.setattr(defaults, "setup_logger", lambda *_, **__: logging.getLogger("quiet"))
    caplog.set_level(logging.INFO)
    data = write_coco_folder(tmp_path / "data")
    trained = build_model(tiny_cfg(tmp_path, MODEL__ROI_HEADS__NUM_CLASSES=3))
    names = ["moon", "star", "Circle"]
    torch.save({"model": trained.state_dict(), "class_names": names}, tmp_path / "x.pth")
    states = []

    def load_between(self: Trainer, resume: bool = True) -> None:
        states.append(snapshot(self.model))
        plain_load(self, resume)
        states.append(snapshot(self.model))

    plain_load = Trainer.resume_or_load
    monkeypatch.setattr(Trainer, "resume_or_load", load_between)
    options = tiny_options(tmp_path / "out", MODEL__WEIGHTS=tmp_path / "x.pth", SOLVER__MAX_ITER=2)
    argv = ["--config-file", str(CONFIG), "--data", str(data), *options]
    assert train_net.main(argv) == 0
    before, after = states
    heads = class_heads(after)
    assert len(heads) == 4
    for head in heads:
        assert torch.equal(after[head][0], trained.state_dict()[head][2])
        assert torch.equal(after[head][1], before[head][1])
    assert "in these, rows of 1 class(es) start fresh; nothing else fresh" in caplog.text
    assert "1 of 2 classes of the data are known to the weights" in caplog.text
    saved = torch.load(tmp_path / "out/model_final.pth", weights_only=True)
    assert saved["class_names"] == ["circle", "square"]

    states.clear()
    assert train_net.main(["--resume", *argv, "SOLVER.MAX_ITER", "3"]) == 0
    assert all(torch.equal(states[1][k], v) for k, v in saved["model"].items())
    assert caplog.text.count("classes of the data are known") == 1
