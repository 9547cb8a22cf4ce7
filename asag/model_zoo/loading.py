"""From a name, a file or an address to a configuration and a model with weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..config.loading import load_config
from .entries import Entry, entry, names

RUN_CONFIG = "config.yaml"
RUN_WEIGHTS = ("model_best.pth", "model_final.pth", "model.safetensors")
WEIGHTS_SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".safetensors")
HUGGING_FACE = "hf://"


def config(name: str, options: Sequence[str] = ()) -> CfgNode:
    """Configuration of a name, not frozen.

    Args:
        name: one of `names()`.
        options: KEY VALUE words that override it.

    Raises:
        KeyError: unknown name or key; the message has the nearest ones.
    """
    known = entry(name)
    return load_config(str(known.config), [*known.options, *options])


def get(
    name: str,
    pretrained: bool | str | os.PathLike[str] = False,
    device: str | None = None,
    options: Sequence[str] = (),
) -> nn.Module:
    """Builds a model.

    Args:
        name: one of `names()`.
        pretrained: False for random weights, True for those that come with the library or can be
            downloaded, or a file or URL of weights in any layout the library knows.
        device: "cpu", "cuda", ...; default: a GPU if there is one.
        options: KEY VALUE words that override the configuration, such as MODEL.DECODER.MAIN_COPY
            2 for the decoder head of ASAG that most published numbers were taken with.

    Returns:
        The model in evaluation mode.

    Raises:
        KeyError: unknown name or key; the message has the nearest ones.
        FileNotFoundError: no such file of weights.
        DownloadError: they cannot be downloaded; the message has address and place.
        ValueError: `pretrained` is True but no weights can be had without a person, or the weights
            are not of this model.
    """
    # Loaded late: names and figures are to be had without it.
    from ..checkpoint.loading import load_weights

    cfg = config(name, [*options, "MODEL.DEVICE", choose_device(device)])
    if pretrained is True:
        pretrained = pretrained_weights(entry(name))
    if pretrained:  # a backbone needs no weights of its own then
        cfg.MODEL.WEIGHTS = os.fspath(pretrained)
    model = build_model(cfg)
    if pretrained:
        load_weights(model, os.fspath(pretrained))
    return model.eval()


def choose_device(device: str | None) -> str:
    """The device asked for, else the first GPU, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def pretrained_weights(known: Entry) -> str:
    """File or address of the weights of an entry.

    Raises:
        ValueError: there are none, or a person has to download them; the message says from where.
    """
    if known.weights is not None:
        return str(known.weights)
    release = known.release
    if release is not None and release.address is not None:
        return release.address
    ways = []
    if release is not None:
        file = f", file {release.file}" if release.file else ""
        note = f" ({release.note})" if release.note else ""
        ways.append(
            f"those of {release.trained_by} are at {release.page}{file}{note}: download them by "
            "hand and give the path (pretrained=FILE, in Detector.from_pretrained weights=FILE)"
        )
    same = [entry(x) for x in names() if entry(x).config == known.config]
    own = [x.name for x in same if x.weights or (x.release and x.release.address)]
    if own:
        ways.append(f"there are some of the same model under the name {' and '.join(own)}")
    if not ways and known.repository:
        ways.append(f"the authors' code is at {known.repository}; give the path of weights")
    way_out = "; ".join(ways or ["train some, and give their path"])
    raise ValueError(f"no weights of {known.name} can be had by its name alone; {way_out}")


def locate(
    source: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    options: Sequence[str] = (),
) -> CfgNode:
    """Configuration of a trained model, with MODEL.WEIGHTS pointing to its weights.

    Args:
        source: one of
            - a name of the zoo, or the address of published weights that it lists,
            - a folder that a training wrote: config.yaml and model_best.pth or model_final.pth,
            - a file of weights with config.yaml beside it,
            - a yaml file (then `weights` are needed),
            - hf://owner/name[@revision][/file], a Hugging Face repository with config.yaml.
        weights: file or address of other weights than those of the source.
        options: KEY VALUE words that override the configuration.

    Raises:
        FileNotFoundError: a file is missing; the message says which one and what to do.
        KeyError: no such name or key.
        ValueError: there are no weights.
    """
    text = os.fspath(source)
    given = os.fspath(weights) if weights is not None else None
    listed = [x for x in map(entry, names()) if x.release and x.release.address == text]
    if listed:
        text = listed[0].name
    if text.startswith(HUGGING_FACE):
        file, found = _hugging_face(text)
    elif os.path.isdir(text):
        file, found = _run_folder(Path(text), needs_weights=given is None)
    elif text.endswith(WEIGHTS_SUFFIXES):
        file, found = _weights_file(text)
    elif text.endswith((".yaml", ".yml")):
        if not os.path.isfile(text):
            raise FileNotFoundError(f"no configuration file {text}")
        file, found = text, None
    elif "/" in text or os.sep in text:
        raise FileNotFoundError(
            f"{text}: no such folder or file; give a folder with {RUN_CONFIG} and weights, a file "
            "of weights, hf://owner/name, or a name of asag.model_zoo.names()"
        )
    else:
        known = entry(text)
        file, options = str(known.config), [*known.options, *options]
        found = pretrained_weights(known) if given is None else None
    if not (given or found):  # MODEL.WEIGHTS of a recipe is what its training starts from
        raise ValueError(f"{text} is a configuration alone; give weights=FILE as well")
    cfg = load_config(file, options)
    cfg.MODEL.WEIGHTS = given or found
    return cfg


def _run_folder(folder: Path, needs_weights: bool) -> tuple[str, str | None]:
    file = folder / RUN_CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {RUN_CONFIG}, which every training writes; is it the OUTPUT_DIR of "
            "one?"
        )
    found = next((folder / x for x in RUN_WEIGHTS if (folder / x).is_file()), None)
    if found is None and needs_weights:
        raise FileNotFoundError(
            f"{folder} has no weights yet ({', '.join(RUN_WEIGHTS)}); give weights=FILE for another"
        )
    return str(file), str(found) if found else None


def _weights_file(path: str) -> tuple[str, str]:
    remote = "://" in path
    if not remote and not os.path.isfile(path):
        raise FileNotFoundError(f"no weights file {path}")
    beside = os.path.join(os.path.dirname(path), RUN_CONFIG)
    if remote or not os.path.isfile(beside):
        raise FileNotFoundError(
            f"{path} has no {RUN_CONFIG} beside it, so its model is not known; give the name or "
            f"the yaml file of the model first and weights={path!r}"
        )
    return beside, path


def _hugging_face(address: str) -> tuple[str, str]:
    """Configuration (downloaded) and address of the weights of a repository."""
    from ..checkpoint.download import local_file

    if address.removeprefix(HUGGING_FACE).count("/") == 0:
        raise ValueError(f"{address}: write hf://owner/name, perhaps with @revision or /file")
    owner, name, *inside = address.removeprefix(HUGGING_FACE).split("/")
    file = HUGGING_FACE + "/".join([owner, name, *inside[:-1], RUN_CONFIG])
    try:
        return local_file(file), address
    except OSError as error:
        raise FileNotFoundError(
            f"{address}: {error}. A repository without {RUN_CONFIG} needs the name of its model "
            f"first and weights={address!r}"
        ) from error
