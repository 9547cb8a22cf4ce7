"""Order of training samples: a permutation an epoch, the same for every way of reading it."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.data.sampler import SeekableBatchSampler


@st.composite
def samplers(draw) -> dict:
    num_images = draw(st.integers(1, 60))
    wide = draw(st.none() | st.lists(st.booleans(), min_size=num_images, max_size=num_images))
    return {
        "num_images": num_images,
        "batch_size": draw(st.integers(1, 7)),
        "world_size": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 2**40)),
        "is_wide": wide,
    }


def take(sampler: SeekableBatchSampler, steps: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(sampler, steps))


@settings(deadline=None, max_examples=80)
@given(samplers(), st.integers(0, 5))
def test_epoch_is_a_permutation_minus_less_than_one_step(values, number):
    sampler = SeekableBatchSampler(**values)
    counts = Counter(sampler.epoch(number).ravel().tolist())
    total_batch = values["batch_size"] * values["world_size"]
    dropped = values["num_images"] * sampler.repeats - sum(counts.values())
    assert 0 <= dropped < total_batch
    assert max(counts.values()) <= sampler.repeats
    assert sampler.repeats == 1 or values["num_images"] < total_batch


@settings(deadline=None, max_examples=80)
@given(samplers(), st.integers(0, 40))
def test_seeking_equals_replaying(values, start):
    replayed = take(SeekableBatchSampler(**values), start + 5)[start:]
    assert take(SeekableBatchSampler(**values, start_step=start), 5) == replayed


@settings(deadline=None, max_examples=80)
@given(samplers(), st.integers(0, 10))
def test_ranks_share_out_every_step(values, start):
    world, batch = values["world_size"], values["batch_size"]
    ranks = [
        take(SeekableBatchSampler(**values, rank=r, start_step=start), 4) for r in range(world)
    ]
    places = [place for step in range(4) for rank in ranks for place in rank[step]]
    first = start * world * batch
    assert [position for position, _ in places] == list(range(first, first + 4 * world * batch))
    # The same global sequence as one process reading the epochs.
    sampler = SeekableBatchSampler(**values)
    epochs = np.concatenate(
        [sampler.epoch(e).reshape(-1) for e in range((start + 4) // sampler.steps_per_epoch + 1)]
    )
    assert [index for _, index in places] == epochs[first : first + len(places)].tolist()


@settings(deadline=None, max_examples=80)
@given(samplers())
def test_grouping_mixes_at_most_one_batch(values):
    sampler = SeekableBatchSampler(**values)
    if sampler.is_wide is None:
        return
    wide = sampler.is_wide[sampler.epoch(0)].reshape(-1, values["batch_size"])
    assert np.count_nonzero(wide.any(axis=1) & ~wide.all(axis=1)) <= 1


def test_orientations_are_spread_over_the_epoch():
    is_wide = np.arange(400) % 2 == 0
    sampler = SeekableBatchSampler(num_images=400, batch_size=4, seed=0, is_wide=is_wide)
    first_half = is_wide[sampler.epoch(0)[:50, 0, 0]]
    assert 15 < np.count_nonzero(first_half) < 35


def test_grouping_takes_the_same_images_as_not_grouping():
    values = {"num_images": 37, "batch_size": 4, "seed": 3}
    grouped = SeekableBatchSampler(**values, is_wide=np.arange(37) % 5 > 0)
    assert sorted(grouped.epoch(2).ravel()) == sorted(
        SeekableBatchSampler(**values).epoch(2).ravel()
    )


def test_a_rare_orientation_is_not_starved():
    sampler = SeekableBatchSampler(
        num_images=100, batch_size=8, seed=0, is_wide=[False] + [True] * 99
    )
    seen = sum(0 in sampler.epoch(e) for e in range(50))
    assert seen > 40  # 96 of 100 images an epoch


def test_epochs_and_seeds_differ():
    sampler = SeekableBatchSampler(num_images=50, batch_size=2, seed=1)
    other = SeekableBatchSampler(num_images=50, batch_size=2, seed=2)
    assert (sampler.epoch(0) != sampler.epoch(1)).any()
    assert (sampler.epoch(0) != other.epoch(0)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 0}, "no images"),
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 1}, "rank"),
        ({"seed": -1}, "seed"),
        ({"start_step": -1}, "start_step"),
        ({"is_wide": [True]}, "is_wide"),
    ],
)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SeekableBatchSampler(**({"num_images": 4, "batch_size": 2, "seed": 0} | change))
