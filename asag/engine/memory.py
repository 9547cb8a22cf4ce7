"""Memory check before training, and advice when memory runs out."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..modeling.layers.buffers import preserved_buffers
from ..modeling.registry import check_choice
from .non_finite import watch_predictions
from .rng import preserved_rng
from .step import TrainStep, unwrap

MODES = ("auto", "always", "never")
GIB = 2**30
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"

logger = logging.getLogger(__name__)


class NotEnoughMemoryError(RuntimeError):
    """Memory ran out; the message names the keys to change."""


@dataclass(frozen=True)
class LargestBatch:
    """Size of the largest batch in one forward and backward pass of a process.

    Attributes:
        images: number of images in one pass.
        height, width: padded size of the batch, pixels.
        objects: largest number of objects in an image.
    """

    images: int
    height: int
    width: int
    objects: int

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_dicts: Sequence[Mapping[str, Any]]) -> LargestBatch:
        """Computes it from INPUT.*, SOLVER.{IMS_PER_BATCH, ACCUMULATE_STEPS} and the images."""
        images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.ACCUMULATE_STEPS
        height, width = largest_canvas(cfg, dataset_dicts, images)
        objects = max((_count_objects(x) for x in dataset_dicts), default=0)
        return cls(images, height, width, objects)

    def samples(self, num_classes: int) -> list[dict[str, Any]]:
        """Creates images of noise with random boxes."""
        generator = torch.Generator().manual_seed(0)
        shape = (3, self.height, self.width)
        return [
            {
                "image": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
                "instances": self._instances(num_classes, generator),
                "file_name": f"synthetic image {i + 1}",
            }
            for i in range(self.images)
        ]

    def _instances(self, num_classes: int, generator: torch.Generator) -> Instances:
        size = torch.tensor([self.width, self.height, self.width, self.height])
        corners = torch.rand(self.objects, 2, generator=generator) * 0.8
        sides = 0.05 + torch.rand(self.objects, 2, generator=generator) * 0.15
        boxes = torch.cat((corners, corners + sides), dim=1) * size
        labels = torch.arange(self.objects) % num_classes
        return Instances((self.height, self.width), gt_boxes=Boxes(boxes), gt_classes=labels)

    def __str__(self) -> str:
        return (
            f"{self.images} image(s) of {self.width} x {self.height} pixels with {self.objects} "
            "object(s) each"
        )


def largest_canvas(
    cfg: CfgNode, dataset_dicts: Sequence[Mapping[str, Any]], images: int
) -> tuple[int, int]:
    """Height and width of the largest padded batch that INPUT.* can produce from the images.

    With random crops, or with DATALOADER.ASPECT_RATIO_GROUPING False, a batch may contain images of
    both orientations; it is then as high as the highest and as wide as the widest.
    """
    crop = cfg.INPUT.CROP
    short, limit = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    shapes = {(x["height"], x["width"]) for x in dataset_dicts if "height" in x and "width" in x}
    resized = [_resize(h, w, short, limit) for h, w in shapes] or [(short, limit), (limit, short)]
    if crop.ENABLED and crop.TYPE == "absolute_range":
        low, high = min(crop.SIZE), max(crop.SIZE)
        resized += [_resize(low, high, short, limit), _resize(high, low, short, limit)]
    mixed = crop.ENABLED or not cfg.DATALOADER.ASPECT_RATIO_GROUPING
    if images == 1:
        groups = [[hw] for hw in resized]
    elif mixed:
        groups = [resized]
    else:
        wide = [hw for hw in resized if hw[1] > hw[0]]
        groups = [wide, [hw for hw in resized if hw not in wide]]
    canvases = [(max(h for h, _ in g), max(w for _, w in g)) for g in groups if g]
    return max(canvases, key=math.prod)


def memory_check(cfg: CfgNode, step: TrainStep, dataset_dicts: Sequence[Mapping[str, Any]]) -> None:
    """Runs the largest step and logs its memory, as SOLVER.MEMORY_CHECK says.

    Only forward and backward pass are run: weights, statistics, counters and random numbers do not
    change. The memory of the optimizer state is reserved meanwhile.

    Raises:
        NotEnoughMemoryError: the largest step does not fit.
        ValueError: an unknown SOLVER.MEMORY_CHECK.
    """
    mode, cuda = cfg.SOLVER.MEMORY_CHECK, step.device.type == "cuda"
    check_choice("SOLVER.MEMORY_CHECK", mode, MODES)
    if mode == "never" or (mode == "auto" and not cuda):
        return
    largest = LargestBatch.from_config(cfg, dataset_dicts)
    what = f"the largest step, {largest}"
    more = "SOLVER.MEMORY_CHECK never trains without this check"
    with memory_advice(cfg, what, more), _peak(step.device) as peak:
        dry_step(step, largest.samples(cfg.MODEL.ROI_HEADS.NUM_CLASSES))
    logger.info(f"memory: {what}, {peak[0]}")


def dry_step(step: TrainStep, samples: Sequence[dict[str, Any]]) -> None:
    """Runs forward and backward pass of one micro-batch and restores all state."""
    model = unwrap(step.model)
    model.train()
    step.optimizer.zero_grad(set_to_none=True)
    try:
        # The scalars of this pass go into a storage of their own, which is discarded.
        with preserved_rng(), preserved_buffers(model), EventStorage(), watch_predictions(model):
            reserved = _reserve(step)
            with torch.autocast(step.device.type, step.amp_dtype, enabled=bool(step.amp_dtype)):
                losses = model(list(samples))
            sum(loss.float() for loss in losses.values()).backward()
            del reserved
    finally:
        step.optimizer.zero_grad(set_to_none=True)


def _reserve(step: TrainStep) -> list[Tensor]:
    """Allocates as much memory as the optimizer state.

    With accumulation the gradients are added: they exist already during the forward pass of the
    next micro-batch.
    """
    copies = int(step.accumulate_steps > 1)
    if not step.optimizer.state:
        copies += 2 if isinstance(step.optimizer, torch.optim.AdamW) else 1
    return [
        torch.empty_like(p)
        for group in step.optimizer.param_groups
        for p in group["params"]
        for _ in range(copies)
    ]


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[str]]:
    """Yields a list that receives the peak memory of the block, in words."""
    peaks: list[str] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peaks
        peak = torch.cuda.max_memory_allocated(device) / GIB
        whole = torch.cuda.get_device_properties(device).total_memory / GIB
        peaks.append(f"takes {peak:.1f} of {whole:.1f} GiB")
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = resident_peak()
        yield peaks
        after = resident_peak()
        more = (after - before) / GIB
        peaks.append(f"takes {after / GIB:.2f} GiB, {more:.2f} more than before")


def resident_peak() -> float:
    """Peak physical memory of this process in bytes; NaN where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    # Kilobytes, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def memory_advice(cfg: CfgNode, what: str, more: str = "") -> Iterator[None]:
    """Converts out-of-memory errors of a block into an error with advice.

    Args:
        cfg: the configuration of the run.
        what: describes the block.
        more: a sentence for the end of the message.

    Raises:
        NotEnoughMemoryError: in place of torch's errors.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        lines = [f"the memory is not enough for {what}. Any of these needs less:", *advice(cfg)]
        if more:
            lines.append(f"({more})")
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise NotEnoughMemoryError("\n".join([*lines, f"({first})"])) from error


def advice(cfg: CfgNode) -> list[str]:
    """Lines with the keys that reduce memory, their values, and what to set."""
    solver, model = cfg.SOLVER, cfg.MODEL
    parts = solver.ACCUMULATE_STEPS
    cuda = model.DEVICE.startswith("cuda")
    lines = []
    if parts * comm.get_world_size() < solver.IMS_PER_BATCH:
        lines.append(
            f"SOLVER.ACCUMULATE_STEPS {parts}: raise it; the batch stays and is processed in parts"
        )
        lines.append(f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}: lower it")
    if not model.ACTIVATION_CHECKPOINTING:
        lines.append("MODEL.ACTIVATION_CHECKPOINTING False: True recomputes most activations")
    if not solver.AMP.ENABLED:
        kind = "" if cuda else " with SOLVER.AMP.DTYPE bfloat16"
        lines.append(f"SOLVER.AMP.ENABLED False: True{kind} halves most activations")
    lines.append(
        f"INPUT.MAX_SIZE_TRAIN {cfg.INPUT.MAX_SIZE_TRAIN} and INPUT.MIN_SIZE_TRAIN "
        f"{tuple(cfg.INPUT.MIN_SIZE_TRAIN)}: lower them"
    )
    if cuda:
        lines.append(f"the environment variable {ALLOCATOR}: against fragmentation")
    return [f"  {line}" for line in lines]


def describe_batch(batch: Sequence[Mapping[str, Any]]) -> str:
    """Describes the size of a training batch."""
    height, width = (max((x["image"].shape[i] for x in batch), default=0) for i in (-2, -1))
    objects = max((len(x["instances"]) for x in batch if "instances" in x), default=0)
    return f"{len(batch)} image(s) of up to {width} x {height} pixels and {objects} object(s)"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True for out-of-memory errors of torch, on any device, and of Python."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(
            x in text for x in ("out of memory", "can't allocate memory", "cublas_status_alloc")
        )
    )


def _resize(height: int, width: int, short: int, limit: int) -> tuple[int, int]:
    """Size after `ResizeShortestEdge`."""
    scale = short / min(height, width)
    if scale * max(height, width) > limit:
        scale = limit / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _count_objects(dataset_dict: Mapping[str, Any]) -> int:
    return sum(not a.get("iscrowd", 0) for a in dataset_dict.get("annotations", ()))
