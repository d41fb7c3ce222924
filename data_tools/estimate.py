"""What making the shards will take, before anything is made: bytes, requests and their price, FLOP and GPU time."""

from __future__ import annotations

import math
import tarfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from data_tools.images import ImageSource
from data_tools.sources import open_source
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.data.latents import encode_array
from uvit_dist.data.shards import CONTEXT_ROW, ROW
from uvit_dist.errors import MissingInputError
from uvit_dist.models.autoencoder import Autoencoder
from uvit_dist.pretrained import load_encoder

PUT_DOLLARS, GET_DOLLARS, GB_MONTH_DOLLARS = 0.005 / 1000, 0.0004 / 1000, 0.023
"""Of a PUT or LIST, a GET or HEAD, and 10^9 bytes for a month: S3 Standard, us-east-1, aws.amazon.com/s3/pricing."""
LISTED = 1000
"""Keys in the answer to one LIST."""
UPLOAD_PART = 50 << 20
"""Bytes of a part of s3fs's uploads; what is below two of them goes in one PUT."""
UNIT_REQUESTS = 6
"""PUTs and LISTs of a unit's lease and mark."""
RENEWALS = 4
"""Renewals of a lease within precompute.lease_s."""
LOOKED_AT = 2000
"""Images whose size stands for that of all."""
SIDECAR_BYTES, CAPTION_BYTES = 1400, 64
"""Of a shard's .json, and of a caption with its quotes: round figures."""
TFLOPS = {"fp32": 0.5 * 67.0, "bf16": 0.4 * 989.0}
"""Assumed rate of the encoder by precompute.precision: a share of the peak of an H100 or H200 without sparsity."""


@dataclass(frozen=True)
class Requests:
    """Requests to S3. gets: GET and HEAD; puts: PUT, LIST and all else that costs as much."""

    gets: int
    puts: int

    @property
    def dollars(self) -> float:
        """Their price."""
        return self.gets * GET_DOLLARS + self.puts * PUT_DOLLARS


@dataclass(frozen=True)
class Estimate:
    """What a job will make and take. tar_bytes: exact where keys have at most 94 letters and there are no captions;
    input_bytes, image_flop (of an encoder pass, without its mirror image), tflops, gpu_hours: none where unknown.
    """

    images: int
    captions: int | None
    samples: int
    shards: int
    tar_bytes: int
    table_bytes: int
    sidecar_bytes: int
    input_bytes: int | None
    input_requests: Requests
    output_requests: Requests
    image_flop: int | None
    passes: int
    tflops: float | None
    gpu_hours: float | None
    gpu_dollars: float
    assumed_rate: bool

    @property
    def output_bytes(self) -> int:
        """All that will lie beside the index, but for the index itself."""
        return self.tar_bytes + self.table_bytes + self.sidecar_bytes

    def describe(self) -> list[str]:
        """Lines to read."""
        texts = "" if self.captions is None else f" with {self.captions:,} captions"
        given = "" if self.input_bytes is None else f"input     {_size(self.input_bytes)}; "
        months = self.output_bytes / 1e9 * GB_MONTH_DOLLARS
        lines = [
            f"images    {self.images:,}{texts}, {self.samples:,} samples in {self.shards:,} shards",
            f"{given or 'input     '}{_requests(self.input_requests)}",
            f"output    {_size(self.output_bytes)} (tars {_size(self.tar_bytes)}); {_requests(self.output_requests)}",
        ]
        if self.output_requests.puts:
            lines.append(f"storage   ${months:,.2f} a month; prices of S3 Standard in us-east-1")
        if self.image_flop is not None and self.gpu_hours is not None:
            rate = "an assumption; give yours with --tflops" if self.assumed_rate else "as given"
            lines += [
                f"encoder   {self.image_flop / 1e9:,.1f} GFLOP a pass, {self.passes} for each image: "
                f"{self.image_flop * self.passes * self.images / 1e15:,.2f} PFLOP",
                f"GPU time  {self.gpu_hours:,.1f} h at {self.tflops:,.1f} TFLOP/s ({rate}): "
                f"${self.gpu_hours * self.gpu_dollars:,.2f} at ${self.gpu_dollars:,.2f} an hour",
            ]
        return lines


def dry_run(config: Config, tflops: float | None, gpu_dollars: float) -> str:
    """What --dry-run prints: the estimate for the images that are there now. Nothing is written.

    Raises as ``open_source`` does.
    """
    source = open_source(config.data, config.precompute.exif_rotation)
    captions = None if source.captions is None else sum(map(len, source.captions))
    autoencoder, notes = None, []
    if config.autoencoder is not None:
        try:
            autoencoder = load_encoder(config.autoencoder)
        except MissingInputError as error:
            notes.append(f"encoder   not at hand, so its time is not known: {error}")
    if source.unusable:
        notes.append(f"bad       {len(source.unusable):,} images, by the listing alone")
    found = estimate(config, len(source.keys), captions, _input_bytes(source), autoencoder, tflops, gpu_dollars)
    return "\n".join([*found.describe(), *notes])


def _input_bytes(source: ImageSource) -> int | None:
    """Bytes of all images, of local files by the mean of some; none for images that come with a package."""
    count = len(source.keys)
    some = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)).tolist()
    sizes = []
    for address in map(source.address, some):
        try:
            sizes.append(storage.size(address.path) if address.size is None else address.size)
        except MissingInputError:
            return None
    return round(sum(sizes) / len(sizes) * count) if sizes else None


