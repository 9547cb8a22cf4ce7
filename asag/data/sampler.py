"""Order of the training images: a pure function of (seed, position), for any rank.

The global sequence of samples is counted by `position` = 0, 1, 2, ... Step `s` of training takes
the positions [s * total_batch, (s + 1) * total_batch), rank r the r-th part of them. Nothing
depends on what ran before, so a run can be continued at any step without replaying the earlier
ones.
"""

from collections.abc import Iterator, Sequence

import numpy as np


class SeekableBatchSampler:
    """Endless batches of (position, image index) of one rank.

    Every epoch is a new permutation of the data set, cut to a whole number of steps; what is cut
    off is random and changes from epoch to epoch. A data set smaller than one step's batch is
    repeated first. With grouping, the images of a batch are all landscape or all portrait, except
    for at most one mixed batch an epoch.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        seed: int,
        is_wide: Sequence[bool] | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        """
        Args:
            num_images: size of the data set, > 0.
            batch_size: images of one rank in one step, > 0.
            seed: of the order, >= 0.
            is_wide: for each image, whether width > height, to group by; None does not group.
            rank: whose batches to yield.
            world_size: number of ranks.
            start_step: first step to yield.
        """
        if num_images < 1:
            raise ValueError("the data set has no images: nothing to sample")
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: need at least one image a rank")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} is not below world_size = {world_size}")
        if seed < 0 or start_step < 0:
            raise ValueError(f"seed = {seed} and start_step = {start_step} must not be negative")
        if is_wide is not None and len(is_wide) != num_images:
            raise ValueError(f"is_wide has {len(is_wide)} entries for {num_images} images")
        total_batch = batch_size * world_size
        self.repeats = -(-total_batch // num_images) if num_images < total_batch else 1
        self.steps_per_epoch = num_images * self.repeats // total_batch
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.is_wide = None if is_wide is None else np.asarray(is_wide, dtype=bool)
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step

    def epoch(self, number: int) -> np.ndarray:
        """The whole epoch of all ranks: (steps_per_epoch, world_size, batch_size) image indices."""
        shape = (self.steps_per_epoch, self.world_size, self.batch_size)
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(self.num_images * self.repeats) % self.num_images
        # Cut before grouping: cutting leftovers of the groups would starve a group of few images.
        order = order[: np.prod(shape)]
        if self.is_wide is not None:
            order = self._grouped(order)
        return order.reshape(shape)

    def _grouped(self, order: np.ndarray) -> np.ndarray:
        """Gather landscape and portrait images into batches, in the order in which those fill."""
        wide = self.is_wide[order]
        groups = np.flatnonzero(wide), np.flatnonzero(~wide)
        whole = [group[: len(group) - len(group) % self.batch_size] for group in groups]
        rest = [group[len(group) - len(group) % self.batch_size :] for group in groups]
        # The rests together are one batch or none: len(order) is a multiple of the batch size.
        places = np.concatenate([*whole, np.sort(np.concatenate(rest))])
        batches = places.reshape(-1, self.batch_size)
        return order[batches[np.argsort(batches[:, -1])]].reshape(-1)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        epoch_number, indices = -1, None
        while True:
            if step // self.steps_per_epoch != epoch_number:
                epoch_number = step // self.steps_per_epoch
                indices = self.epoch(epoch_number)
            batch = indices[step % self.steps_per_epoch, self.rank].tolist()
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(enumerate(batch, start=first))
            step += 1
