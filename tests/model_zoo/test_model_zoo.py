"""The model zoo: names, data files, page, weights, and that nothing in them is stale."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import make_model_zoo
import pytest
import torch
from analysis import free_convolutions
from analysis.flops import count_flops
from detectron2.modeling import build_model
from zoo import package_checkpoint

from asag import load_config, model_zoo
from asag.checkpoint.loading import load_weights
from asag.model_zoo import entries
from asag.model_zoo.entries import WEIGHTS, config_files, read

ROOT = Path(__file__).resolve().parents[2]
OWN = "sparse_rcnn_tiny_shapes"
TINY = "sparse_rcnn_tiny"


@pytest.fixture(scope="module")
def figures():
    return read("figures.json")


def test_every_configuration_has_one_name():
    files = [p for p in ROOT.glob("configs/*/*.yaml") if not p.name.startswith("Base")]
    assert len({p.stem for p in files}) == len(files) > 50
    names = {x for x in model_zoo.names() if model_zoo.entry(x).recipe}
    assert {p.stem for p in files} == names
    assert {OWN, model_zoo.PHOTOGRAPHS} < set(model_zoo.names()) - names
    assert model_zoo.names() == sorted(model_zoo.names())


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.yaml").write_text("VERSION: 2\n")
    monkeypatch.setattr(entries, "CONFIG_FOLDERS", (tmp_path,))
    with pytest.raises(RuntimeError, match="have the same name"):
        config_files()
    monkeypatch.setattr(entries, "CONFIG_FOLDERS", (tmp_path / "none",))
    with pytest.raises(RuntimeError, match="no configurations"):
        config_files()


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(KeyError, match="did you mean conditional_detr_r50_50ep"):
        model_zoo.entry("conditional_detr_r50_50")
    with pytest.raises(KeyError, match=r"see asag\.model_zoo\.names"):
        model_zoo.config("zzz")


def test_claims_belong_to_configurations_and_agree_with_them():
    published = read("published.json")
    assert set(published["claims"]) <= set(config_files())
    folders = {p.parent.name for p in config_files().values()}
    assert set(published["sources"]) <= folders
    for name in published["claims"]:
        known = model_zoo.entry(name)
        crowd = known.claim.data == "CrowdHuman"
        assert crowd == name.endswith("crowdhuman")
        assert (known.claim.data == "COCO test-dev") == name.endswith("tta")
        low, high = (85, 95) if crowd else (30, 60)
        assert low < known.claim.ap < high
        assert "Table" in known.claim.where
        if name.endswith("ep"):  # the schedule is part of the name
            assert name.endswith(f"_{known.figures['epochs']:g}ep")


def test_parameters_equal_those_of_the_authors_where_they_are_known(figures):
    known = {}
    for file in ROOT.glob("projects/*/reference_figures.json"):
        known |= json.loads(file.read_text())
    compared = [
        (figures["models"][Path(file).stem]["parameters"], x["parameters"])
        for file, x in known.items()
        if Path(file).parts[0] == "configs"  # others are of ablations
    ]
    assert len(compared) > 15
    assert all(here == theirs for here, theirs in compared)


def test_nothing_is_stale(figures):
    assert make_model_zoo.stale(figures) == []


def test_stale_data_are_noticed(figures):
    changed = json.loads(json.dumps(figures))
    changed["models"][TINY]["fingerprint"] = "0"
    changed["models"]["gone"] = changed["models"].pop("detr_tiny")
    issues = "\n".join(make_model_zoo.stale(changed))
    assert f"{TINY}: fingerprint is 0" in issues
    assert "detr_tiny: not counted yet" in issues
    assert "gone: there is no such model" in issues
    changed = json.loads(json.dumps(figures))
    changed["models"][TINY]["gmacs"] += 1
    assert "MODEL_ZOO.md is not what its data give" in make_model_zoo.stale(changed)


def test_a_change_of_a_recipe_changes_its_fingerprint(tmp_path):
    path = tmp_path / "changed.yaml"
    base = model_zoo.entry(TINY)
    path.write_text(f'_BASE_: "{base.config}"\n')
    same = make_model_zoo.recipe_facts(entries.Entry("changed", path))
    assert same == make_model_zoo.recipe_facts(base)
    path.write_text(f'_BASE_: "{base.config}"\nSOLVER:\n  EPOCHS: 3\n')
    longer = make_model_zoo.recipe_facts(entries.Entry("changed", path))
    assert longer["fingerprint"] != same["fingerprint"] and longer["epochs"] == 3
    assert longer["model_fingerprint"] == same["model_fingerprint"]  # need not be counted again
    path.write_text(f'_BASE_: "{base.config}"\nMODEL:\n  DECODER:\n    FFN_DIM: 96\n')
    other = make_model_zoo.recipe_facts(entries.Entry("changed", path))
    assert other["model_fingerprint"] != same["model_fingerprint"]


@pytest.mark.parametrize("name", [TINY, OWN, "conditional_detr_tiny", "asag_tiny"])
def test_figures_of_small_models_are_those_of_now(figures, name):
    found = make_model_zoo.count(model_zoo.entry(name), exact=True)
    assert found == {k: figures["models"][name][k] for k in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(config_files()))
def test_figures_are_those_of_now(figures, name):
    found = make_model_zoo.count(model_zoo.entry(name), exact=True)
    assert found == {k: figures["models"][name][k] for k in found}


def test_convolutions_that_cost_nothing_are_counted_like_real_ones():
    model = build_model(
        load_config(str(model_zoo.entry("detr_tiny").config), ["MODEL.DEVICE", "cpu"])
    )
    real = count_flops(model, 64, 96)
    with free_convolutions.free_convolutions():
        free = count_flops(model, 64, 96)
        x = torch.ones(2, 4, 9, 8)
        layer = torch.nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(2, 1), groups=2)
        with torch.no_grad():
            shape = layer(x).shape
    assert shape == layer(x).shape
    assert real.by_operator == free.by_operator and real.by_module == free.by_module


def test_agreement_is_recorded_of_every_suite(figures):
    suites = {name.split("/")[0] for name in figures["agreement"]}
    assert suites == {
        "asag", "conditional_detr", "crowdhuman", "iou_sparse_rcnn", "mmdet", "ota", "sparse_rcnn"
    }  # fmt: skip
    for case in figures["agreement"].values():
        assert case["failed"] == 0 < case["comparisons"]
    prefixes = [p for x in read("published.json")["sources"].values() for p in x["verified_by"]]
    for name in figures["agreement"]:
        assert any(name.startswith(p) for p in prefixes), name


def test_agreement_is_that_of_now(figures, golden_dir, tmp_path):
    shutil.copytree(golden_dir / "crowdhuman", tmp_path / "golden" / "crowdhuman")
    (tmp_path / "golden" / "ota").mkdir()
    shutil.copy(golden_dir / "ota" / "dynamic_k.pt", tmp_path / "golden" / "ota")
    found = make_model_zoo.measure_agreement(tmp_path / "golden")
    assert found == {name: figures["agreement"][name] for name in found} and len(found) == 6


def test_get_builds_with_random_own_and_given_weights(tmp_path):
    random = model_zoo.get(OWN, device="cpu")
    own = model_zoo.get(OWN, pretrained=True, device="cpu")
    assert not own.training
    saved = torch.load(model_zoo.entry(OWN).weights)["model"]
    assert own.state_dict().keys() == saved.keys()
    assert all(torch.equal(own.state_dict()[k], v) for k, v in saved.items())
    assert any(not torch.equal(random.state_dict()[k], v) for k, v in saved.items())
    torch.save({"model": random.state_dict()}, tmp_path / "random.pth")
    given = model_zoo.get(OWN, pretrained=tmp_path / "random.pth", device="cpu")
    assert all(torch.equal(given.state_dict()[k], v) for k, v in random.state_dict().items())


def test_get_says_where_weights_are():
    with pytest.raises(ValueError, match=f"under the name {OWN}"):
        model_zoo.get(TINY, pretrained=True)
    with pytest.raises(ValueError, match=r"those of the authors are at https://drive\.google\.com"):
        model_zoo.get("asag_a_r50_100_1x", pretrained=True)
    with pytest.raises(ValueError, match=r"code is at https://github\.com/Atten4Vis"):
        model_zoo.get("conditional_detr_tiny", pretrained=True)
    with pytest.raises(ValueError, match="train some"):
        model_zoo.get("iou_dpg_dla_tiny", pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        model_zoo.get(TINY, pretrained="none.pth", device="cpu")


@pytest.mark.parametrize("record", sorted(WEIGHTS.glob("*.json")), ids=lambda p: p.stem)
def test_packaged_weights_are_what_their_record_says(record):
    said = json.loads(record.read_text())
    file = record.with_suffix(".pth")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == said["sha256"]
    assert file.stat().st_size == said["bytes"] <= package_checkpoint.MAX_BYTES
    loaded = torch.load(file, weights_only=True)
    assert loaded.keys() == {"model", "class_names"}
    assert loaded["class_names"] == said["class_names"]
    assert {v.dtype for v in loaded["model"].values()} <= {
        torch.float32,
        torch.float16,
        torch.int64,
    }


class TestPackaging:
    @pytest.fixture
    def run(self, tmp_path):
        """A run folder with the packaged model, whose configuration differs from the recipe."""
        folder = tmp_path / "run"
        folder.mkdir()
        cfg = model_zoo.config(OWN)
        cfg.INPUT.MAX_SIZE_TEST = 192
        cfg.MODEL.DECODER.DROPOUT = 0.25
        cfg.SEED = 5
        (folder / "config.yaml").write_text(cfg.dump())
        loaded = torch.load(model_zoo.entry(OWN).weights)
        loaded["model"] = {
            k: v.double() if v.is_floating_point() else v for k, v in loaded["model"].items()
        }
        torch.save({**loaded, "optimizer": {"state": 1}}, folder / "model_best.pth")
        return folder

    def arguments(self, run, *more):
        said = {"--command": "c", "--commit": "1", "--date": "2026-01-01", "--hardware": "h"}
        words = [x for pair in said.items() for x in pair]
        config = f"SparseRCNN/{TINY}.yaml"
        output = str(run.parent / "out")
        return [str(run), "new", "--config", config, "--output", output, *words, *more]

    def test_strips_evaluates_and_records(self, run, monkeypatch):
        asked = []

        def evaluate(cfg, weights):
            model = build_model(cfg)
            load_weights(model, str(weights))  # fits the options that were found
            asked.append(cfg.INPUT.MAX_SIZE_TEST)
            return {"dataset": "d", "AP": 1.5}

        monkeypatch.setattr(package_checkpoint, "evaluate", evaluate)
        assert package_checkpoint.main(self.arguments(run, "--note", "n")) == 0
        record = json.loads((run.parent / "out" / "new.json").read_text())
        size, dropout = "INPUT.MAX_SIZE_TEST", "MODEL.DECODER.DROPOUT"
        assert record["options"] == [size, "192", dropout, "0.25"]
        assert asked == [192]
        assert record["config"] == TINY and record["training"]["seed"] == 5
        assert record["evaluation"] == {"dataset": "d", "AP": 1.5} and record["note"] == "n"
        loaded = torch.load(run.parent / "out" / "new.pth", weights_only=True)
        assert loaded.keys() == {"model", "class_names"}
        original = torch.load(model_zoo.entry(OWN).weights)["model"]
        assert all(torch.equal(loaded["model"][k], v) for k, v in original.items())

    def test_half_precision_on_disk_is_single_precision_in_a_model(self, run, monkeypatch):
        monkeypatch.setattr(package_checkpoint, "evaluate", lambda cfg, weights: {})
        assert package_checkpoint.main(self.arguments(run, "--half")) == 0
        file = run.parent / "out" / "new.pth"
        stored = torch.load(file, weights_only=True)["model"]
        assert {v.dtype for v in stored.values()} == {torch.float16, torch.int64}
        model = build_model(model_zoo.config(TINY, ["MODEL.DEVICE", "cpu"]))
        load_weights(model, str(file))
        loaded = model.state_dict()
        assert all(torch.equal(loaded[k], v.to(loaded[k])) for k, v in stored.items())
        assert {v.dtype for v in loaded.values()} == {torch.float32, torch.int64}

    def test_refuses_numbers_that_half_precision_cannot_hold(self, run, capsys):
        loaded = torch.load(run / "model_best.pth")
        name = next(iter(loaded["model"]))
        loaded["model"][name].view(-1)[0] = 1e6
        torch.save(loaded, run / "model_best.pth")
        assert package_checkpoint.main(self.arguments(run, "--half")) == 2
        assert f"{name} has entries that are not finite in torch.float16" in capsys.readouterr().err

    def test_refuses_numbers_that_are_not_finite(self, run, capsys):
        loaded = torch.load(run / "model_best.pth")
        name = next(iter(loaded["model"]))
        loaded["model"][name].view(-1)[0] = float("nan")
        torch.save(loaded, run / "model_best.pth")
        assert package_checkpoint.main(self.arguments(run)) == 2
        assert f"{name} has entries that are not finite" in capsys.readouterr().err
        assert not list((run.parent / "out").glob("*"))

    def test_refuses_large_files(self, run, monkeypatch, capsys):
        monkeypatch.setattr(package_checkpoint, "MAX_BYTES", 1000)
        assert package_checkpoint.main(self.arguments(run)) == 2
        assert "1000 at most" in capsys.readouterr().err


def test_a_built_package_brings_configurations_facts_and_weights(tmp_path):
    for folder in ("configs", "asag", "demo", "tools"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder, ignore=ignore)
    for file in ("setup.py", "README.md", "pyproject.toml", "train_net.py"):
        shutil.copy(ROOT / file, tmp_path / "source")
    built = tmp_path / "built"
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)],
        cwd=tmp_path / "source",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = built / "asag" / "model_zoo"
    for part in ("published.json", "figures.json", f"weights/{OWN}.pth", f"weights/{OWN}.json"):
        assert (folder / part).read_bytes() == (WEIGHTS.parent / part).read_bytes()
    assert (built / "asag/commands/train_net.py").read_bytes() == (
        ROOT / "train_net.py"
    ).read_bytes()
    copies = built / "asag" / "model_configs"
    assert {p.stem for p in copies.glob("*/*.yaml")} >= set(config_files())


def test_options_choose_the_head_that_detects() -> None:
    assert model_zoo.get("asag_a_tiny", device="cpu").roi_heads.main == 1
    first = model_zoo.get("asag_a_tiny", device="cpu", options=["MODEL.DECODER.MAIN_COPY", "0"])
    assert first.roi_heads.main == 0
    with pytest.raises(KeyError, match=r"MODEL\.DECODER\.MAIN_COPYS"):
        model_zoo.get("asag_a_tiny", device="cpu", options=["MODEL.DECODER.MAIN_COPYS", "0"])
