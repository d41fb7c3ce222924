"""A picture of what an index holds: originals beside what the decoder makes of their stored moments."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from data_tools.crops import Pixels
from data_tools.images import ImageSource
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.data.latents import MIRROR_SUFFIX
from uvit_dist.data.shards import ShardIndex
from uvit_dist.errors import DataError
from uvit_dist.models.features import to_uint8
from uvit_dist.models.frozen import true_fp32

if TYPE_CHECKING:
    from uvit_dist.models.autoencoder import Autoencoder

NAME = "contact_sheet.png"
WIDEST = 2000
"""Pixels of a sheet's width at most."""
SMALLEST = 96
"""Side of a tile at least: small images are magnified, so that there is room for text."""
GAP, LINE = 8, 14
AT_ONCE = 4
"""Images decoded together."""


def contact_sheet(
    originals: Pixels, decoded: Pixels, names: Sequence[str] | None = None
) -> tuple[Image.Image, list[float]]:
    """Pairs, the original on the left, each with its name (or number) and PSNR below, in a sheet that is near square.

    originals, decoded: (n, H, W, 3). Returns the sheet, and the PSNR of each pair in dB.
    """
    assert originals.shape == decoded.shape
    count, height, width = originals.shape[:3]
    found = [psnr(one, other) for one, other in zip(originals, decoded, strict=True)]
    names = [str(number) for number in range(count)] if names is None else names
    columns = max(1, min(count, round(math.sqrt(count * (height + GAP + LINE) / (2 * width + GAP)))))
    rows = -(-count // columns)
    scale = float(max(1, -(-SMALLEST // width)))
    scale = min(scale, ((WIDEST - GAP) / columns - GAP) / (2 * width))
    tile = max(1, int(width * scale)), max(1, int(height * scale))
    step = 2 * tile[0] + GAP, tile[1] + LINE + GAP
    sheet = Image.new("RGB", (columns * step[0] + GAP, rows * step[1] + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for number, value in enumerate(found):
        left, top = GAP + number % columns * step[0], GAP + number // columns * step[1]
        for side, pixels in enumerate((originals[number], decoded[number])):
            sheet.paste(Image.fromarray(pixels).resize(tile, how), (left + side * tile[0], top))
        text = f"{value:.1f} dB" if math.isfinite(value) else "equal"
        name = names[number]
        while name and draw.textlength(f"{name}  {text}", font=font) > 2 * tile[0]:
            name = name[1:]
        draw.text((left, top + tile[1] + 1), f"{name}  {text}", fill="black", font=font)
    return sheet, found


def psnr(original: Pixels, decoded: Pixels) -> float:
    """Peak signal-to-noise ratio in dB, of range 255; infinite where both are equal. Both: (H, W, 3)."""
    error = float(np.square(original.astype(np.float64) - decoded).mean())
    return math.inf if error == 0.0 else 10.0 * math.log10(255.0**2 / error)


def make_contact_sheet(
    config: Config, index: ShardIndex, source: ImageSource, decoder: Autoencoder, device: torch.device, count: int
) -> list[float]:
    """Write contact_sheet.png beside the index: samples spread over its first shards, mirror images among them.

    source: where the originals come from; decoder: of the stored moments' means. Returns the PSNR of each pair, in dB.
    Raises ``DataError`` where a sample is of no image in the source.
    """
    numbers = {key: number for number, key in enumerate(source.keys)}
    originals, means, names = [], [], []
    for shard, row in _spread(index, config.data.mirror, count):
        key, moments = read_sample(index, shard, row)
        mirrored = key not in numbers and key.endswith(MIRROR_SUFFIX)
        number = numbers.get(key.removesuffix(MIRROR_SUFFIX) if mirrored else key)
        if number is None:
            raise DataError(f"{index.shard_path(shard)}: no image of {source.name} has the key {key}; make it again")
        pixels = source.load(number)
        originals.append(pixels[:, ::-1] if mirrored else pixels)
        means.append(moments[: len(moments) // 2].astype(np.float32))
        names.append(key)
    decoded = _decode(np.stack(means), decoder, device)
    sheet, found = contact_sheet(np.stack(originals), decoded, names)
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    storage.write_bytes(storage.join(storage.parent(index.path), NAME), out.getvalue())
    return found


def _spread(index: ShardIndex, mirror: bool, count: int) -> list[tuple[int, int]]:
    """(shard, row) of samples evenly spread over the first shard, and the first of mirror images."""
    last = len(index.shards) - 1
    shards = sorted({0, (last + 1) // 2}) if mirror else [0]
    rows = [(shard, row) for shard in shards for row in range(index.counts[shard])]
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in chosen]


def read_sample(index: ShardIndex, shard: int, row: int) -> tuple[str, NDArray[np.generic]]:
    """The key of a sample and its data, (2C, H, W), by one ranged read. Raises ``DataError`` where it is damaged."""
    made, path = index.provenance, index.shard_path(shard)
    size = math.prod(made.shape) * np.dtype(made.dtype).itemsize
    offsets = index.rows(shard)["offset"].astype(np.int64)
    begin = 0 if row == 0 else -(-(int(offsets[row - 1]) + size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    end = int(offsets[row]) + size
    content = storage.read_range(path, begin, end - begin)
    content += bytes(-len(content) % tarfile.BLOCKSIZE)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            member = tar.getmembers()[-1]
            file = tar.extractfile(member)
            assert file is not None
            data = np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)
    except (tarfile.TarError, IndexError, ValueError) as error:
        raise DataError(f"{path}: sample {row} cannot be read ({error}); make this shard again") from None
    return member.name.removesuffix(".npy"), data


@torch.inference_mode()
def _decode(means: NDArray[np.float32], decoder: Autoencoder, device: torch.device) -> Pixels:
    """(n, H, W, 3) of unscaled latents (n, C, h, w)."""
    decoder = decoder.to(device)
    parts = []
    with true_fp32():
        for part in torch.from_numpy(means).split(AT_ONCE):
            parts.append(to_uint8(decoder.decode(part.to(device))).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)
