"""The training loader: same samples whatever the workers, the start and the caller."""

import itertools
import random

import numpy as np
import pytest
import torch

from asag.data import SampleError, build_train_loader


def draw_numbers(dataset_dict: dict) -> dict:
    """A mapper that uses every generator an augmentation may use."""
    numbers = (random.random(), np.random.rand(), torch.rand(()).item())
    return {"image_id": dataset_dict["image_id"], "numbers": numbers}


def fail_on_three(dataset_dict: dict) -> dict:
    if dataset_dict["image_id"] == 3:
        raise OSError("broken pixels")
    return dataset_dict


def dicts(count: int = 11) -> list[dict]:
    return [
        {"image_id": i, "file_name": f"/images/{i}.jpg", "width": 4 + i % 2, "height": 4}
        for i in range(count)
    ]


def read(steps: int, mapper=draw_numbers, **values) -> list[list[tuple]]:
    values = {"total_batch_size": 4, "num_workers": 0, "seed": 7} | values
    loader = build_train_loader(dicts(), mapper, **values)
    return [[tuple(s.values()) for s in batch] for batch in itertools.islice(loader, steps)]


def test_workers_do_not_change_samples():
    assert read(7) == read(7, num_workers=1) == read(7, num_workers=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_continues_exactly(num_workers):
    assert read(9)[5:] == read(4, start_iter=5, num_workers=num_workers)


def test_ranks_together_read_what_one_process_reads():
    one = read(6, aspect_ratio_grouping=False)
    two = [read(6, aspect_ratio_grouping=False, world_size=2, rank=rank) for rank in range(2)]
    assert [two[0][step] + two[1][step] for step in range(6)] == one


def test_samples_of_an_image_differ_between_epochs():
    samples = [sample for batch in read(20) for sample in batch]
    numbers = [sample[1] for sample in samples if sample[0] == 0]
    assert len(numbers) > 3
    assert len(set(numbers)) == len(numbers)


def test_seed_decides():
    assert read(3) == read(3)
    assert read(3) != read(3, seed=8)


def test_callers_generators_are_untouched():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    read(3)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_fewer_images_than_a_batch():
    assert [len(batch) for batch in read(3, total_batch_size=32)] == [32, 32, 32]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_name_the_file(num_workers):
    with pytest.raises(SampleError, match=r"/images/3\.jpg .*OSError: broken pixels"):
        read(6, mapper=fail_on_three, num_workers=num_workers)


def test_a_mapper_that_gives_nothing_is_named():
    with pytest.raises(SampleError, match="gave nothing"):
        read(1, mapper=lambda d: None)


def test_batch_must_be_shared_evenly():
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH = 4.* 3 process"):
        read(1, world_size=3, rank=0)


def test_grouping_needs_sizes():
    values = {"total_batch_size": 1, "num_workers": 0, "seed": 0}
    with pytest.raises(ValueError, match=r"'width'.*ASPECT_RATIO_GROUPING"):
        build_train_loader([{"file_name": "a.jpg"}], draw_numbers, **values)


def test_negative_seed_is_refused_and_none_draws_one():
    with pytest.raises(ValueError, match="seed"):
        read(1, seed=-1)
    assert len(read(2, seed=None)) == 2
