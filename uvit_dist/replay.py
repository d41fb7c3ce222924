"""A step's passes done again, and checksums by which the two can be compared; and those of weights that ranks share.

DeepSpeed reduces gradients in hooks that follow their accumulation. A hook on the parameter itself comes before: it
sees what this rank's backward pass made of one micro-batch, before anything is summed. A replay asks autograd for
gradients and accumulates none, so that DeepSpeed's hooks do not run and its state stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uvit_dist import faults
from uvit_dist.checksums import checksum, flip_bit

MANTISSA_BIT, EXPONENT_BIT = 0, 30
"""Of fp32: what a fault on demand flips, silently, and so that nobody can miss it."""


class Replay:
    """The passes of a DeepSpeed engine's steps. parameters: of its network; micro_batches: of a step."""

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter], stage: int, micro_batches: int) -> None:
        self._engine, self._stage, self._micro_batches = engine, stage, micro_batches
        self._parameters = list(parameters)
        self._sums: Tensor | None = None
        self._again = False

    # -- gradients ----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """From now on have checksums of all gradients, and of what ``note`` is given, in each pass."""
        device = self._parameters[0].device
        self._sums = torch.zeros(len(self._parameters) + 1, dtype=torch.int64, device=device)
        for number, parameter in enumerate(self._parameters):
            parameter.register_hook(partial(self._see, number))

    def note(self, loss: Tensor) -> Tensor:
        """Add a loss, a scalar, to the checksums. Returns it."""
        if self._sums is not None:
            self._sums[-1] += checksum(loss)
        return loss

    def _see(self, number: int, gradient: Tensor) -> Tensor | None:
        """What autograd calls with the gradient of a parameter, in its shape; gradients of a replay are dropped."""
        changed = None
        if number == 0 and not self._again:
            for name, bit in (("gradient:silent", MANTISSA_BIT), ("gradient:loud", EXPONENT_BIT)):
                if faults.point(name):
                    gradient = changed = flip_bit(gradient.clone(), bit)
        assert self._sums is not None
        self._sums[number] += checksum(gradient)
        return gradient.new_zeros(()).expand_as(gradient) if self._again else changed

    def take(self) -> Tensor:
        """The checksums since the last call, (parameters + 1,) int64: of all gradients and of the losses."""
        assert self._sums is not None, "nobody watches"
        taken = self._sums.clone()
        self._sums.zero_()
        return taken

    def run(self, passes: Callable[[nn.Module], Iterator[Tensor]]) -> None:
        """Forward and backward passes whose gradients go nowhere but to the checksums.

        passes(network): gives the loss of each micro-batch, a scalar. At ZeRO stage 3 a collective call.
        """
        self._again = True
        try:
            for loss in passes(self._engine.module):
                scaled = self.note(loss) / self._micro_batches  # as DeepSpeed does it, bit for bit
                torch.autograd.grad(scaled, self._parameters, allow_unused=True)
                if self._stage == 3:
                    self._engine.optimizer.parameter_offload.release_backward_leftovers()
        finally:
            self._again = False

    # -- weights ------------------------------------------------------------------------------------------------------

    def weights(self) -> list[list[Tensor]]:
        """Of each part of the weights, its pieces, flat or in their shape, as this rank computes with them.

        At ZeRO stage 0 all are one part; at 1 and 2 each rank owns one, in order of rank; at 3 ranks share none.
        """
        if self._stage == 0:
            return [[parameter.detach() for parameter in self._parameters]]
        if self._stage == 3:
            return []
        groups = self._engine.optimizer.parallel_partitioned_bit16_groups
        return [list(pieces) for pieces in zip(*groups, strict=True)]

    def weight_sums(self) -> tuple[list[int], int | None]:
        """Checksums of each part, and of this rank's own part as its masters have it, where there are masters."""
        copies = [torch.stack([checksum(piece) for piece in part]).sum() for part in self.weights()]
        if self._stage in (1, 2):
            optimizer = self._engine.optimizer
            kinds = [pieces[0].dtype for pieces in optimizer.parallel_partitioned_bit16_groups]
            masters = zip(optimizer.single_partition_of_fp32_groups, kinds, strict=True)
            copies.append(torch.stack([checksum(master.detach().to(kind)) for master, kind in masters]).sum())
        told = torch.stack(copies).tolist() if copies else []
        return (told[:-1], told[-1]) if self._stage in (1, 2) else (told, None)


def at_fault(copies: Sequence[Sequence[int]], masters: Sequence[int | None]) -> tuple[list[int], bool]:
    """The ranks whose weights are not what they must be, and whether the masters of all ranks are in order.

    copies: of each rank, the checksum of each part; masters: of each rank, that of the part that it owns. Masters tell
    which copy is wrong, of two as well; one from which all copies differ is wrong itself. Without masters the majority
    is right, and without a majority all are suspects.
    """
    wrong, sound = set[int](), True
    for part in range(len(copies[0])):
        held = [mine[part] for mine in copies]
        if masters[0] is None:
            common = max(set(held), key=held.count)
            majority = 2 * held.count(common) > len(held)
            wrong |= {rank for rank, value in enumerate(held) if value != common or not majority}
            continue
        differing = [rank for rank, value in enumerate(held) if value != masters[part]]
        if len(held) > 1 and len(differing) == len(held):
            wrong, sound = wrong | {part}, False
        else:
            wrong |= set(differing)
    return sorted(wrong), sound