def estimate(
    config: Config,
    images: int,
    captions: int | None,
    input_bytes: int | None,
    autoencoder: Autoencoder | None,
    tflops: float | None,
    gpu_dollars: float,
) -> Estimate:
    """What the shards of a configuration will take. captions: of all images; tflops: 10^12 a second, none: TFLOPS."""
    data = config.data
    latents = data.space == "latents"
    shape, dtype = _stored(config, autoencoder)
    passes = 1 + (latents and data.mirror)
    units = _shard_sizes(images, data.samples_per_shard)
    tars = sum(_tar_bytes(size, shape, dtype, config, images, captions) for size in units) * passes
    tables = passes * sum(_npy_bytes((size,), ROW) for size in units)
    names = 3 if captions is None else 4
    if captions is not None:
        tables += passes * sum(_npy_bytes((_share(captions, images, size),), CONTEXT_ROW) for size in units)
    flop = None if autoencoder is None else encoder_flop(autoencoder, data.image_size)
    rate = TFLOPS[config.precompute.precision] if tflops is None else tflops
    hours = None if flop is None else flop * passes * images / (rate * 1e12) / 3600
    remote_in = data.source is not None and storage.is_remote(data.source)
    incoming = Requests(images, -(-images // LISTED)) if remote_in else Requests(0, 0)
    outgoing = Requests(0, 0)
    if storage.is_remote(data.index):
        renewals = 0 if hours is None else int(hours * 3600 * RENEWALS / config.precompute.lease_s)
        per_shard = tars / max(1, len(units) * passes)
        uploads = len(units) * passes * (_puts(math.ceil(per_shard)) + names - 1)
        listings = -(-len(units) * passes * names // LISTED)
        outgoing = Requests(len(units) * passes * names, uploads + listings + UNIT_REQUESTS * len(units) + renewals + 1)
    return Estimate(
        images, captions, images * passes, len(units) * passes, tars, tables, SIDECAR_BYTES * len(units) * passes,
        input_bytes, incoming, outgoing, flop, passes, rate if flop is not None else None, hours, gpu_dollars,
        tflops is None,
    )  # fmt: skip


def encoder_flop(autoencoder: Autoencoder, image_size: int) -> int:
    """FLOP (two for a multiplication with its addition) of the moments of one image, counted without computing them."""
    hidden = torch.empty(1, 3, image_size, image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        for part in (autoencoder.vae.encoder, autoencoder.vae.quant_conv):
            if part is not None:
                hidden = _on_meta(part, hidden)
    return int(counter.get_total_flops())


def _on_meta(module: nn.Module, x: Tensor) -> Tensor:
    weights = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    out: Tensor = functional_call(module, weights, (x,))
    return out


def _stored(config: Config, autoencoder: Autoencoder | None) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a sample's data."""
    data, model = config.data, config.model
    if data.space == "pixels":
        return (3, data.image_size, data.image_size), np.dtype(np.uint8)
    if autoencoder is None:
        return (2 * model.in_chans, model.img_size, model.img_size), np.dtype(data.moments_dtype)
    side = data.image_size // autoencoder.factor
    return (2 * autoencoder.latent_channels, side, side), np.dtype(data.moments_dtype)


def _shard_sizes(images: int, per_shard: int) -> list[int]:
    whole, rest = divmod(images, per_shard)
    return [per_shard] * whole + [rest] * (rest > 0)


def _share(captions: int, images: int, size: int) -> int:
    return round(captions * size / images)


def _tar_bytes(
    samples: int, shape: tuple[int, ...], dtype: np.dtype[Any], config: Config, images: int, captions: int | None
) -> int:
    """A tar as ``write_shard`` lays it out: of each sample .cls and .npy, with captions .json and .contexts.npy."""
    each = _member(1) + _member(_npy_bytes(shape, dtype))
    total = samples * each
    if captions is not None:
        length, width = config.model.num_clip_token, config.model.clip_dim or 0
        fewer, more = divmod(_share(captions, images, samples), samples)
        for count, of in ((fewer, samples - more), (fewer + 1, more)):
            contexts = _npy_bytes((count, length, width), np.dtype(config.data.contexts_dtype))
            total += of * (_member(contexts) + _member(20 + count * CAPTION_BYTES))
    return -(-(total + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _member(size: int) -> int:
    """Bytes that a member of a tar takes."""
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def _npy_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of a .npy file. The header's length depends on the shape's digits, seldom: it is filled up to 64."""
    header = encode_array(np.broadcast_to(np.zeros((), dtype), shape[:1] + (0,) * (len(shape) - 1)))[1]
    return header + math.prod(shape) * dtype.itemsize


def _puts(size: int) -> int:
    """Requests of an upload by s3fs."""
    return 1 if size < 2 * UPLOAD_PART else 2 + -(-size // UPLOAD_PART)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"


def _requests(requests: Requests) -> str:
    if not requests.gets + requests.puts:
        return "no requests to S3"
    return f"{requests.gets:,} GET or HEAD and {requests.puts:,} PUT or LIST of S3, ${requests.dollars:,.2f}"
