"""ZeRO-1 and 2: a sum of gradients goes to the rank that needs it, in half the bytes of DeepSpeed's all-reduce.

DeepSpeed 0.19 all-reduces each bucket of gradients and lets every rank keep its part: 2 (N - 1)/N of the bucket's
bytes from each rank. Its other way, ``use_multi_rank_bucket_allreduce: false``, reduces to the owners, but waits for
the GPU at each bucket; over gloo it sends more still. Here each bucket's pieces are summed to their owners at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uvit_dist import dist
from uvit_dist.dist import Ranks

Piece = tuple[frozenset[int], Tensor, Tensor | None]
"""The rank that needs it; a part (n,) of a bucket, already divided by the number of ranks; where else it is added."""


def send_to_owners(optimizer: Any, ranks: Ranks) -> None:
    """Make DeepSpeed's optimizer of ZeRO-1 or 2 sum gradients so. All ranks are one data-parallel group."""

    def sum_bucket(bucket: Sequence[Piece], communication_data_type: torch.dtype, **_: Any) -> None:
        _sum_bucket(optimizer, ranks, bucket, communication_data_type)

    assert hasattr(optimizer, "allreduce_and_scatter"), "this DeepSpeed sums gradients by another function"
    optimizer.allreduce_and_scatter = sum_bucket  # what DeepSpeed calls on its stream of reductions


def _sum_bucket(optimizer: Any, ranks: Ranks, bucket: Sequence[Piece], dtype: torch.dtype) -> None:
    parts: list[list[Tensor]] = [[] for _ in range(ranks.world_size)]
    extra: list[Tensor | None] = []
    for owners, tensor, output in bucket:
        (owner,) = owners
        parts[owner].append(tensor)
        if tensor.is_cuda:  # of a gradient larger than a bucket, whose memory belongs to the backward pass's stream
            tensor.record_stream(torch.cuda.current_stream())
        if owner == ranks.rank:
            extra.append(output)
    flat = torch.cat([tensor for tensors in parts for tensor in tensors]).to(dtype)
    own = parts[ranks.rank]
    summed_flat = dist.sum_pieces(flat, [sum(tensor.numel() for tensor in tensors) for tensors in parts])
    sums = summed_flat.split([tensor.numel() for tensor in own])
    for tensor, output, summed in zip(own, extra, sums, strict=True):
        optimizer._add_to_grad_partition_buffer(output, summed)
        tensor.copy_(summed)
