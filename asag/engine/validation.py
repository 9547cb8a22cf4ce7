"""Losses on a validation set.

B images of a batch.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data import SparseDetectionMapper
from ..modeling.layers.loss_weights import mean_over_workers
from .non_finite import watch_predictions
from .rng import preserved_rng
from .step import amp_dtype

# Modules that compute losses in training mode only. Their submodules, and everything else, stay in
# evaluation mode: no dropout, norms with the statistics that inference uses.
LOSS_MODULES = ("", "proposal_generator", "proposal_generator.rpn", "roi_heads")
SEED = 0  # of models that draw noise or samples: evaluations differ by the weights only


def validation_losses(
    cfg: CfgNode, model: nn.Module, dataset_dicts: Sequence[dict[str, Any]] | None = None
) -> dict[str, float]:
    """Computes the training losses on images that are prepared as for testing.

    Batches are weighted by their objects: a loss normalized by objects has the value that it would
    have for all images in one batch, for any batch size and number of processes. (Other losses
    become the same weighted mean over the batches.) Every process must call it.

    Args:
        cfg: DATASETS.TEST (the first), INPUT.*, SOLVER.AMP.*; a batch has the size of a
            micro-batch in training.
        model: the detector, not wrapped. Weights, buffers and modes are restored, as are the
            random number generators.
        dataset_dicts: images; default: the first data set of DATASETS.TEST.

    Returns:
        name -> loss, and their sum as `total_loss`; the same on every process.

    Raises:
        ValueError: no images.
    """
    if dataset_dicts is None:
        dataset_dicts = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    if not dataset_dicts:
        raise ValueError("TEST.LOSS: the first data set of DATASETS.TEST has no images")
    sums: list[Tensor] = []  # each (1 + losses,): objects of a batch, its undivided losses
    with (
        preserved_rng(),
        EventStorage(),
        torch.no_grad(),
        watch_predictions(model),
        loss_mode(model) as restore_buffers,
    ):
        _seed_all(SEED)
        for batch, counts in _batches(cfg, dataset_dicts):
            device = next(model.parameters()).device.type
            with torch.autocast(device, amp_dtype(cfg), enabled=cfg.SOLVER.AMP.ENABLED):
                losses = model(batch)
            restore_buffers()
            values = torch.stack([x.float() for x in losses.values()])
            objects = values.new_tensor([sum(len(x["instances"]) for x in batch)])
            values = torch.cat((objects, mean_over_workers(objects) * values))
            sums.append(values if counts else torch.zeros_like(values))
    total = torch.stack(sums).sum(dim=0)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(total)
    _, *means = (total / total[0].clamp(min=1)).tolist()
    named = dict(zip(losses, means, strict=True))
    return named | {"total_loss": sum(means)}


@contextlib.contextmanager
def loss_mode(model: nn.Module) -> Iterator[Any]:
    """Switches a model to return losses, with everything else in evaluation mode.

    Yields:
        A function that restores the buffers, such as counters of steps, after a forward pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = list(model.buffers())
    saved = [x.clone() for x in buffers]

    def restore_buffers() -> None:
        for buffer, value in zip(buffers, saved, strict=True):
            buffer.copy_(value)

    model.eval()
    for path in LOSS_MODULES:
        with contextlib.suppress(AttributeError):
            model.get_submodule(path).training = True
    try:
        yield restore_buffers
    finally:
        with torch.no_grad():
            restore_buffers()
        for module, mode in modes:
            module.training = mode


def _batches(
    cfg: CfgNode, dataset_dicts: Sequence[dict[str, Any]]
) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """Yields the batches of this process, and True for each that counts.

    Criteria communicate with the other processes, so all of them need the same number of batches: a
    process that has none left repeats a batch that does not count.
    """
    world, rank = comm.get_world_size(), comm.get_rank()
    size = max(1, cfg.SOLVER.IMS_PER_BATCH // (world * cfg.SOLVER.ACCUMULATE_STEPS))
    indices = range(len(dataset_dicts))
    batches = [list(indices[i : i + size]) for i in range(0, len(dataset_dicts), size)]
    steps = -(-len(batches) // world)
    own = [step * world + rank for step in range(steps)]
    mapper = SparseDetectionMapper.without_augmentation(cfg)
    loader = DataLoader(
        MapDataset(DatasetFromList(list(dataset_dicts), copy=False), mapper),
        batch_sampler=[batches[i if i < len(batches) else 0] for i in own],
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
    )
    yield from zip(loader, (i < len(batches) for i in own), strict=True)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
