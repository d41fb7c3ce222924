"""Encode images once: shards of autoencoder moments and their index, as the configuration's data section says.

    python -m data_tools.precompute_latents --config configs/digits_demo.yaml
    torchrun --nproc_per_node 8 -m data_tools.precompute_latents --config configs/uvit_h_imagenet512.yaml
    python -m uvit_dist.launch --config configs/uvit_h_imagenet512.yaml --job precompute

Any number of workers, started so or so on any machines that reach data.index, share the work; what a killed one leaves
others do. The same command goes on after an interruption. --dry-run says beforehand what it will take.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_tools.images import ImageSource, source_fingerprint
from data_tools.pipeline import Finish
from data_tools.shard_job import all_as_stored, command_line, make_from_images, open_images, require_tool, this_device
from data_tools.units import Unit
from data_tools.x0 import HostImages
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.config_data import PrecomputeConfig
from uvit_dist.data.latents import Provenance, Sample, TextProvenance, pixels_to_x0
from uvit_dist.data.shards import ShardIndex, ShardRecord
from uvit_dist.errors import ConfigError, DataError, MissingInputError

if TYPE_CHECKING:
    from uvit_dist.models.autoencoder import Autoencoder


log = logging.getLogger("data_tools.precompute_latents")  # its own name is __main__ as a command
SHEET = "contact_sheet.png"
"""Beside the index: some images, and what the decoder makes of their latents."""


class MomentsMaker:
    """Encodes images and, in units of two shards, their mirror images, in batches of one size.

    The last batch of a unit is padded: the bits of moments depend on the size of the batch.
    """

    def __init__(self, source: ImageSource, autoencoder: Autoencoder, config: Config, device: torch.device) -> None:
        self.batch_size = config.precompute.batch_size
        self._source, self._dtype, self._device = source, config.data.moments_dtype, device
        self._autoencoder, self._section = autoencoder, config.precompute
        self._encode, self._host = self._with_options(), HostImages()

    def _with_options(self) -> Callable[[Tensor], Tensor]:
        """What turns x0 (B, 3, H, W) into moments (B, 2C, h, w), with the options of the configuration."""
        section, plain = self._section, self._autoencoder.encode_moments
        if (section.precision, section.channels_last, section.compile) == ("fp32", False, False):
            return plain
        layout = torch.channels_last if section.channels_last else torch.contiguous_format
        optional = partial(plain, bf16=section.precision == "bf16")
        compiled = torch.compile(optional) if section.compile else optional

        def encode(x0: Tensor) -> Tensor:
            return compiled(x0.contiguous(memory_format=layout)).contiguous()

        return encode

    @torch.inference_mode()
    def difference(self, pixels: Tensor, scale_factor: float) -> dict[str, float]:
        """What the options change, against plain fp32: in the latents' means, as trained on, of these images.

        pixels: (n, H, W, 3) uint8. Returns root mean square and largest difference, and that of storage in float16.
        """
        (x0,) = self._x0(self._padded(pixels), [False])
        exact, found = (encode(x0).chunk(2, dim=1)[0] * scale_factor for encode in (
            self._autoencoder.encode_moments, self._encode))  # fmt: skip
        off, stored = found - exact, exact.half().float() - exact
        return {"rms": float(off.square().mean().sqrt()), "largest": float(off.abs().max()),
                "rms_of_float16": float(stored.square().mean().sqrt())}  # fmt: skip

    def _padded(self, pixels: Tensor) -> Tensor:
        missing = self.batch_size - len(pixels)
        return pixels if not missing else torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])

    def _x0(self, pixels: Tensor, mirrored: Sequence[bool]) -> Iterator[Tensor]:
        """Pixels (B, H, W, 3) uint8 as images (B, 3, H, W) in [-1, 1], contiguous, on the device; for each flag."""
        if self._device.type == "cpu":
            yield from self._host.x0(pixels, mirrored)
            return
        stacked = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
        for flag in mirrored:
            yield pixels_to_x0(stacked, torch.full((len(stacked),), flag, device=self._device))

    @torch.inference_mode()
    def start(self, unit: Unit, places: range, pixels: Tensor) -> Finish:
        """pixels: (n, H, W, 3) uint8. What it returns gives moments (2C, h, w) of data.moments_dtype.

        It raises ``DataError`` for moments that do not fit that type.
        """
        count = len(pixels)
        pixels = self._padded(pixels)
        if self._device.type == "cuda":
            pixels = pixels.pin_memory()
        on_device = [self._encode(x0) for x0 in self._x0(pixels, [shard.mirrored for shard in unit.shards])]
        moments = [_on_its_way(part) for part in on_device]
        arrived = torch.cuda.Event() if self._device.type == "cuda" else None
        if arrived is not None:
            arrived.record()

        def finish() -> list[list[Sample]]:
            if arrived is not None:
                arrived.synchronize()
            labels = [self._source.labels[unit.images[place]] for place in places]
            out = []
            for shard, made in zip(unit.shards, moments, strict=True):
                keys = shard.keys(self._source.keys, unit.images[places.start : places.stop])
                stored = all_as_stored(made[:count].numpy(), self._dtype, keys, "moments", "data.moments_dtype")
                out.append([Sample(*fields) for fields in zip(keys, labels, stored, strict=True)])
            return out

        return finish


def _on_its_way(tensor: Tensor) -> Tensor:
    """The tensor on the host, of the same shape; from a GPU, its bytes are there when the stream has come so far."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def open_encoder(config: Config, device: torch.device) -> Autoencoder:
    """The encoding autoencoder. Raises ``MissingInputError``, ``DataError``, ``ConfigError`` where it does not fit."""
    from uvit_dist.pretrained import load_encoder  # seconds, which decoding processes are spared

    assert config.autoencoder is not None
    section = config.autoencoder
    autoencoder = load_encoder(section).to(device)
    found = autoencoder.encoder_fingerprint
    if section.encoder_fingerprint not in (None, found):
        raise ConfigError(
            f"autoencoder.encoder {section.encoder}: its hash is {found}, autoencoder.encoder_fingerprint says "
            f"{section.encoder_fingerprint}; correct one of them"
        )
    if config.data.image_size % autoencoder.factor:
        raise ConfigError(
            f"data.image_size {config.data.image_size} must be divisible by the autoencoder's factor "
            f"{autoencoder.factor}; set it to a multiple"
        )
    return autoencoder


