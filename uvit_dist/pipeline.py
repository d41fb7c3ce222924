"""A trained U-ViT as an object that gives images, in a program or a notebook.

    from uvit_dist import UViTPipeline

    pipe = UViTPipeline.from_pretrained("runs/digits_demo")
    images = pipe(labels=[3, 8], count=4, seed=0)
    images[0]

The images are those of ``python -m uvit_dist.sample`` with the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn
from tqdm import tqdm

from uvit_dist.config import Config, SampleConfig
from uvit_dist.config_yaml import changed, described, parse_config
from uvit_dist.data.latents import check_same_text_encoder
from uvit_dist.errors import ConfigError
from uvit_dist.evaluation.networks import load_network
from uvit_dist.models.autoencoder import Autoencoder
from uvit_dist.models.text import TextEncoder
from uvit_dist.pretrained import load_decoder, load_text
from uvit_dist.sampler import Condition, Sampler
from uvit_dist.weights import Kind, check_trained_as, load_weights


class UViTPipeline:
    """Network, decoder and text encoder of a system, and how it samples.

    config: its configuration; origin: where the weights come from. Its parts may be used by themselves: ``net``,
    ``decoder`` (none in pixel space), ``text_encoder`` (none but for text systems).
    """

    def __init__(
        self,
        config: Config,
        net: nn.Module,
        decoder: Autoencoder | None,
        text_encoder: TextEncoder | None,
        origin: str = "weights that were given",
    ) -> None:
        self.config, self.net, self.decoder, self.text_encoder = config, net, decoder, text_encoder
        self.origin = origin
        self._empty: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *overrides: str, weights: Kind = "ema", device: str | torch.device | None = None
    ) -> UViTPipeline:
        """A run directory, a checkpoint of one, a file or folder of ``uvit_dist.export``, or one of ``convert``.

        overrides: ``section.key=value`` of its configuration, such as ``sample.cfg_scale=0.7`` or the path of its
        decoder; device: a GPU where there is one. Raises ``UserError`` of the right kind.
        """
        found = load_weights(path, weights)
        config = parse_config(changed(deepcopy(found.config), overrides), str(path))
        check_trained_as(found, config)
        text = None
        if config.model.clip_dim is not None and config.text is not None:
            text = load_text(config.text)
            check_same_text_encoder({"text.encoder": text.fingerprint, "training": found.text_encoder})
        origin = f"{found.kind} weights of step {found.step} of {found.origin}"
        pipeline = cls(config, load_network(config, found), load_decoder(config), text, origin)
        return pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def to(self, device: str | torch.device) -> UViTPipeline:
        """The same on another device."""
        self.net.to(device)
        if self.decoder is not None:
            self.decoder.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((weight.device for weight in self.net.parameters()), torch.device("cpu"))

    def __call__(
        self,
        labels: Sequence[int] | int | None = None,
        prompts: Sequence[str] | str = (),
        count: int = 1,
        seed: int = 0,
        batch_size: int = 8,
        **sample: Any,
    ) -> list[Image.Image]:
        """``count`` images for each label or prompt, row by row. sample: ``steps``, ``cfg_scale``, ``solver``, … as in
        the configuration's section.

        Raises ``ConfigError`` where the system is not asked with these.
        """
        images = self.tensors(labels, prompts, count, seed, batch_size, **sample)
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    def tensors(
        self,
        labels: Sequence[int] | int | None = None,
        prompts: Sequence[str] | str = (),
        count: int = 1,
        seed: int = 0,
        batch_size: int = 8,
        **sample: Any,
    ) -> Tensor:
        """As calling the pipeline: (rows * count, 3, H, W) uint8, on the host.

        In batches of a fixed size, the last one padded: the noise of an image is a function of (seed, its number), its
        last bits also of the size. Raises ``ConfigError``.
        """
        if count < 1 or batch_size < 1:
            raise ConfigError(f"count {count}, batch_size {batch_size}: must be at least 1; give more")
        rows = self._conditions(labels, prompts)
        sampler = Sampler(self._changed(sample), self.net, self.decoder, self._empty)
        names = list(rows)
        total = count * (len(rows[names[0]]) if names else 1)
        images = []
        for first in tqdm(range(0, total, batch_size), unit="batch", disable=None):
            ids = torch.arange(first, first + batch_size)
            row = ids.clamp(max=total - 1) // count
            condition = {name: rows[name][row].to(self.device) for name in names}
            images.append(sampler.generate(ids.to(self.device), condition, seed).cpu())
        return torch.cat(images)[:total]

    def _changed(self, sample: dict[str, Any]) -> Config:
        try:
            section = SampleConfig.model_validate(self.config.sample.model_dump() | sample)
        except ValidationError as error:
            told = "; ".join(line for item in error.errors() for line in described(item, SampleConfig))
            raise ConfigError(f"sample: {told}") from None
        if section.solver.startswith("euler") and self.config.diffusion.schedule != "vpsde":
            raise ConfigError(
                f"sample.solver {section.solver} needs diffusion.schedule vpsde; this network was trained with "
                f"{self.config.diffusion.schedule}: use dpm_solver_pp or dpm_solver"
            )
        return self.config.model_copy(update={"sample": section})

    def _conditions(self, labels: Sequence[int] | int | None, prompts: Sequence[str] | str) -> Condition:
        """The conditions of the rows, one each."""
        model = self.config.model
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(labels, int):
            labels = [labels]
        if model.clip_dim is not None:
            return {"context": self._contexts(labels, prompts)}
        if prompts:
            what = "; give labels" if model.num_classes > 0 else "; give the count alone"
            raise ConfigError(f"prompts: this system knows no texts{what}")
        if model.num_classes <= 0:
            if labels is not None:
                raise ConfigError(f"labels {list(labels)}: this system is unconditional; give the count alone")
            return {}
        last = model.num_classes - 1 - (self.config.diffusion.null_label is not None)
        if labels is None or not len(labels):
            raise ConfigError(f"labels: missing; say which classes, from 0 to {last}: 0,{last}")
        if not all(0 <= label <= last for label in labels):
            raise ConfigError(f"labels {list(labels)}: must be numbers from 0 to {last}; give others")
        return {"y": torch.tensor(list(labels))}

    def _contexts(self, labels: Sequence[int] | int | None, prompts: Sequence[str] | str) -> Tensor:
        """(rows, L, D); that of the empty prompt is kept for guidance."""
        model, section = self.config.model, self.config.text
        if not prompts or labels is not None or self.text_encoder is None or section is None:
            raise ConfigError('prompts: this system is asked with texts; give some, such as "A green train."')
        contexts = self.text_encoder.encode([*prompts, ""])
        if contexts.shape[1:] != (model.num_clip_token, model.clip_dim):
            raise ConfigError(
                f"text.encoder {section.encoder}: its contexts are {tuple(contexts.shape[1:])}, the network's "
                f"{model.num_clip_token, model.clip_dim} (model.num_clip_token, model.clip_dim); give the right one"
            )
        self._empty = contexts[-1]
        return contexts[:-1]
