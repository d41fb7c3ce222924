"""The pretrained networks that the configuration names, from their local files: checked, and fit for the system."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uvit_dist import storage
from uvit_dist.config import AutoencoderConfig, Config, EvaluateConfig, TextConfig
from uvit_dist.errors import ConfigError
from uvit_dist.models import autoencoder as autoencoder_module
from uvit_dist.models import clip as clip_module
from uvit_dist.models import inception as inception_module
from uvit_dist.models import text as text_module
from uvit_dist.models.autoencoder import Autoencoder, load_autoencoder
from uvit_dist.models.clip import load_clip
from uvit_dist.models.features import EXTRACTORS, Extractor
from uvit_dist.models.frozen import fingerprint
from uvit_dist.models.inception import Inception, load_inception
from uvit_dist.models.text import TextEncoder, load_text_encoder, load_text_tower, tower_remedy
from uvit_dist.scores.kinds import CLIP, WIDTHS, needed


def load_encoder(section: AutoencoderConfig) -> Autoencoder:
    """The encoding autoencoder. Raises ``MissingInputError``, ``DataError``."""
    path = storage.local_weights(
        section.encoder, section.encoder_sha256, "autoencoder.encoder", autoencoder_module.REMEDY
    )
    return load_autoencoder(path)


def load_decoder(config: Config) -> Autoencoder | None:
    """The decoding autoencoder; none in pixel space.

    Raises ``MissingInputError``, ``DataError``, or ``ConfigError`` where its latents are not the network's.
    """
    section, model = config.autoencoder, config.model
    if section is None:
        return None
    path = storage.local_weights(
        section.decoder, section.decoder_sha256, "autoencoder.decoder", autoencoder_module.REMEDY
    )
    decoder = load_autoencoder(path)
    side = model.img_size * decoder.factor
    if decoder.latent_channels != model.in_chans or side != config.data.image_size:
        raise ConfigError(
            f"autoencoder.decoder {section.decoder}: of latents of {decoder.latent_channels} channels, "
            f"{decoder.factor} pixels wide: {side} pixels for model.img_size {model.img_size}; model.in_chans is "
            f"{model.in_chans} and data.image_size {config.data.image_size}; give the decoder of these latents"
        )
    return decoder


def load_text(section: TextConfig) -> TextEncoder:
    """The text encoder. Raises ``ConfigError``, ``MissingInputError``, ``DataError``."""
    remedy = text_module.REMEDY if section.tower is None else tower_remedy(section.tower)
    path = storage.local_weights(section.encoder, section.encoder_sha256, "text.encoder", remedy)
    return load_text_encoder(path) if section.tower is None else load_text_tower(section.tower, path, section.tokenizer)


def load_extractor(evaluate: EvaluateConfig, device: torch.device) -> tuple[Extractor, str]:
    """The features that the scores of the configuration are made of, of images on ``device``.

    And what identifies them: first, up to a blank, the feature network, as references name it.
    Raises ``ConfigError``, ``MissingInputError``, ``DataError``.
    """
    kinds = needed(evaluate.features, evaluate.asked)
    parts: list[Extractor] = []
    identities: list[str] = [evaluate.features]
    if evaluate.features != "inception":
        parts.append(EXTRACTORS[evaluate.features])
    elif set(kinds) & set(WIDTHS):
        inception = _inception(evaluate, kinds).to(device)
        parts.append(inception)
        identities = [fingerprint(inception.state_dict()), *inception.kinds]
    if CLIP in kinds:
        assert evaluate.clip is not None
        remedy = clip_module.remedy(evaluate.clip_model)
        path = storage.local_weights(evaluate.clip, evaluate.clip_sha256, "evaluate.clip", remedy)
        clip = load_clip(evaluate.clip_model, path).to(device)
        parts.append(clip)
        identities += [CLIP, evaluate.clip_model, fingerprint(clip.state_dict())]

    def extract(images: Tensor, texts: Sequence[str] | None = None) -> dict[str, Tensor]:
        return {kind: value for part in parts for kind, value in part(images, texts).items()}

    return extract, " ".join(identities)


def _inception(evaluate: EvaluateConfig, kinds: Sequence[str]) -> Inception:
    if evaluate.inception is None:
        raise ConfigError(
            f"evaluate.inception: missing; evaluate.features inception needs it; {inception_module.REMEDY}"
        )
    path = storage.local_weights(
        evaluate.inception, evaluate.inception_sha256, "evaluate.inception", inception_module.REMEDY
    )
    return load_inception(path, [kind for kind in kinds if kind in WIDTHS])
