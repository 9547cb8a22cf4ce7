"""Memory: the largest step tried out before the training, and advice where it is not enough."""

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
    """The memory is not enough; the message says which keys to change."""


@dataclass(frozen=True)
class LargestBatch:
    """The most that a forward and backward pass of one process may have to hold.

    Attributes:
        images: of one pass.
        height, width: of the batch's canvas, pixels.
        objects: of the fullest image.
    """

    images: int
    height: int
    width: int
    objects: int

    @classmethod
    def from_config(cls, cfg: CfgNode, dataset_dicts: Sequence[Mapping[str, Any]]) -> LargestBatch:
        """By INPUT.*, SOLVER.IMS_PER_BATCH, SOLVER.ACCUMULATE_STEPS and the training images."""
        images = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() // cfg.SOLVER.ACCUMULATE_STEPS
        height, width = largest_canvas(cfg, dataset_dicts, images)
        objects = max((_count_objects(x) for x in dataset_dicts), default=0)
        return cls(images, height, width, objects)

    def samples(self, num_classes: int) -> list[dict[str, Any]]:
        """Images of noise, and boxes spread over them."""
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
    """Height and width of the largest batch that INPUT.* can make of the training images.

    A batch of images of both orientations, which random crops and DATALOADER.ASPECT_RATIO_GROUPING
    False permit, is as high as the highest and as wide as the widest.
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
    """Tries the largest step out and logs what it takes, if SOLVER.MEMORY_CHECK asks for it.

    Forward and backward pass only: weights, statistics, counters and random numbers of the training
    are as if it had not been. What the optimizer will hold is set aside meanwhile.

    Raises:
        NotEnoughMemoryError: see its message.
        ValueError: an unknown SOLVER.MEMORY_CHECK.
    """
    mode, cuda = cfg.SOLVER.MEMORY_CHECK, step.device.type == "cuda"
    check_choice("SOLVER.MEMORY_CHECK", mode, MODES)
    if mode == "never" or (mode == "auto" and not cuda):
        return
    largest = LargestBatch.from_config(cfg, dataset_dicts)
    what = f"the largest step, {largest}"
    more = "SOLVER.MEMORY_CHECK never trains without having tried it"
    with memory_advice(cfg, what, more), _peak(step.device) as peak:
        dry_step(step, largest.samples(cfg.MODEL.ROI_HEADS.NUM_CLASSES))
    logger.info(f"memory: {what}, {peak[0]}")


def dry_step(step: TrainStep, samples: Sequence[dict[str, Any]]) -> None:
    """Forward and backward pass of one part of a step, without a trace."""
    model = unwrap(step.model)
    model.train()
    step.optimizer.zero_grad(set_to_none=True)
    try:
        # The scalars of this pass go into a storage of their own, which is thrown away.
        with preserved_rng(), preserved_buffers(model), EventStorage(), watch_predictions(model):
            reserved = _reserve(step)
            with torch.autocast(step.device.type, step.amp_dtype, enabled=bool(step.amp_dtype)):
                losses = model(list(samples))
            sum(loss.float() for loss in losses.values()).backward()
            del reserved
    finally:
        step.optimizer.zero_grad(set_to_none=True)


def _reserve(step: TrainStep) -> list[Tensor]:
    """As much memory as the optimizer will keep, and with accumulation also the gradients, which
    are there already when the next part's forward pass runs."""
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
    """Puts what the block took, in words, into the list that it yields."""
    found: list[str] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        peak = torch.cuda.max_memory_allocated(device) / GIB
        whole = torch.cuda.get_device_properties(device).total_memory / GIB
        found.append(f"takes {peak:.1f} of {whole:.1f} GiB")
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = _resident_peak()
        yield found
        after = _resident_peak()
        more = (after - before) / GIB
        found.append(f"takes {after / GIB:.2f} GiB, {more:.2f} more than all before")


def _resident_peak() -> float:
    """Most bytes of physical memory that this process ever held; NaN where that is not told."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    # Kilobytes, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def memory_advice(cfg: CfgNode, what: str, more: str = "") -> Iterator[None]:
    """Turns a lack of memory inside of the block into advice.

    Args:
        cfg: of the training.
        what: took too much.
        more: a sentence for the end.

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
    """Lines with the keys that save memory, their values, and what to set."""
    solver, model = cfg.SOLVER, cfg.MODEL
    parts = solver.ACCUMULATE_STEPS
    cuda = model.DEVICE.startswith("cuda")
    lines = []
    if parts * comm.get_world_size() < solver.IMS_PER_BATCH:
        lines.append(
            f"SOLVER.ACCUMULATE_STEPS {parts}: raise it; the batch stays and is worked on in parts"
        )
        lines.append(f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}: lower it")
    if not model.ACTIVATION_CHECKPOINTING:
        lines.append("MODEL.ACTIVATION_CHECKPOINTING False: True computes twice instead of keeping")
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
    """Size of a training batch in words."""
    height, width = (max((x["image"].shape[i] for x in batch), default=0) for i in (-2, -1))
    objects = max((len(x["instances"]) for x in batch if "instances" in x), default=0)
    return f"{len(batch)} image(s) of up to {width} x {height} pixels and {objects} object(s)"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, on any device, or of Python means a lack of memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(
            x in text for x in ("out of memory", "can't allocate memory", "cublas_status_alloc")
        )
    )


def _resize(height: int, width: int, short: int, limit: int) -> tuple[int, int]:
    """As `ResizeShortestEdge`."""
    scale = short / min(height, width)
    if scale * max(height, width) > limit:
        scale = limit / max(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _count_objects(dataset_dict: Mapping[str, Any]) -> int:
    return sum(not a.get("iscrowd", 0) for a in dataset_dict.get("annotations", ()))
