"""Encode images and captions once: shards of moments and of the contexts of all captions, for text systems.

    python -m data_tools.precompute_text --config YOUR_CONFIG.yaml

The context of the empty prompt lies beside the index. Shards that an earlier run finished are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.images import Item
from data_tools.precompute_latents import encode, moments_provenance, open_encoder
from data_tools.shard_job import (
    add_batch_size,
    as_stored,
    claim_directory,
    command_line,
    make_shards,
    require_tool,
    this_device,
)
from data_tools.sources import open_source
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.data.latents import Sample, TextProvenance, encode_array
from uvit_dist.data.shards import EMPTY_CONTEXT, ShardRecord
from uvit_dist.models.text import TextEncoder
from uvit_dist.pretrained import load_text


@torch.inference_mode()
def encode_captions(
    captions: Sequence[str], encoder: TextEncoder, dtype: str, batch_size: int
) -> Iterator[NDArray[Any]]:
    """The context of each caption, (length, width) of ``dtype``.

    Encoded in batches of ``batch_size``, the last one padded: the bits depend on the batch's size.
    Raises ``DataError`` for contexts that do not fit ``dtype``.
    """
    for first in range(0, len(captions), batch_size):
        batch = list(captions[first : first + batch_size])
        contexts = encoder.encode(batch + [""] * (batch_size - len(batch))).cpu().numpy()
        for caption, context in zip(batch, contexts, strict=False):
            yield as_stored(context, dtype, f"caption {caption!r}: contexts", "data.contexts_dtype")


def write_empty_context(index: str, context: NDArray[Any], encoder_fingerprint: str) -> TextProvenance:
    """Write the empty prompt's context, (length, width) as stored, beside the index; what its provenance says."""
    encoded = encode_array(context)[0]
    storage.make_directory(storage.parent(index))
    storage.write_bytes(storage.join(storage.parent(index), EMPTY_CONTEXT), encoded)
    length, width = context.shape
    digest = hashlib.sha256(encoded).hexdigest()
    return TextProvenance(encoder_fingerprint, np.dtype(context.dtype).name, (length, width), digest)


def precompute(config: Config, batch_size: int, device: torch.device) -> list[ShardRecord]:
    """Write all shards that are missing, then the index. Raises ``UserError`` of the right kind."""
    require_tool(config, "precompute_text")
    assert config.text is not None
    data, section = config.data, config.text
    source = open_source(data)
    captions = source.captions
    assert captions is not None
    encoder = load_text(section).to(device)
    autoencoder = open_encoder(config, device)
    claim_directory(data.index)
    (empty,) = encode_captions([""], encoder, data.contexts_dtype, batch_size)
    text = write_empty_context(data.index, empty, encoder.fingerprint)

    def samples(items: list[Item]) -> Iterator[Sample]:
        flat = [caption for number, _ in items for caption in captions[number]]
        contexts = encode_captions(flat, encoder, data.contexts_dtype, batch_size)
        moments = encode(items, source, autoencoder, data, batch_size, device)
        for (number, _), sample in zip(items, moments, strict=True):
            own = np.stack(list(islice(contexts, len(captions[number]))))
            yield replace(sample, captions=captions[number], contexts=own)

    provenance = moments_provenance(config, source, autoencoder, text)
    return make_shards(config, source.keys, provenance, samples)


def main() -> None:
    """The command line."""
    command_line(__doc__, lambda config, args: precompute(config, args.batch_size, this_device()), add_batch_size)


if __name__ == "__main__":
    main()
