"""What all points of an evaluation share: the networks, loaded once, and what the images are asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from uvit_dist.config import Config
from uvit_dist.data.latents import check_same_text_encoder
from uvit_dist.data.shards import ShardIndex, read_index
from uvit_dist.errors import ConfigError
from uvit_dist.models.autoencoder import Autoencoder
from uvit_dist.models.features import Extractor
from uvit_dist.models.uvit import UViT
from uvit_dist.preflight import check_provenance, empty_context
from uvit_dist.pretrained import load_decoder, load_extractor
from uvit_dist.weights import Kind, Weights, check_trained_as, load_weights


@dataclass(frozen=True)
class Networks:
    """The networks on their device, and where they come from.

    weights: whose these are, without the tensors; none: untrained. index: of the conditions, where they are drawn from
    samples. empty: context (L, D) of the empty prompt, for text systems. identity: what the features of an image depend
    on, beside the configuration.
    """

    net: nn.Module
    decoder: Autoencoder | None
    extract: Extractor
    weights: Weights | None
    index: ShardIndex | None
    empty: Tensor | None
    device: torch.device
    identity: tuple[str, ...]

    @property
    def feature_network(self) -> str:
        """What identifies the weights of the feature network, as references name it."""
        return self.identity[2].partition(" ")[0]

    @property
    def step(self) -> int:
        """Updates that the network has seen."""
        return self.weights.step if self.weights else 0


def load_networks(config: Config, device: torch.device) -> Networks:
    """Load and check all that an evaluation needs; checkpoints by the sizes of their files alone.

    Raises ``ConfigError``, ``MissingInputError``, ``DataError``, ``CheckpointError``.
    """
    index = condition_index(config)
    weights = choose_weights(config, verify="size")
    if index and index.provenance.text and weights:
        hashes = {"evaluate.captions": index.provenance.text.encoder_fingerprint, "training": weights.text_encoder}
        check_same_text_encoder(hashes)
    net = load_network(config, weights).to(device)
    decoder = load_decoder(config)
    extract, extractor_identity = load_extractor(config.evaluate, device)
    return Networks(
        net=net,
        decoder=decoder.to(device) if decoder else None,
        extract=extract,
        weights=replace(weights, tensors={}) if weights else None,
        index=index,
        empty=empty_context(index) if index and config.model.clip_dim is not None else None,
        device=device,
        identity=(
            weights.fingerprint if weights else f"untrained {config.seed}",
            decoder.fingerprint if decoder else "",
            extractor_identity,
            index.sha256 if index else "",
        ),
    )


def condition_index(config: Config) -> ShardIndex | None:
    """The index that conditions are drawn from: of captions, or of the training set for the frequency of its labels.

    Raises ``ConfigError``, ``MissingInputError``, ``DataError``.
    """
    if config.model.clip_dim is not None:
        if config.evaluate.captions is None:
            raise ConfigError(
                "evaluate.captions: missing; a text system is evaluated on the captions of held-out samples: give the "
                "index that data_tools.precompute_text made of them"
            )
        index = read_index(config.evaluate.captions, "evaluate.captions")
        check_provenance(config, index, "evaluate.captions")
        return index
    if config.evaluate.labels == "uniform":
        return None
    index = read_index(config.data.index)
    check_provenance(config, index)
    return index


def choose_weights(config: Config, verify: str | None = None) -> Weights | None:
    """The weights to evaluate; none for untrained ones.

    Raises ``MissingInputError``, ``CheckpointError``, or ``DataError`` where they were trained under another model,
    diffusion or scale factor.
    """
    protocol = config.evaluate
    if protocol.weights == "untrained":
        return None
    kind: Kind = "ema" if protocol.weights == "ema" else "master"
    weights = load_weights(protocol.checkpoint or config.run_dir, kind, verify or config.checkpoint.verify)
    check_trained_as(weights, config)
    return weights


def load_network(config: Config, weights: Weights | None) -> UViT:
    """The network with these weights, which become its own, or untrained ones."""
    if weights is None:
        torch.manual_seed(config.seed)
        return UViT(**config.model.model_dump()).eval().requires_grad_(False)
    with torch.device("meta"):  # no time is spent on weights that are replaced
        net = UViT(**config.model.model_dump())
    net.load_state_dict(weights.tensors, assign=True)
    return net.eval().requires_grad_(False)
