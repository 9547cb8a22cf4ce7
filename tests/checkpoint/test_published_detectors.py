"""Published detectors by name: what the list says, and one word from a web server to detections."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from torch import Tensor
from web_server import Page, Server

from asag import Detector, model_zoo
from asag.checkpoint.detr import UNUSED_CATEGORIES
from asag.checkpoint.download import _HUB_NAME, DownloadError, cached_path
from asag.checkpoint.layouts import LAYOUTS
from asag.model_zoo import entries

RELEASES = [x for x in map(model_zoo.entry, model_zoo.names()) if x.release]
ADDRESSES = [x for x in RELEASES if x.release.address]
COCO = [x["name"] for x in COCO_CATEGORIES if x["isthing"]]
# Every model as small as its parts allow, which no name in it changes.
SMALL: dict[str, Any] = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ENCODER.NUM_LAYERS": 1,
    "MODEL.DECODER.NUM_STAGES": 2,
    "MODEL.DECODER.HIDDEN_DIM": 16,
    "MODEL.DECODER.NUM_HEADS": 2,
    "MODEL.DECODER.FFN_DIM": 24,
    "MODEL.DECODER.DYNAMIC_DIM": 4,
    "MODEL.PROPOSAL_GENERATOR.NUM_QUERIES": 9,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
}
WORDS = [str(word) for pair in SMALL.items() for word in pair]
# One of each source.
NAMES = [
    "sparse_rcnn_r50_100pro_1x_mmdet",
    "detr_r50_150ep_mmdet2",
    "conditional_detr_r50_50ep",
    "conditional_detr_r50_50ep_detrex",
    "detr_r50_500ep",
    "detr_r50_500ep_detrex",
    "conditional_detr_r50_50ep_hf",
]
PICTURE = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)


# The list.


@pytest.mark.parametrize("known", RELEASES, ids=lambda x: x.name)
def test_every_release_says_whose_it_is_and_where(known: model_zoo.Entry) -> None:
    release = known.release
    assert release.layout in LAYOUTS and release.trained_by
    assert release.address or release.page
    suffix = re.search(r"_(mmdet2?|detrex|hf)$", known.name)
    assert known.recipe == (suffix is None) == release.layout.startswith("authors-")
    if suffix:
        source = {"mmdet": "MMDetection", "detrex": "detrex", "hf": "Hugging Face"}
        assert source[suffix[1].rstrip("2")] in release.trained_by
    low, high = (85, 95) if release.data == "CrowdHuman" else (30, 60)
    assert low < release.ap < high
    if known.recipe and known.claim:  # the file of a paper may differ from its table a little
        assert abs(release.ap - known.claim.ap) <= 0.2 and release.data == known.claim.data


def test_addresses_are_direct_and_belong_to_one_name_each() -> None:
    addresses = [x.release.address for x in ADDRESSES]
    assert len(set(addresses)) == len(addresses) > 25
    for address in addresses:
        assert re.match(r"hf://[\w-]+/[\w-]+$|https://.*\.pth$", address)
        hashed = "openmmlab" in address or "fbaipublicfiles" in address
        assert bool(_HUB_NAME.search(address)) == hashed


@pytest.mark.parametrize("known", ADDRESSES, ids=lambda x: x.name)
def test_configurations_say_what_the_weights_need(known: model_zoo.Entry) -> None:
    cfg = model_zoo.config(known.name)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    for key, value in LAYOUTS[known.release.layout].settings.items():
        node: Any = cfg
        for part in key.split("."):
            node = node[part]
        assert node == value
    name = known.name
    assert (101 if "r101" in name else 50) == cfg.MODEL.RESNETS.DEPTH
    assert (2 if "dc5" in name else 1) == cfg.MODEL.RESNETS.RES5_DILATION
    if found := re.search(r"(\d+)pro", name):
        assert int(found[1]) == cfg.MODEL.PROPOSAL_GENERATOR.NUM_QUERIES


def test_an_address_of_the_list_brings_its_configuration() -> None:
    known = model_zoo.entry("sparse_rcnn_r50_300pro_3x_mmdet")
    cfg = model_zoo.locate(known.release.address)
    assert known.release.address == cfg.MODEL.WEIGHTS and not cfg.MODEL.CLIP_BOXES
    hub = model_zoo.locate("hf://facebook/detr-resnet-101-dc5")
    assert hub.MODEL.RESNETS.DEPTH == 101 and hub.MODEL.WEIGHTS.startswith("hf://facebook")


def test_weights_behind_pages_say_where_and_how() -> None:
    with pytest.raises(
        ValueError, match=r"drive\.google.*file ASAG_A_r50_1x_100\.pth.*pretrained=FILE"
    ):
        model_zoo.get("asag_a_r50_100_1x", pretrained=True)
    with pytest.raises(ValueError, match=r"pan\.baidu\.com.* \(access code jysg\): download them"):
        Detector.from_pretrained("iou_sparse_rcnn_r50_100pro_3x")
    with pytest.raises(ValueError, match=r"under the name .*sparse_rcnn_r101_300pro_3x_mmdet"):
        model_zoo.get("sparse_rcnn_r101_300pro_3x", pretrained=True)
    copy = model_zoo.entry("asag_a_r50_100_1x").release.options
    assert copy == ("MODEL.DECODER.MAIN_COPY", "2")
    assert model_zoo.entry("asag_s_r50_crowdhuman").release.options[1] == "0"


# From a web server.


def small(name: str) -> CfgNode:
    return model_zoo.config(name, [*WORDS, "MODEL.DEVICE", "cpu"])


def published_file(name: str) -> tuple[bytes, dict[str, Tensor]]:
    """A file as the source of a name would publish it, and its weights as the model shall have
    them."""
    torch.manual_seed(0)
    state = build_model(small(name)).state_dict()
    # Biases away from where they start, so that queries and images differ.
    state = {k: v + torch.rand_like(v) if k.endswith("bias") else v for k, v in state.items()}
    layout = model_zoo.entry(name).release.layout
    theirs = LAYOUTS[layout].to_theirs(state)
    file, old = io.BytesIO(), {"_use_new_zipfile_serialization": False}
    if layout.startswith("mmdet"):
        meta = {"mmdet_version": "2.7.0", "CLASSES": tuple(COCO)}
        torch.save({"meta": meta, "state_dict": theirs}, file, **old)
    elif layout.startswith("transformers"):
        torch.save(with_unused_rows(theirs, "class_labels_classifier"), file)
    elif layout.startswith("authors"):
        torch.save({"model": with_unused_rows(theirs, "class_embed"), "epoch": 1}, file)
    else:
        torch.save({"model": theirs}, file)
    return file.getvalue(), state


def with_unused_rows(state: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
    """Classifiers with a row for each category number up to 90, as the authors publish them; those
    of no class would win everywhere."""
    result = dict(state)
    for kind in ("weight", "bias"):
        rows = state[f"{classifier}.{kind}"]
        filled = torch.full((91 + len(rows) - 80, *rows.shape[1:]), 9.0)
        filled[[i for i in range(len(filled)) if i not in UNUSED_CATEGORIES]] = rows
        result[f"{classifier}.{kind}"] = filled
    return result


@pytest.fixture
def redirect(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets a name's address point to the local server."""
    known = dict(entries._entries())
    monkeypatch.setattr(entries, "_entries", lambda: known)

    def to_local(name: str, body: bytes, file: str = "model.pth") -> Page:
        old = known[name]
        if old.release.address.startswith("hf://"):
            path = f"/{old.release.address.removeprefix('hf://')}/resolve/main/"
            sha = hashlib.sha256(body).hexdigest()
            commit = {"X-Repo-Commit": "c" * 40}
            labels = {i: "N/A" for i in range(91)}
            labels |= {x["id"]: x["name"] for x in COCO_CATEGORIES if x["isthing"]}
            config = json.dumps({"id2label": labels}).encode()
            server.put(f"{path}config.json", body=config, headers=commit | {"ETag": '"1"'})
            tree = f"/api/models{path.removesuffix('resolve/main/')}tree/main"
            listed = [{"type": "file", "path": "pytorch_model.bin", "size": 1, "oid": "1"}]
            listing = json.dumps(listed).encode()
            server.put(f"{tree}?recursive=true&expand=false", body=listing)
            return server.put(
                f"{path}pytorch_model.bin", body=body, headers=commit | {"ETag": f'"{sha}"'}
            )
        known[name] = replace(old, release=replace(old.release, address=server.url(f"/{file}")))
        return server.put(f"/{file}", body=body)

    yield to_local


