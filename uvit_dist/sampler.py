"""Images from a trained network: noise, label and caption of each are functions of (seed, image id)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uvit_dist.config import Config
from uvit_dist.data.plan import Ids, held_out_ids
from uvit_dist.data.reader import SampleReader
from uvit_dist.data.shards import ShardIndex
from uvit_dist.diffusion.guidance import NoisePredictor, noise_predictor
from uvit_dist.diffusion.keyed_random import keyed_bits, keyed_integers, keyed_normal
from uvit_dist.diffusion.schedule import SCHEDULES, VPSDESchedule
from uvit_dist.diffusion.solvers import dpm_solver, dpm_solver_pp, euler_maruyama
from uvit_dist.models.autoencoder import Autoencoder
from uvit_dist.models.cpu import for_inference
from uvit_dist.models.features import to_uint8
from uvit_dist.models.frozen import true_fp32

Condition = Mapping[str, Tensor]
"""What the network is asked for: y (B,) int64 labels, or context (B, L, D) float32, or nothing."""


class Sampler:
    """Generates images as the configuration's sample section says. empty_context: (L, D), for text systems."""

    def __init__(
        self, config: Config, net: nn.Module, decoder: Autoencoder | None, empty_context: Tensor | None = None
    ) -> None:
        self.config, self._decoder, self._empty = config, decoder, empty_context
        self._net = for_inference(net)
        self._schedule = SCHEDULES[config.diffusion.schedule]()

    def _null(self, condition: Condition) -> Condition | None:
        label = self.config.diffusion.null_label
        if "y" in condition and label is not None:
            return {"y": torch.full_like(condition["y"][:1], label)}
        if "context" in condition and self._empty is not None:
            return {"context": self._empty.to(condition["context"])[None]}
        return None

    @torch.inference_mode()
    def generate(self, ids: Tensor, condition: Condition, seed: int) -> Tensor:
        """The images of the given ids, (B,) int64, on the network's device. Returns (B, 3, H, W) uint8.

        Their bits also depend on B, which is why B is a part of an evaluation's protocol.
        """
        with true_fp32():
            return self._generate(ids, condition, seed)

    def _generate(self, ids: Tensor, condition: Condition, seed: int) -> Tensor:
        model, sample = self.config.model, self.config.sample
        shape = (model.in_chans, model.img_size, model.img_size)
        x_T = keyed_normal(seed, "sample_noise", 0, ids, shape)
        null = self._null(condition)
        eps = noise_predictor(self._net, self._schedule.network_time, condition, null, sample.cfg_scale)
        half = sample.precision == "bf16_autocast"
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
            x0 = self._solve(eps, x_T, ids, seed)
        if self._decoder is None or self.config.autoencoder is None:
            return to_uint8(x0)
        with torch.autocast(ids.device.type, torch.float16, enabled=half):  # bf16 has fewer bits than a pixel
            images = self._decoder.decode(x0 / self.config.autoencoder.scale_factor)
        return to_uint8(images.float())

    def _solve(self, eps: NoisePredictor, x_T: Tensor, ids: Tensor, seed: int) -> Tensor:
        solver, steps = self.config.sample.solver, self.config.sample.steps
        if solver == "dpm_solver_pp":
            return dpm_solver_pp(eps, self._schedule, x_T, steps)
        if solver == "dpm_solver":
            return dpm_solver(eps, self._schedule, x_T, steps)
        assert isinstance(self._schedule, VPSDESchedule)

        def noise(step: int, shape: torch.Size) -> Tensor:
            return keyed_normal(seed, f"sampler_noise_{step}", 0, ids, tuple(shape[1:]))

        return euler_maruyama(eps, self._schedule, x_T, steps, noise, ode=solver == "euler_maruyama_ode")


class ImageConditions:
    """What an evaluation asks for, image by image: labels even or by frequency, or captions of held-out samples."""

    def __init__(self, config: Config, index: ShardIndex | None) -> None:
        """index: of the training set, where labels go by frequency; of the captions, for a text system."""
        self._seed, self._model = config.evaluate.seed, config.model
        self._classes = config.model.num_classes - (config.diffusion.null_label is not None)
        self._limits: Tensor | None = None
        self._reader: SampleReader | None = None
        if config.model.clip_dim is not None:
            assert index is not None
            self._reader = SampleReader(index, self._seed, "sample_caption")
            self._order = held_out_ids(index.provenance.samples, index.provenance.samples, self._seed)
        elif config.evaluate.labels == "frequency":
            assert index is not None
            counts = np.cumsum(index.provenance.class_counts)
            self._limits = torch.from_numpy((counts[:-1] << 32) // counts[-1])  # in 32-bit words

    def of(self, ids: Tensor) -> Condition:
        """The conditions of the images of these ids, (B,) int64, on their device."""
        if self._reader is not None:
            return {"context": self._contexts(ids.cpu().numpy()).to(ids.device)}
        if self._model.num_classes <= 0:
            return {}
        if self._limits is None:
            return {"y": keyed_integers(self._seed, "sample_label", 0, ids, 0, self._classes)}
        words = keyed_bits(self._seed, "sample_label", 0, ids, 1)[:, 0]
        return {"y": torch.searchsorted(self._limits.to(ids.device), words.contiguous(), right=True)}

    def texts(self, ids: Tensor) -> list[str] | None:
        """The captions that the images of these ids, (B,) int64, are asked for with; none where there are no texts."""
        if self._reader is None:
            return None
        rounds, places = np.divmod(ids.cpu().numpy(), len(self._order))
        pairs = zip(places.tolist(), rounds.tolist(), strict=True)
        return [self._reader.texts(self._order[[place]], epoch=turn)[0] for place, turn in pairs]

    def _contexts(self, ids: Ids) -> Tensor:
        """A caption of a held-out sample for each id; beyond their number they come again, with other captions."""
        assert self._reader is not None
        rounds, places = np.divmod(ids, len(self._order))
        out: Tensor | None = None
        for turn in np.unique(rounds).tolist():
            contexts = self._reader.read_ids(self._order[places[rounds == turn]], epoch=turn).contexts
            assert contexts is not None
            out = torch.empty(len(ids), *contexts.shape[1:]) if out is None else out
            out[torch.from_numpy(rounds == turn)] = contexts.float()
        assert out is not None
        return out


def labels_of(condition: Condition, count: int) -> Tensor:
    """The labels asked for, (count,) int64 on the host; -1 where the network knows none."""
    labels: Any = condition.get("y")
    return torch.full((count,), -1) if labels is None else labels.cpu()