def moments_provenance(
    config: Config, source: ImageSource, autoencoder: Autoencoder, text: TextProvenance | None = None
) -> Provenance:
    """What the index says of moments that this encoder makes of these images."""
    assert config.autoencoder is not None
    data, side = config.data, config.data.image_size // autoencoder.factor
    return Provenance(
        kind="moments",
        dtype=data.moments_dtype,
        shape=(2 * autoencoder.latent_channels, side, side),
        source=f"{source.name} {source_fingerprint(source)}",
        image_size=data.image_size,
        crop=data.crop,
        split=data.split,
        mirror=data.mirror,
        classes=source.classes,
        samples=len(source.keys) * (1 + data.mirror),
        autoencoder=Path(config.autoencoder.encoder).name,
        encoder_fingerprint=autoencoder.encoder_fingerprint,
        scale_factor=config.autoencoder.scale_factor,
        text=text,
    )


def encoder_settings(section: PrecomputeConfig) -> dict[str, object]:
    """What the bits of moments depend on, beside the images and the weights."""
    return section.model_dump(include={"batch_size", "precision", "channels_last", "compile", "exif_rotation"})


def tell_difference(maker: MomentsMaker, source: ImageSource, config: Config) -> None:
    """Log what the options of the encoder change, measured on the first images, where there are any options."""
    assert config.autoencoder is not None
    options = encoder_settings(config.precompute) | {"batch_size": 0, "exif_rotation": False}
    if options == encoder_settings(PrecomputeConfig()) | {"batch_size": 0} or os.environ.get("RANK", "0") != "0":
        return
    pixels = []
    for number in range(len(source.keys)):
        with contextlib.suppress(DataError):
            pixels.append(torch.from_numpy(np.ascontiguousarray(source.load(number))))
        if len(pixels) == maker.batch_size:
            break
    if pixels:
        found = maker.difference(torch.stack(pixels), config.autoencoder.scale_factor)
        log.info(
            "precompute.precision %s, channels_last %s, compile %s: means of the latents of %d images differ from "
            "plain fp32 by %.2e rms, %.2e at most (storage in float16: %.2e rms)",
            *(options[name] for name in ("precision", "channels_last", "compile")), len(pixels),
            found["rms"], found["largest"], found["rms_of_float16"],
        )  # fmt: skip


def contact_sheet_of(
    config: Config, source: ImageSource, device: torch.device, index: ShardIndex
) -> list[tuple[str, str, Callable[[], None]]]:
    """What one worker does after all: the picture that shows whether the right autoencoder was used."""
    path, count = storage.join(storage.parent(index.path), SHEET), config.precompute.contact_sheet

    def make() -> None:
        from data_tools.contact_sheet import make_contact_sheet  # networks, which only this needs
        from uvit_dist.pretrained import load_decoder

        try:
            decoder = load_decoder(config)
        except MissingInputError as error:
            log.warning("no %s: %s", path, error)
            return
        assert decoder is not None
        found = make_contact_sheet(config, index, source, decoder, device, count)
        log.info("%s: %d images and what their latents decode to, %.1f dB in the mean, %.1f at least: look whether "
                 "they are alike", path, len(found), sum(found) / len(found), min(found))  # fmt: skip

    return [("contact_sheet", path, make)] if count else []


def precompute(config: Config, device: torch.device) -> list[ShardRecord]:
    """Do a share of the work until all is done, then see to the index. Raises ``UserError`` of the right kind."""
    require_tool(config, "precompute_latents")
    source = open_images(config)
    autoencoder = open_encoder(config, device)
    provenance = moments_provenance(config, source, autoencoder)
    maker = MomentsMaker(source, autoencoder, config, device)
    tell_difference(maker, source, config)
    sheet = partial(contact_sheet_of, config, source, device)
    return make_from_images(config, source, provenance, encoder_settings(config.precompute), maker, sheet)


def make(config: Config) -> list[ShardRecord]:
    """``precompute`` on this worker's device."""
    return precompute(config, this_device())


def main() -> None:
    """The command line."""
    command_line("precompute_latents", __doc__, lambda config, args: make(config), from_images=True)


if __name__ == "__main__":
    main()
