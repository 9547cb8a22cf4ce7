"""The analysis tool: parameters, multiply-adds and their comparison with published figures."""

import json
from pathlib import Path

import analyze
import pytest
import torch
from analysis import flops
from detectron2.structures import ImageList
from torch import nn

ROOT = Path(__file__).resolve().parents[2]

TINY = str(ROOT / "configs/SparseRCNN/sparse_rcnn_tiny.yaml")
R50 = str(ROOT / "configs/SparseRCNN/sparse_rcnn_r50_100pro_3x.yaml")


def run(capsys, *arguments):
    code = analyze.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


class Attends(nn.Module):
    """A model of the shape that the counter expects, whose products can be counted by hand."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 16, bias=False)
        self.backbone = nn.ModuleDict()
        self.backbone.forward = lambda image: {"unused": image @ image}

    def preprocess_images(self, inputs):
        return ImageList.from_tensors([inputs[0]["image"]])

    def forward_stages(self, image, sizes):
        assert sizes.hw == ((4, 4),)
        self.backbone(image)
        x = image.new_ones(2, 3, 5, 8)  # (B, H, N, D)
        key, value = image.new_ones(2, 3, 7, 8), image.new_ones(2, 3, 7, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(x, key, value)
        added = torch.baddbmm(
            image.new_ones(2, 5, 6), image.new_ones(2, 5, 9), key.new_ones(2, 9, 6)
        )
        predictions = type("P", (), {"logits": self.linear(x), "boxes_xyxy": (mixed, added)})
        return predictions, {}


def test_counts_attention_and_batched_products_by_hand():
    count = flops.count_flops(Attends(), 4, 4)
    assert count.by_operator == {
        "matmul": 3 * 4 * 4 * 4,
        "linear": 2 * 3 * 5 * 8 * 16,
        "attention": 2 * 3 * 5 * 7 * (8 + 4),
        "baddbmm": 2 * 5 * 9 * 6,
    }
    assert count.macs == sum(count.by_operator.values())
    assert count.flops == 2 * count.macs
    assert count.by_module[""] == count.macs and count.by_module["linear"] == 2 * 3 * 5 * 8 * 16


def test_parameters_are_counted_once_and_split_by_training():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3))
    model.append(model[1])
    model[0].requires_grad_(False)
    assert flops.count_parameters(model) == (9 + 12, 12)
    assert flops.count_parameters(model, excluded=[model[0]]) == (12, 12)


def test_rooms_sum_to_the_total(capsys):
    code, out, _ = run(capsys, TINY, "--input", "96x128", "--json")
    (report,) = json.loads(out)
    assert code == 0 and report["input"] == "96x128"
    assert set(report["components"]) == {"backbone", "neck", "proposal_generator", "roi_heads"}
    for figure in ("parameters", "trainable", "gmacs"):
        summed = sum(component[figure] for component in report["components"].values())
        assert summed == pytest.approx(report[figure])
    assert report["gmacs"] < report["gflops"] < 2 * report["gmacs"]
    assert report["reference"] is None
    assert "aten::embedding_bag" in report["uncounted"], "pooling on a CPU"


def test_convolutions_grow_with_the_padded_area_and_heads_do_not(capsys):
    reports = [
        json.loads(run(capsys, TINY, "--input", size, "--json")[1])[0]
        for size in ("64x64", "128x64", "65x64")
    ]
    small, double, padded = (r["components"] for r in reports)
    assert double["backbone"]["gmacs"] == pytest.approx(2 * small["backbone"]["gmacs"])
    assert padded["backbone"]["gmacs"] == pytest.approx(1.5 * small["backbone"]["gmacs"])
    assert double["roi_heads"]["gmacs"] == small["roi_heads"]["gmacs"]


def test_mean_over_images_of_a_data_set(capsys, tmp_path):
    images = [
        {"height": 256, "width": 256},
        {"height": 100, "width": 125},
        {"height": 9, "width": 9},
    ]
    (tmp_path / "val.json").write_text(json.dumps({"images": images}))
    arguments = ("--annotations", str(tmp_path / "val.json"), "--images", "2", "--json")
    (mean,) = json.loads(run(capsys, TINY, *arguments)[1])
    # The short side becomes 128: 128x128 and 128x160.
    singles = [
        json.loads(run(capsys, TINY, "--input", size, "--json")[1])[0]["gmacs"]
        for size in ("128x128", "128x160")
    ]
    assert mean["gmacs"] == pytest.approx(sum(singles) / 2)
    assert mean["input"] == "mean of 2 images"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no list `images`"),
        ({"images": []}, "has no list `images`"),
        ({"images": {"1": 2}}, "has no list `images`"),
        (
            {"images": [{"height": 5, "width": 5}, {"height": 5}]},
            "images[1] has height 5 and width",
        ),
        ({"images": [{"height": "x", "width": 5}]}, "images[0] has height 'x'"),
        ({"images": [3]}, "images[0] has height None"),
    ],
)
def test_annotations_without_sizes_are_named(capsys, tmp_path, content, message):
    path = tmp_path / "val.json"
    path.write_text(json.dumps(content))
    code, _, error = run(capsys, TINY, "--annotations", str(path))
    assert code == 2 and str(path) in error and message in error


def test_published_figures_of_resnet_50(capsys):
    code, out, _ = run(capsys, R50, "--json")
    (report,) = json.loads(out)
    assert code == 0
    assert report["trainable"] == 106_015_368
    reference = report["reference"]
    assert reference["parameters"] == 106_237_768 and reference["parameters_differ_by"] == 0
    assert abs(reference["gmacs_differ_by_percent"]) < 0.05
    heads = report["components"]["roi_heads"]["gmacs"]
    assert heads == pytest.approx(8.96, abs=0.005)


def test_differences_from_published_figures_are_shown(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "projects/Tiny"
    folder.mkdir(parents=True)
    config = tmp_path / "tiny.yaml"
    config.write_text(f'_BASE_: "{TINY}"\n')
    figures = {"tiny.yaml": {"parameters": 1, "gmacs": {"64x64": 1.0}, "source": "nowhere"}}
    (folder / "reference_figures.json").write_text(json.dumps(figures))
    monkeypatch.setattr(analyze, "ROOT", tmp_path)
    out = run(capsys, str(config), "--input", "64x64")[1]
    total = json.loads(run(capsys, TINY, "--input", "64x64", "--json")[1])[0]["parameters"]
    assert f"reference (nowhere): 1 parameters, here +{total - 1:,}; 1.00 GMACs, here -" in out


@pytest.mark.parametrize(
    "arguments, issue",
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        ([TINY, "--opts", "MODEL.DECODER.NUM_HEDS", "4"], "MODEL.DECODER.NUM_HEADS"),
        ([TINY, "--opts", "MODEL.DECODER.NUM_HEADS", "5"], "MODEL.DECODER.NUM_HEADS"),
    ],
)
def test_mistakes_end_with_a_sentence(capsys, arguments, issue):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and issue in err and len(err.splitlines()) == 1


def test_image_size_must_be_two_numbers(capsys):
    with pytest.raises(SystemExit):
        run(capsys, TINY, "--input", "800")
    assert "800x1216" in capsys.readouterr().err
