"""detrex's layouts: the authors' reference checkpoints under detrex's names give the same outputs.

Names are those of detrex's modules (`detrex/layers`, `projects/detr`, `projects/conditional_detr`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.suites import conditional_detr
from conformance.suites.common import Check, compare
from detectron2.modeling import build_model

from asag import load_config
from asag.checkpoint.detrex import DETREX_CONDITIONAL_DETR, DETREX_DETR
from asag.checkpoint.layouts import LAYOUTS, convert, recognize
from asag.checkpoint.loading import load_weights
from asag.modeling.layers.position_encoding import inverse_sigmoid

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "cond_tiny32": (DETREX_CONDITIONAL_DETR, False),
    "cond_slim_resnet50": (DETREX_CONDITIONAL_DETR, False),
    "detr_tiny32": (DETREX_DETR, False),
    "detr_slim_resnet50": (DETREX_DETR, True),
}
# Of a layer: the authors' name -> detrex's. A layer keeps its attentions, norms and networks in
# lists, in the order in which they are applied.
PARTS = {
    "linear1": "ffns.0.layers.0.0",
    "linear2": "ffns.0.layers.1",
    "norm1": "norms.0",
    "norm2": "norms.1",
    "norm3": "norms.2",
    "multihead_attn": "attentions.1.attn",
    "cross_attn.out_proj": "attentions.1.out_proj",
    **{
        f"{short}_{theirs}_proj": f"attentions.{index}.{ours}_proj"
        for index, short in enumerate(("sa", "ca"))
        for theirs, ours in (
            ("qcontent", "query_content"),
            ("qpos", "query_pos"),
            ("kcontent", "key_content"),
            ("kpos", "key_pos"),
            ("v", "value"),
            ("qpos_sine", "query_pos_sine"),
        )
    },
}


def detrex_name(name: str, conditional: bool, torchvision: bool) -> str:
    """Returns detrex's name of a parameter of the authors."""
    if name.startswith("backbone."):
        return name.replace("backbone.0.", "backbone.") if torchvision else detectron2_name(name)
    name = name.replace("decoder.norm.", "decoder.post_norm_layer.")
    found = re.fullmatch(r"(transformer\.(?:en|de)coder\.layers\.\d+\.)(.+)\.(\w+)", name)
    if not found:
        return name
    layer, part, kind = found.groups()
    if part.startswith("self_attn"):
        # The decoder of Conditional DETR has projections of its own around the attention.
        own = conditional and "decoder" in layer
        part = part.replace("self_attn", "attentions.0" if own else "attentions.0.attn")
    else:
        head, _, rest = part.partition(".")
        part = PARTS[part] if part in PARTS else ".".join(filter(None, (PARTS[head], rest)))
    return f"{layer}{part}.{kind}"


def detectron2_name(name: str) -> str:
    """Detectron2's name of a parameter of torchvision's network."""
    path = name.removeprefix("backbone.0.body.").split(".")
    if path[0] in ("conv1", "bn1"):
        return ".".join(["backbone.stem.conv1", *(["norm"] * (path[0] == "bn1")), *path[1:]])
    stage, block, part, *rest = path
    if part == "downsample":
        part, rest = "shortcut", ["norm", *rest[1:]] if rest[0] == "1" else rest[1:]
    elif part.startswith("bn"):
        part, rest = f"conv{part[2:]}", ["norm", *rest]
    return ".".join([f"backbone.res{int(stage[5:]) + 1}", block, part, *rest])


@pytest.mark.parametrize("name", CASES)
def test_renamed_reference_checkpoints_give_the_reference_outputs(
    name: str, golden_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, torchvision = CASES[name]
    case: dict[str, Any] = torch.load(golden_dir / f"conditional_detr/{name}.pt", weights_only=True)
    conditional = name.startswith("cond")
    renamed = {detrex_name(k, conditional, torchvision): v for k, v in case["state_dict"].items()}
    assert len(renamed) == len(case["state_dict"]) and renamed.keys() != case["state_dict"].keys()
    assert LAYOUTS[recognize(renamed)] is table
    ours = "CONDITIONAL_DETR" if conditional else "DETR"
    monkeypatch.setattr(conditional_detr, ours, table)
    if conditional:  # by which the suite tells the models apart
        assert any("ref_point_head" in x for x in renamed)
    checked = conditional_detr.ModelCase({**case, "state_dict": renamed, "loss_cases": []}).checks()
    results = {check.name: compare(check) for check in (Check(*x) for x in checked)}
    assert len(results) > 10 and all(good for _, good in results.values()), results
    back, source, left_out = convert(renamed, f"authors-{'conditional-' * conditional}detr")
    assert LAYOUTS[source] is table and not left_out
    assert all(torch.equal(back[k], v) for k, v in case["state_dict"].items())


def test_reference_points_stay_further_from_the_borders(tmp_path: Path) -> None:
    """detrex's inverse sigmoid is cut off at 0.001, the authors' at 0.00001."""
    config = str(ROOT / "configs/ConditionalDETR/conditional_detr_tiny.yaml")
    torch.manual_seed(0)
    models = [build_model(load_config(config, ["MODEL.DEVICE", "cpu"])).eval() for _ in range(2)]
    state = models[0].state_dict()
    torch.save({"model": DETREX_CONDITIONAL_DETR.to_theirs(state)}, tmp_path / "x.pth")
    load_weights(models[1], str(tmp_path / "x.pth"))
    heads = [x.roi_heads for x in models]
    assert [x.reference_eps for x in heads] == [1e-5, 1e-3]
    points = torch.tensor([[[0.0004, 0.5]]])
    queries = type("Queries", (), {"points_xy": points})
    sizes = type("Sizes", (), {"whwh": torch.ones(1, 4)})
    with torch.no_grad():
        for layer in heads[0].box_coordinates[-1].parameters():
            layer.zero_()
        heads[1].box_coordinates.load_state_dict(heads[0].box_coordinates.state_dict())
        boxes = [x.predict_boxes(torch.zeros(1, 1, heads[0].dim), queries, sizes) for x in heads]
    centers = [(x[..., :2] + x[..., 2:]) / 2 for x in boxes]
    for center, eps in zip(centers, (1e-5, 1e-3), strict=True):
        assert torch.allclose(center, inverse_sigmoid(points, eps).sigmoid(), atol=1e-6)
    assert float(centers[1][..., 0]) == pytest.approx(0.001, rel=1e-2)
