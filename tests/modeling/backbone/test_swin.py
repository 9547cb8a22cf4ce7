"""Swin backbone: shapes at any size, what padding may change, gradients, published names."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor
from torchvision.models.swin_transformer import SwinTransformer

from asag import get_asag_cfg
from asag.checkpoint.swin import SWIN_IMAGENET, swin_to_ours
from asag.modeling.backbone import Swin, build_swin_fpn_backbone

SMALL = {"embed_dim": 12, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 3, 4), "window_size": 4}


def small(**changes) -> Swin:
    torch.manual_seed(0)
    return Swin(**(SMALL | changes)).eval()


def small_fpn(*options):
    cfg = get_asag_cfg()
    sizes = [x for k, v in SMALL.items() for x in (f"MODEL.SWIN.{k.upper()}", v)]
    freeze = ["MODEL.BACKBONE.FREEZE_AT", 0]
    cfg.merge_from_list([*sizes, *freeze, "MODEL.FPN.OUT_CHANNELS", 8, *options])
    return build_swin_fpn_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 130), (7, 5)])
def test_shapes_at_any_size(size: tuple[int, int]) -> None:
    model = small()
    outputs = model(torch.rand(2, 3, *size))
    assert list(outputs) == list(model.output_shape())
    for name, shape in model.output_shape().items():
        sides = tuple(-(-side // shape.stride) for side in size)
        assert outputs[name].shape == (2, shape.channels, *sides)
        assert outputs[name].is_contiguous() and outputs[name].isfinite().all()


def test_pyramid_of_padded_images() -> None:
    fpn = small_fpn()
    assert fpn.size_divisibility == 32
    outputs = fpn(torch.rand(1, 3, 96, 160))
    for i, name in enumerate(("p2", "p3", "p4", "p5")):
        assert outputs[name].shape == (1, 8, 96 // 2 ** (i + 2), 160 // 2 ** (i + 2))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, images = small(), torch.rand(3, 3, 64, 96)
    together = model(images)
    for i in range(3):
        for name, x in model(images[i : i + 1]).items():
            torch.testing.assert_close(together[name][i : i + 1], x, atol=1e-4, rtol=1e-4)


def test_whole_windows_of_padding_do_not_reach_unshifted_blocks() -> None:
    """One unshifted block a stage: every window is either image or padding."""
    model = small(depths=(1, 1, 1, 1))
    image = torch.rand(1, 3, 128, 128)
    padded = torch.nn.functional.pad(image, (0, 128, 0, 128))
    for name, x in model(image).items():
        side = x.shape[-1]
        torch.testing.assert_close(model(padded)[name][..., :side, :side], x, atol=1e-4, rtol=1e-4)


def test_far_padding_does_not_reach_the_first_stage() -> None:
    """Shifted windows reach a window further a block: the rest of the map stays as it is."""
    model = small()
    image = torch.rand(1, 3, 128, 128)
    padded = torch.nn.functional.pad(image, (0, 128, 0, 128))
    plain, more = model(image)["stage1"], model(padded)["stage1"]
    safe = 32 - 2 * SMALL["window_size"]
    torch.testing.assert_close(
        more[..., :safe, :safe], plain[..., :safe, :safe], atol=1e-4, rtol=1e-4
    )


def test_opposite_borders_do_not_attend_to_each_other() -> None:
    """The shift wraps around; on a map of broken windows (9 tokens, windows of 4) its mask must
    still keep the wrapped rows apart."""
    model = small(depths=(2, 1, 1, 1))
    image = torch.rand(1, 3, 36, 36)
    changed = image.clone()
    changed[..., :4, :] += 1  # the first row of tokens
    before, after = model(image)["stage1"], model(changed)["stage1"]
    torch.testing.assert_close(before[..., -1, :], after[..., -1, :])
    assert not torch.allclose(before[..., 0, :], after[..., 0, :])


def test_every_parameter_learns() -> None:
    model = small(drop_path_rate=0.0).train()
    outputs = model(torch.rand(2, 3, 64, 64))
    sum((x * torch.randn_like(x)).sum() for x in outputs.values()).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_drop_path_acts_while_training_only() -> None:
    model, image = small(drop_path_rate=0.6), torch.rand(1, 3, 64, 64)
    assert torch.equal(model(image)["stage4"], model(image)["stage4"])
    model.train()
    answers = [model(image)["stage4"] for _ in range(6)]
    assert any(not torch.equal(answers[0], x) for x in answers[1:])


@pytest.mark.parametrize(("freeze_at", "trained"), [(0, 8), (1, 7), (2, 6), (3, 4), (5, 0)])
def test_freezing_counts_from_the_input(freeze_at: int, trained: int) -> None:
    model = small(freeze_at=freeze_at)
    parts = [any(p.requires_grad for p in part.parameters()) for part in model.features]
    assert parts == [False] * (8 - trained) + [True] * trained


def test_heads_must_divide_the_channels_of_their_stage() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.SWIN\.NUM_HEADS is \(1, 2, 5, 4\); .* stage 3"):
        small_fpn("MODEL.SWIN.NUM_HEADS", (1, 2, 5, 4))


def classifier() -> SwinTransformer:
    torch.manual_seed(1)
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=SMALL["embed_dim"],
        depths=list(SMALL["depths"]),
        num_heads=list(SMALL["num_heads"]),
        window_size=[4, 4],
        num_classes=5,
    ).eval()


def as_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision state dict in the layout of the authors' release."""
    named = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == "features":
            place, _, rest = rest.partition(".")
            stage, merging = divmod(int(place) - 1, 2)
            if place == "0":
                name = "patch_embed." + rest.replace("0.", "proj.", 1).replace("2.", "norm.", 1)
            elif merging:
                name = f"layers.{stage}.downsample.{rest}"
            else:
                rest = rest.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
                name = f"layers.{stage}.blocks.{rest}"
        if name.endswith("relative_position_index"):
            value = value.view(16, 16)
        named[name] = value
    return named | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


@pytest.mark.parametrize("released", [True, False])
def test_published_weights_find_their_place(released: bool) -> None:
    body, fpn = classifier(), small_fpn().eval()
    state = as_released(body.state_dict()) if released else body.state_dict()
    ours = swin_to_ours(state)
    prefix = "backbone."
    found = fpn.load_state_dict({k.removeprefix(prefix): v for k, v in ours.items()}, strict=False)
    assert found.unexpected_keys == []
    new = ("bottom_up.norms.", "fpn_")
    rest = [k for k in found.missing_keys if not k.startswith(new)]
    assert all(k.endswith("relative_position_index") for k in rest)
    image = torch.rand(1, 3, 64, 64)
    # The classifier's last map, before its norm.
    expected = fpn.bottom_up.norms[3](body.features(image)).permute(0, 3, 1, 2)
    torch.testing.assert_close(fpn.bottom_up(image)["stage4"], expected)


def test_names_go_both_ways() -> None:
    state = as_released(classifier().state_dict())
    skipped = ("norm.", "head.")
    kept = {
        k: v
        for k, v in state.items()
        if not k.startswith(skipped) and "index" not in k and "mask" not in k
    }
    back = SWIN_IMAGENET.to_theirs(swin_to_ours(state))
    assert back.keys() == kept.keys() and all(back[k] is kept[k] for k in kept)


def test_foreign_weights_are_refused() -> None:
    with pytest.raises(KeyError, match=r"blocks.0.attn.qkv.weight"):
        swin_to_ours({"blocks.0.attn.qkv.weight": torch.zeros(1)})