@pytest.mark.parametrize("name", NAMES)
def test_one_word_gives_the_published_weights(name: str, redirect: Any) -> None:
    body, state = published_file(name)
    page = redirect(name, body)
    page.cuts.append(len(body) // 2)  # the first connection breaks
    model = model_zoo.get(name, pretrained=True, device="cpu", options=WORDS)
    assert not model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    if not name.endswith("hf"):  # its library keeps what arrived in pieces of 10 MB
        assert page.requested[0] is None and int(page.requested[1][6:-1]) > len(body) // 2 - 1000
    asked = len(page.requested)
    detector = Detector.from_pretrained(name, device="cpu", options=WORDS)
    assert list(detector.class_names) == COCO
    found = detector.predict(PICTURE, threshold=0.0)
    assert len(found) > 0 and len(page.requested) == asked  # it is kept
    (expected,) = model([detector.predictor.prepare(PICTURE)])
    assert torch.equal(found.boxes_xyxy, expected["instances"].pred_boxes.tensor)
    assert {x.name for x in found} <= set(COCO)


def test_a_file_that_its_name_belies_is_refused(redirect: Any, server: Server) -> None:
    name = "detr_r50_500ep"
    body, _ = published_file(name)
    sha = hashlib.sha256(body).hexdigest()
    redirect(name, body, f"detr-{sha[:8]}.pth")
    assert model_zoo.get(name, pretrained=True, device="cpu", options=WORDS)
    redirect(name, body, "detr-0123abcd.pth")
    with pytest.raises(DownloadError, match=rf"SHA-256 {sha} where 0123abcd was expected"):
        Detector.from_pretrained(name, device="cpu", options=WORDS)
    assert not cached_path(server.url("/detr-0123abcd.pth")).exists()


def test_offline_the_message_has_address_and_place(redirect: Any, server: Server) -> None:
    name = "sparse_rcnn_r50_100pro_1x_mmdet"
    redirect(name, b"", "a/sparse-0123abcd.pth")
    url = server.url("/a/sparse-0123abcd.pth")
    server.shutdown()
    server.server_close()
    with pytest.raises(DownloadError) as caught:
        model_zoo.get(name, pretrained=True, device="cpu", options=WORDS)
    assert f"cannot download {url}" in str(caught.value)
    assert f"bring the file to {cached_path(url)}" in str(caught.value)


def test_a_file_given_by_hand_needs_no_server(tmp_path: Path) -> None:
    name = "sparse_rcnn_r50_100pro_1x_mmdet"
    body, state = published_file(name)
    (tmp_path / "x.pth").write_bytes(body)
    model = model_zoo.get(name, pretrained=tmp_path / "x.pth", device="cpu", options=WORDS)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
