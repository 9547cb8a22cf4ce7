"""Training loader whose order and augmentation depend on (seed, position) only.

Not on the number of workers, nor on whether the run was interrupted: a loader built with
`start_iter` goes on exactly where an uninterrupted one would be. (The test loader is Detectron2's
`build_detection_test_loader`.)
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from asag.data.sampler import SeekableBatchSampler

Sample = dict[str, Any]


class SampleError(RuntimeError):
    """A sample that could not be prepared; names the image and where in training it stood."""


@contextlib.contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """Run a block with `random`, `numpy.random` and torch's CPU generator seeded from both values.

    The caller's generators are put back afterwards. CUDA generators are left alone.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    words = np.random.SeedSequence([seed, position]).generate_state(8)
    try:
        random.seed(words.tobytes())
        np.random.seed(words)
        # torch.manual_seed would also reseed every CUDA device.
        torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class PositionedDataset(Dataset):
    """Maps (position, index) to the sample of image `index`, its randomness set by the position."""

    def __init__(
        self, dataset_dicts: Sequence[Sample], mapper: Callable[[Sample], Sample], *, seed: int
    ) -> None:
        # Serialized: workers that count references of Python objects would copy all of them.
        self._dicts = DatasetFromList(list(dataset_dicts), copy=False)
        self._mapper = mapper
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dicts)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        position, index = place
        dataset_dict = self._dicts[index]
        try:
            with seeded(self._seed, position):
                sample = self._mapper(dataset_dict)
        except Exception as error:
            raise SampleError(
                f"image {dataset_dict.get('file_name')} (image_id {dataset_dict.get('image_id')}, "
                f"sample {position}) could not be prepared: {type(error).__name__}: {error}"
            ) from error
        if sample is None:
            raise SampleError(
                f"the mapper gave nothing for image {dataset_dict.get('file_name')}; leave such "
                "images out of the data set, so that every position has its sample"
            )
        return sample


def build_train_loader(
    dataset_dicts: Sequence[Sample],
    mapper: Callable[[Sample], Sample],
    *,
    total_batch_size: int,
    num_workers: int,
    seed: int | None,
    start_iter: int = 0,
    aspect_ratio_grouping: bool = True,
    world_size: int | None = None,
    rank: int | None = None,
) -> DataLoader:
    """Endless loader of this rank's batches, each a list of samples.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        mapper: makes a sample of a dict; may draw from `random`, `numpy.random` and torch.
        total_batch_size: images of all ranks in one step (SOLVER.IMS_PER_BATCH), a multiple of the
            ranks.
        num_workers: processes that prepare samples; 0 works in the caller, whose generators are
            untouched.
        seed: of order and augmentation, >= 0; None draws one and shares it among the ranks, which
            cannot be resumed exactly.
        start_iter: first training step to deliver.
        aspect_ratio_grouping: batches of all landscape or all portrait images, which saves padding.
        world_size: number of ranks; default: that of the process group.
        rank: default: that of this process.

    Raises:
        ValueError: no images, a batch that the ranks cannot share evenly, or dicts without a size
            when grouping.
    """
    world_size = comm.get_world_size() if world_size is None else world_size
    rank = comm.get_rank() if rank is None else rank
    seed = comm.shared_random_seed() if seed is None else seed
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH = {total_batch_size}: need a positive multiple of the "
            f"{world_size} process(es)"
        )
    sampler = SeekableBatchSampler(
        num_images=len(dataset_dicts),
        batch_size=total_batch_size // world_size,
        seed=seed,
        is_wide=_is_wide(dataset_dicts) if aspect_ratio_grouping else None,
        rank=rank,
        world_size=world_size,
        start_step=start_iter,
    )
    return DataLoader(
        PositionedDataset(dataset_dicts, mapper, seed=seed),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=_single_threaded,
        # Of its own, because a DataLoader draws a number whenever it starts.
        generator=torch.Generator(),
    )


def _is_wide(dataset_dicts: Sequence[Sample]) -> list[bool]:
    try:
        return [d["width"] > d["height"] for d in dataset_dicts]
    except KeyError as error:
        raise ValueError(
            f"a dataset dict has no {error}: add image sizes, or set "
            "DATALOADER.ASPECT_RATIO_GROUPING to False"
        ) from error


def _as_list(samples: list[Sample]) -> list[Sample]:
    return samples


def _single_threaded(worker_id: int) -> None:
    """OpenCV's own threads in every worker would fight for the same cores."""
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)
