"""Inputs of the figure scripts: a trained model, and images of a file or a data set."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..checkpoint.loading import PublishedCheckpointer
from ..config.loading import load_config
from ..data import SparseDetectionMapper, register_dataset
from ..data.catalog import check_registered
from ..data.image_io import read_image
from ..engine.defaults import choose_device, use_data


def open_model(
    config: str, options: Sequence[str] = (), weights: str | None = None
) -> tuple[CfgNode, nn.Module]:
    """A configuration and its model in evaluation mode, on a GPU if there is one.

    Args:
        config: yaml file.
        options: KEY VALUE words.
        weights: checkpoint; "" for none, None for MODEL.WEIGHTS.

    Raises:
        ValueError: the configuration or the weights cannot be used.
    """
    cfg = _config(config, options)
    return cfg, _model(cfg, cfg.MODEL.WEIGHTS if weights is None else weights)


def add_dataset_options(command: argparse.ArgumentParser) -> None:
    """The options of a command that `open_model_and_dataset` reads."""
    command.add_argument("--config", required=True, help="yaml file of the model")
    command.add_argument("--weights", required=True, help='checkpoint; "" for none')
    command.add_argument("--dataset", help="registered name; default: of DATASETS.TEST")
    command.add_argument("--data", metavar="DIR", help="COCO folder instead")
    command.add_argument("options", nargs="*", metavar="KEY VALUE", help="overrides")


def open_model_and_dataset(
    given: argparse.Namespace, scratch: str
) -> tuple[CfgNode, nn.Module, str]:
    """Configuration, model in evaluation mode, and the name of the data set to look at.

    Args:
        given: what `add_dataset_options` asks for.
        scratch: folder for cleaned copies of the annotations of --data.

    Raises:
        ValueError: there is no data set, or configuration, data or weights cannot be used.
    """
    cfg = _config(given.config, given.options)
    dataset = given.dataset
    if given.data:
        registered = register_dataset(given.data, output_dir=scratch, evaluate_on_train=True)
        use_data(cfg, registered)
        dataset = registered.val
    cfg.DATASETS.TEST = (dataset,) if dataset else cfg.DATASETS.TEST[:1]
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; pass --dataset NAME or --data DIR")
    check_registered(cfg, need_train=False)
    return cfg, _model(cfg, given.weights), cfg.DATASETS.TEST[0]


def read_samples(cfg: CfgNode, dataset: str, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Images of a data set by index, with their objects, resized as for testing.

    Raises:
        ValueError: there is no such index.
    """
    mapper = SparseDetectionMapper.without_augmentation(cfg)
    dicts = DatasetCatalog.get(dataset)
    for index in indices:
        if not 0 <= index < len(dicts):
            raise ValueError(f"there is no image {index}: {dataset} has {len(dicts)}")
        yield mapper(dicts[index])


def read_picture(path: str, cfg: CfgNode) -> tuple[Tensor, np.ndarray]:
    """A file as the network's input, resized as for testing.

    Returns:
        (3, H, W) uint8 in the order of INPUT.FORMAT, and the same as (H, W, 3) RGB.

    Raises:
        ImageReadError: the file is absent or damaged.
    """
    pixels = read_image(path, cfg.INPUT.FORMAT)
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    pixels = resize.get_transform(pixels).apply_image(pixels)
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return image, pixels[..., ::-1] if cfg.INPUT.FORMAT == "BGR" else pixels


def _config(path: str, options: Sequence[str]) -> CfgNode:
    cfg = load_config(path, options)
    choose_device(cfg, num_gpus=1)
    return cfg


def _model(cfg: CfgNode, weights: str) -> nn.Module:
    model = build_model(cfg).eval()
    PublishedCheckpointer(model).load(weights)
    return model
