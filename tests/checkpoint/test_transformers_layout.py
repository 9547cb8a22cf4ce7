"""DETR and Conditional DETR of Hugging Face's `transformers` load, and answer as they do there.

B images, N queries, S decoder layers, K columns of the classifier.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from asag import load_config
from asag.checkpoint.detr import UNUSED_CATEGORIES
from asag.checkpoint.layouts import recognize
from asag.checkpoint.loading import load_weights, to_library_names
from asag.checkpoint.reading import read_checkpoint
from asag.modeling.layers.boxes import xyxy_to_cxcywh
from asag.modeling.layers.position_encoding import inverse_sigmoid
from asag.structures import ImageSizes

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("timm", reason="transformers' backbones come from timm, not installed")

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    "DETR": "configs/DETR/detr_r50_50ep.yaml",
    "ConditionalDETR": "configs/ConditionalDETR/conditional_detr_r50_50ep.yaml",
}
MODELS = {
    "DETR": ("DetrConfig", "DetrForObjectDetection"),
    "ConditionalDETR": ("ConditionalDetrConfig", "ConditionalDetrForObjectDetection"),
}
LABELS = 91
QUERIES = {"DETR": 100, "ConditionalDETR": 300}
# Their attention, and ours, sum in other orders; nothing else may differ.
TOLERANCE = 1e-4
MIN_SPREAD = 0.01
# In float64 only reference points differ: `transformers` embeds them in float32.
TIGHT = 1e-7

THEIR_SMALL: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 11,
}
OUR_SMALL: list[Any] = [
    *("MODEL.DECODER.HIDDEN_DIM", 32),
    *("MODEL.ENCODER.NUM_LAYERS", 2),
    *("MODEL.DECODER.NUM_STAGES", 3),
    *("MODEL.DECODER.FFN_DIM", 48),
    *("MODEL.DECODER.NUM_HEADS", 4),
    *("MODEL.PROPOSAL_GENERATOR.NUM_QUERIES", 11),
    # transformers' own ResNet, as narrow as Detectron2's can be made.
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
]
CASES = [(name, backbone) for name in CONFIGS for backbone in ("timm", "resnet")]


@lru_cache
def theirs(name: str, backbone: str) -> nn.Module:
    """A model of `transformers` with random weights in which nothing is left at zero or one: of
    full size on timm's ResNet, a small one on transformers' own."""
    options = {"num_queries": QUERIES[name]} if backbone == "timm" else THEIR_SMALL
    config_class, model_class = (getattr(transformers, x) for x in MODELS[name])
    if backbone == "resnet":
        options = options | {
            "use_timm_backbone": False,
            "backbone_config": transformers.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[16, 32, 64, 128],
                depths=[3, 4, 6, 3],
                out_features=["stage4"],
            ),
        }
    torch.manual_seed(0)
    config = config_class(num_labels=LABELS, use_pretrained_backbone=False, **options)
    model = model_class(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "backbone" not in key:  # which starts at random, not near zero like the rest
                p.copy_(randomized(key, p))
        for module in model.modules():
            if hasattr(module, "running_mean"):
                module.weight.uniform_(0.5, 1.0)
                module.bias.normal_(std=0.2)
                module.register_forward_pre_hook(take_statistics)
        pixels = torch.stack([x["image"] for x in batch((96, 128), (96, 128))]) / 64 - 2
        model.model.backbone(pixels, torch.ones(2, 96, 128))
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module._forward_pre_hooks.clear()
    return model


def take_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """With statistics of chance, the cells of a deep feature map would be alike."""
    norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
    norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)) + 0.01)


def randomized(name: str, p: Tensor) -> Tensor:
    """A random matrix that keeps the variance, or norms and biases about where they start."""
    if p.dim() == 1:
        return p + 0.2 * torch.randn_like(p)
    gain = 1.0
    if re.search(r"\.layers\.\d+\.\w*attn\.(q|k)_", name):
        gain = 1.5  # attention that looks at something, so that queries differ
    elif re.search(r"encoder\..*\.o(ut)?_proj", name):
        gain = 0.1  # cells that stay different from layer to layer
    fan_in = 1 if "query_position" in name else p[0].numel()
    return torch.randn_like(p) * gain * fan_in**-0.5


def ours(name: str, backbone: str, *options: Any, labels: int = LABELS) -> nn.Module:
    """The configuration that goes with `theirs`."""
    torch.manual_seed(1)
    given = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", labels]
    small = [] if backbone == "timm" else OUR_SMALL
    cfg = load_config(str(ROOT / CONFIGS[name]), [str(x) for x in (*given, *small, *options)])
    return build_model(cfg).eval()


def batch(*shapes_hw: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Images of blocks as large as a cell of the feature map; of noise all cells would be alike."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.rand(3, 5, 6, generator=generator) * 255 for _ in shapes_hw]
    images = [x.repeat_interleave(32, 1).repeat_interleave(32, 2) for x in blocks]
    return [{"image": x[:, :h, :w]} for x, (h, w) in zip(images, shapes_hw, strict=True)]


@torch.no_grad()
def their_answers(model: nn.Module, pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (S, B, N, K) and boxes cxcywh (S, B, N, 4) of every layer.

    With `auxiliary_loss`, `transformers` hands normed embeddings from layer to layer, unlike the
    authors; so the layers are listened to.
    """
    states: list[Tensor] = []
    points: list[Tensor | None] = []
    decoder = model.model.decoder
    hooks = [
        layer.register_forward_hook(
            lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in decoder.layers
    ]
    hooks.append(
        decoder.register_forward_hook(
            lambda _m, _i, out: points.append(getattr(out, "reference_points", None))
        )
    )
    final = model(pixels, pixel_mask=mask)
    for hook in hooks:
        hook.remove()
    normed = decoder.layernorm(torch.stack(states))
    boxes = model.bbox_predictor(normed)
    if points[0] is not None:  # (N, B, 2)
        boxes[..., :2] += inverse_sigmoid(points[0]).transpose(0, 1)
    logits, boxes = model.class_labels_classifier(normed), boxes.sigmoid()
    assert (logits[-1] - final.logits).abs().max() < 1e-5
    assert (boxes[-1] - final.pred_boxes).abs().max() < 1e-5
    return logits, boxes


def assert_alike(expected: nn.Module, model: nn.Module, *shapes_hw: tuple[int, int]) -> None:
    """Equal in float32 but for rounding, and the more so in float64."""
    assert compare(expected, model, *shapes_hw) < TOLERANCE
    try:
        assert compare(expected.double(), model.double(), *shapes_hw) < TIGHT
    finally:
        expected.float(), model.float()


@torch.no_grad()
def compare(expected: nn.Module, model: nn.Module, *shapes_hw: tuple[int, int]) -> float:
    """Largest difference of logits and of boxes in shares of the image, over all layers."""
    images = model.preprocess_images(batch(*shapes_hw))
    sizes = ImageSizes.from_images(images)
    mask = torch.zeros(len(shapes_hw), *images.tensor.shape[-2:])
    for b, (height, width) in enumerate(shapes_hw):
        mask[b, :height, :width] = 1
    logits, boxes = their_answers(expected, images.tensor, mask)
    predictions = model.forward_stages(images.tensor, sizes)[0]
    boxes_cxcywh = xyxy_to_cxcywh(predictions.boxes_xyxy) / sizes.whwh[:, None]
    assert predictions.logits.shape == logits.shape and boxes_cxcywh.shape == boxes.shape
    # What is compared depends on layer, image and query.
    assert all(logits.std(dim=x).mean() > MIN_SPREAD for x in (0, 1, 2) if logits.shape[x] > 1)
    return max(
        (predictions.logits - logits).abs().max().item(), (boxes_cxcywh - boxes).abs().max().item()
    )


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def layout(name: str, backbone: str) -> str:
    conditional = "conditional-" * (name == "ConditionalDETR")
    return f"transformers-{conditional}detr" + "-resnet" * (backbone == "resnet")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_answers_alike(name: str, tmp_path: Path) -> None:
    expected = theirs(name, "resnet")
    model = ours(name, "resnet")
    before = compare(expected, model, (96, 128))
    file = save(expected, tmp_path)
    load_weights(model, str(file))
    assert before > 0.1
    assert_alike(expected, model, (96, 128))


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_batches_answer_alike(name: str, tmp_path: Path) -> None:
    """Under the authors' conventions of padding, which `transformers` shares: padding runs into the
    images' features, and the pixel mask is resized to the nearest. This library's default keeps
    padding out and asks which cells begin inside of an image, so it differs in a padded batch."""
    expected = theirs(name, "resnet")
    file = str(save(expected, tmp_path))
    shapes = (97, 130), (120, 85)
    model = ours(name, "resnet", "MODEL.EXACT_PADDING", False)
    load_weights(model, file)
    assert_alike(expected, model, *shapes)
    exact = ours(name, "resnet")
    load_weights(exact, file)
    assert compare(expected, exact, *shapes) > 10 * TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_full_size_models_answer_alike(name: str, tmp_path: Path) -> None:
    expected = theirs(name, "timm")
    assert expected.model.query_position_embeddings.num_embeddings == QUERIES[name]
    model = ours(name, "timm")
    load_weights(model, str(save(expected, tmp_path)))
    assert_alike(expected, model, (96, 128))


@pytest.mark.parametrize(("name", "backbone"), CASES)
def test_names_of_files_and_of_modules_mean_the_same(
    name: str, backbone: str, tmp_path: Path
) -> None:
    expected = theirs(name, backbone)
    modules = expected.state_dict()
    file = read_checkpoint(save(expected, tmp_path))["model"]
    assert recognize(modules) == recognize(file) == layout(name, backbone)
    first, second = to_library_names(modules), to_library_names(file)
    assert first.keys() == second.keys() and len(first) > 300
    assert all(torch.equal(first[k], second[k]) for k in first)
    torch.save(modules, tmp_path / "pytorch_model.bin")
    if backbone == "resnet":
        model = ours(name, backbone)
        load_weights(model, str(tmp_path / "pytorch_model.bin"))
        assert model.state_dict().keys() == first.keys()
        assert all(torch.equal(first[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_columns_of_unused_categories_and_their_names_go(name: str, tmp_path: Path) -> None:
    expected = deepcopy(theirs(name, "resnet"))
    expected.config.id2label = {
        i: "N/A" if i in UNUSED_CATEGORIES else f"thing {i}" for i in range(LABELS)
    }
    file = save(expected, tmp_path)
    assert "thing 90" in (tmp_path / "config.json").read_text()
    model = ours(name, "resnet", labels=80)
    load_weights(model, str(file))
    images = model.preprocess_images(batch((96, 128)))
    pixels = images.tensor
    logits, _ = their_answers(expected, pixels, torch.ones(1, *pixels.shape[-2:]))
    used = [i for i in range(logits.shape[-1]) if i not in UNUSED_CATEGORIES]
    assert len(used) == {"DETR": 81, "ConditionalDETR": 80}[name]  # a column of no object is last
    with torch.no_grad():
        found = model.forward_stages(pixels, ImageSizes.from_images(images))[0].logits
    assert (found - logits[..., used]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "backbone", "suffix"),
    [
        ("DETR", "resnet", ".bin"),
        ("DETR", "resnet", ".safetensors"),
        ("ConditionalDETR", "timm", ".safetensors"),
    ],
)
def test_transformers_reads_what_is_converted(
    name: str, backbone: str, suffix: str, tmp_path: Path
) -> None:
    template = theirs(name, backbone)
    template.save_pretrained(tmp_path)  # for its config.json
    (tmp_path / "model.safetensors").unlink()
    model = ours(name, backbone)
    state = to_library_names(template.state_dict())
    model.load_state_dict({k: v * (1 + 0.1 * torch.rand_like(v)) for k, v in state.items()})
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    file = tmp_path / {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}[suffix]
    arguments = [str(tmp_path / "ours.pth"), str(file), "--to", layout(name, backbone)]
    assert convert_checkpoint.main(arguments) == 0
    model_class = getattr(transformers, MODELS[name][1])
    read, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_alike(read.eval(), model, (96, 128))


def test_class_names_beside_the_file_are_found(tmp_path: Path) -> None:
    expected = deepcopy(theirs("DETR", "resnet"))
    expected.config.id2label = {i: f"thing {i}" for i in range(LABELS)}
    file = save(expected, tmp_path)
    loaded = load_weights(ours("DETR", "resnet"), str(file))
    assert loaded["class_names"] == [f"thing {i}" for i in range(LABELS)]
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config["id2label"]) == LABELS
