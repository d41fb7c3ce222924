"""Encode images and captions once: shards of moments and of the contexts of all captions, for text systems.

    python -m data_tools.precompute_text --config configs/uvit_s_mscoco.yaml

The context of the empty prompt lies beside the index. Shards that an earlier run finished are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.images import ImageSource
from data_tools.pipeline import Finish
from data_tools.precompute_latents import (
    MomentsMaker,
    contact_sheet_of,
    encoder_settings,
    moments_provenance,
    open_encoder,
    tell_difference,
)
from data_tools.shard_job import as_stored, command_line, make_from_images, open_images, require_tool, this_device
from data_tools.units import Unit, claim_directory
from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.data.latents import Sample, TextProvenance, encode_array
from uvit_dist.data.shards import EMPTY_CONTEXT, ShardRecord

if TYPE_CHECKING:
    from uvit_dist.models.autoencoder import Autoencoder
    from uvit_dist.models.text import TextEncoder


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


class TextMaker(MomentsMaker):
    """Encodes images as ``MomentsMaker``, and beside them the captions of a unit, in batches of one size over the unit.

    An image's contexts are also its mirror image's.
    """

    def __init__(
        self,
        source: ImageSource,
        autoencoder: Autoencoder,
        encoder: TextEncoder,
        config: Config,
        device: torch.device,
    ) -> None:
        super().__init__(source, autoencoder, config, device)
        assert source.captions is not None
        self._captions, self._tower, self._contexts_dtype = source.captions, encoder, config.data.contexts_dtype
        self._contexts: dict[int, Iterator[NDArray[Any]]] = {}

    def start(self, unit: Unit, places: range, pixels: Tensor) -> Finish:
        """pixels: (n, H, W, 3) uint8. What it returns gives moments, captions and their contexts (captions, L, D)."""
        moments = super().start(unit, places, pixels)
        numbers = [unit.images[place] for place in places]
        if places.start == 0:
            flat = [caption for number in unit.images for caption in self._captions[number]]
            self._contexts[unit.number] = encode_captions(flat, self._tower, self._contexts_dtype, self.batch_size)
        contexts = [list(islice(self._contexts[unit.number], len(self._captions[n]))) for n in numbers]
        if places.stop == len(unit.images):
            del self._contexts[unit.number]

        def finish() -> list[list[Sample]]:
            return [
                [
                    replace(sample, captions=self._captions[number], contexts=np.stack(own) if own else None)
                    for number, own, sample in zip(numbers, contexts, samples, strict=True)
                ]
                for samples in moments()
            ]

        return finish


def precompute(config: Config, device: torch.device) -> list[ShardRecord]:
    """Do a share of the work until all is done, then see to the index. Raises ``UserError`` of the right kind."""
    from uvit_dist.pretrained import load_text  # seconds, which decoding processes are spared

    require_tool(config, "precompute_text")
    assert config.text is not None
    data, section = config.data, config.text
    source = open_images(config)
    encoder = load_text(section).to(device)
    autoencoder = open_encoder(config, device)
    claim_directory(data.index)
    (empty,) = encode_captions([""], encoder, data.contexts_dtype, config.precompute.batch_size)
    text = write_empty_context(data.index, empty, encoder.fingerprint)
    provenance = moments_provenance(config, source, autoencoder, text)
    maker = TextMaker(source, autoencoder, encoder, config, device)
    tell_difference(maker, source, config)
    sheet = partial(contact_sheet_of, config, source, device)
    return make_from_images(config, source, provenance, encoder_settings(config.precompute), maker, sheet)


def make(config: Config) -> list[ShardRecord]:
    """``precompute`` on this worker's device."""
    return precompute(config, this_device())


def main() -> None:
    """The command line."""
    command_line("precompute_text", __doc__, lambda config, args: make(config), from_images=True)


if __name__ == "__main__":
    main()
