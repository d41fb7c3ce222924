"""The pretrained networks that the configuration names, from their local files: checked, and fit for the system."""

from __future__ import annotations

import torch

from uvit_dist import storage
from uvit_dist.config import AutoencoderConfig, Config, EvaluateConfig, TextConfig
from uvit_dist.errors import ConfigError
from uvit_dist.models import autoencoder as autoencoder_module
from uvit_dist.models import inception as inception_module
from uvit_dist.models import text as text_module
from uvit_dist.models.autoencoder import Autoencoder, load_autoencoder
from uvit_dist.models.features import EXTRACTORS, Extractor
from uvit_dist.models.frozen import fingerprint
from uvit_dist.models.inception import load_inception
from uvit_dist.models.text import TextEncoder, load_text_encoder, load_text_tower, tower_remedy


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
    """Images (B, 3, H, W) uint8 on ``device`` → features (B, D) float64, of the feature space in the configuration.

    And what identifies its weights. Raises ``ConfigError``, ``MissingInputError``, ``DataError``.
    """
    if evaluate.features != "inception":
        return EXTRACTORS[evaluate.features], evaluate.features
    if evaluate.inception is None:
        raise ConfigError(
            f"evaluate.inception: missing; evaluate.features inception needs it; {inception_module.REMEDY}"
        )
    path = storage.local_weights(
        evaluate.inception, evaluate.inception_sha256, "evaluate.inception", inception_module.REMEDY
    )
    network = load_inception(path).to(device)
    return network.features, fingerprint(network.state_dict())
