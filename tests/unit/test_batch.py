"""Memory of batches."""

import pytest
import torch

from uvit_dist.data.batch import RowsPool
from uvit_dist.data.latents import Provenance


@pytest.mark.parametrize("shape", [(8, 4, 4), (3, 5, 7), (8, 64, 64)], ids=str)
def test_memory_of_batches_begins_at_a_line_of_the_cache_and_is_taken_again_when_nothing_holds_it(shape):
    made = Provenance(kind="moments", dtype="float16", shape=shape, source="drawn", image_size=512, crop="none",
                      mirror=False, classes=10, samples=100)  # fmt: skip
    pool = RowsPool(made)
    held = [pool.take(4).tensors(pool)[0] for _ in range(3)]
    for data in held:
        assert (data.shape, data.dtype) == ((4, *shape), torch.float16)
        assert data.data_ptr() % 64 == 0
    places = [data.data_ptr() for data in held]
    assert len(set(places)) == 3
    data = held.pop()
    part = data[1:]
    del data
    assert int(pool.take(4).bases[0]) not in places, "a part of the batch is still held"
    del part
    assert int(pool.take(4).bases[0]) == places[2]
