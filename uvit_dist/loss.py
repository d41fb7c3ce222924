"""A batch becomes a loss: data, noise, time and condition of every sample are functions of its identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn

from uvit_dist.config import Config
from uvit_dist.data.batch import Batch
from uvit_dist.data.latents import pixels_to_x0, sample_latents
from uvit_dist.diffusion.keyed_random import keyed_bits, keyed_normal, keyed_uniform
from uvit_dist.diffusion.objective import add_noise, drop_labels, noise_loss
from uvit_dist.diffusion.schedule import SCHEDULES

HELD_OUT = "held_out_"
"""Before the purposes of random numbers for validation, which has its own."""


@dataclass(frozen=True)
class Example:
    """What the network is asked. x0, noise: (B, C, H, W) float32; time: (B,) as the schedule draws it.

    labels: (B,) int64 or none; contexts: (B, L, D) float32 or none.
    """

    x0: Tensor
    noise: Tensor
    time: Tensor
    labels: Tensor | None
    contexts: Tensor | None


class Objective:
    """L_simple of the configuration's system: pixels or latents, discrete or continuous time, any condition.

    empty_context: (L, D) of the empty prompt, for text systems.
    """

    def __init__(self, config: Config, empty_context: Tensor | None = None) -> None:
        self.config, self._empty_context = config, empty_context
        self.schedule = SCHEDULES[config.diffusion.schedule]()

    def example(self, batch: Batch, held_out: bool = False) -> Example:
        """What the network is asked of a batch on its device, of (batch,) samples.

        held_out: nothing is mirrored or dropped, and the draws are other ones, which never change.
        """
        seed, prefix = self.config.seed, HELD_OUT if held_out else ""
        who = (0 if held_out else batch.epoch, batch.ids)
        x0 = self._data(batch, seed, prefix, who)
        noise = keyed_normal(seed, f"{prefix}noise", *who, tuple(x0.shape[1:]))
        time = self.schedule.training_time(keyed_bits(seed, f"{prefix}timestep", *who, 1)[:, 0])
        model, diffusion = self.config.model, self.config.diffusion
        labels = batch.labels if model.num_classes > 0 else None
        contexts = batch.contexts.float() if batch.contexts is not None and model.clip_dim is not None else None
        if diffusion.label_dropout and not held_out:
            uniforms = keyed_uniform(seed, "label_dropout", *who)[:, 0]
            if labels is not None and diffusion.null_label is not None:
                labels = drop_labels(labels, uniforms, diffusion.label_dropout, diffusion.null_label)
            if contexts is not None and self._empty_context is not None:
                self._empty_context = self._empty_context.to(contexts)  # copied once: a copy would wait for the device
                contexts = drop_labels(contexts, uniforms, diffusion.label_dropout, self._empty_context)
        return Example(x0, noise, time, labels, contexts)

    def _data(self, batch: Batch, seed: int, prefix: str, who: tuple[int, Tensor]) -> Tensor:
        if self.config.autoencoder is None:
            mirrored = torch.zeros_like(batch.ids, dtype=torch.bool)
            if self.config.data.mirror and not prefix:
                mirrored = keyed_uniform(seed, "mirror", *who)[:, 0] < 0.5
            return pixels_to_x0(batch.data, mirrored)
        shape = (batch.data.shape[1] // 2, *batch.data.shape[2:])
        draw = keyed_normal(seed, f"{prefix}latent", *who, shape)
        return sample_latents(batch.data, draw, self.config.autoencoder.scale_factor)

    def losses(self, net: Callable[..., Tensor] | nn.Module, example: Example) -> Tensor:
        """The loss of each sample, DDPM eq. 14. Returns (B,) float32."""
        xt = add_noise(example.x0, example.noise, *self.schedule.alpha_sigma(example.time))
        timesteps = self.schedule.training_timesteps(example.time)
        noise_pred = net(xt, timesteps, y=example.labels, context=example.contexts)
        return noise_loss(noise_pred, example.noise)


class LossByTime:
    """Sums of losses in equal parts of the time axis; on the device, so that no step waits for it."""

    def __init__(self, bins: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, max(bins, 1), dtype=torch.float64, device=device)
        self.bins = bins

    def add(self, losses: Tensor, elapsed: Tensor) -> None:
        """Add the losses (B,) of samples at these places (B,) in [0, 1) of the time axis."""
        bins = self._sums.shape[1]
        place = (elapsed.double() * bins).long().clamp(0, bins - 1)
        within = place[:, None] == torch.arange(bins, device=place.device)  # a scatter would add in any order on GPUs
        sums = torch.where(within, losses.detach().double()[:, None], 0.0).sum(0)
        self._sums += torch.stack([sums, within.sum(0).double()])

    def take(self, over_ranks: Callable[[Tensor], Tensor]) -> list[float | None]:
        """The mean of each part since the last call, none for a part without samples; a scalar each.

        over_ranks: sums a tensor over all ranks.
        """
        sums, counts = over_ranks(self._sums).tolist()
        self._sums.zero_()
        return [total / n if n else None for total, n in zip(sums, counts, strict=True)]


class Trace:
    """What each rank feeds the network, sample by sample: (id, time, condition, hash of data, hash of noise)."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, int | str, str, str]] = []

    def add(self, ids: Tensor, example: Example) -> None:
        """Note a micro-batch, of ids (B,). The condition is the label, or the hash of the context, or -1."""
        condition: list[int] | list[str] = [-1] * len(ids)
        if example.labels is not None:
            condition = example.labels.tolist()
        elif example.contexts is not None:
            condition = _hashes(example.contexts)
        columns = (ids.tolist(), example.time.tolist(), condition, _hashes(example.x0), _hashes(example.noise))
        self.rows += zip(*columns, strict=True)


def _hashes(values: Tensor) -> list[str]:
    return [xxhash.xxh3_64_hexdigest(value.contiguous().cpu().numpy().tobytes()) for value in values]
