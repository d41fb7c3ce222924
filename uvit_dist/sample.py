"""Sample images from a checkpoint into one picture.

    python -m uvit_dist.sample --checkpoint runs/uvit_h_imagenet512 --labels 207,360 --seed 0 --grid out.png
    python -m uvit_dist.sample --checkpoint mscoco.safetensors --prompt "A green train." --grid out.png
    python -m uvit_dist.sample --checkpoint runs/uvit_s_cifar10/ema.safetensors --count 64 --grid out.png

A row for each label or prompt. The noise of an image is a function of (seed, image id), ids counted row by row: the
same command gives the same picture. --checkpoint: a run directory, a checkpoint of one, or a file of uvit_dist.export
or uvit_dist.convert; its configuration is taken from it, and can be changed with section.key=value.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from uvit_dist import storage
from uvit_dist.config import Config
from uvit_dist.config_yaml import changed, parse_config
from uvit_dist.data.latents import check_same_text_encoder
from uvit_dist.errors import ConfigError, explained_exit
from uvit_dist.evaluation.networks import load_network
from uvit_dist.evaluation.point import png
from uvit_dist.pretrained import load_decoder, load_text
from uvit_dist.sampler import Condition, Sampler
from uvit_dist.weights import check_trained_as, load_weights


def rows_of(
    config: Config, labels: str | None, prompts: list[str], text_encoder: str | None = None
) -> tuple[Condition, Tensor | None]:
    """The conditions of the rows, one each, and the empty prompt's context (L, D) for a text system.

    labels: numbers and commas; text_encoder: hash of the one the network was trained with, if known.
    Raises ``ConfigError`` where they are not what this system is asked with.
    """
    model = config.model
    if model.clip_dim is not None:
        if not prompts or labels is not None or config.text is None:
            raise ConfigError('--prompt: this system is asked with texts; give --prompt "A green train."')
        encoder = load_text(config.text)
        check_same_text_encoder({"text.encoder": encoder.fingerprint, "training": text_encoder})
        contexts = encoder.encode([*prompts, ""])
        if contexts.shape[1:] != (model.num_clip_token, model.clip_dim):
            raise ConfigError(
                f"text.encoder {config.text.encoder}: its contexts are {tuple(contexts.shape[1:])}, the network's "
                f"{model.num_clip_token, model.clip_dim} (model.num_clip_token, model.clip_dim); give the right one"
            )
        return {"context": contexts[:-1]}, contexts[-1]
    if prompts:
        raise ConfigError("--prompt: this system knows no texts" + ("; give --labels" if model.num_classes > 0 else ""))
    if model.num_classes <= 0:
        if labels is not None:
            raise ConfigError(f"--labels {labels}: this system is unconditional; give --count alone")
        return {}, None
    last = model.num_classes - 1 - (config.diffusion.null_label is not None)
    if labels is None:
        raise ConfigError(f"--labels: missing; say which classes, from 0 to {last}: --labels 0,{last}")
    try:
        numbers = [int(label) for label in labels.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= number <= last for number in numbers):
        raise ConfigError(f"--labels {labels}: must be numbers from 0 to {last} with commas between; --labels 0,{last}")
    return {"y": torch.tensor(numbers)}, None


def sample(
    config: Config, sampler: Sampler, rows: Condition, count: int, seed: int, batch_size: int, device: torch.device
) -> Tensor:
    """``count`` images for each row of conditions, in batches of a fixed size, the last one padded.

    Returns (rows * count, 3, H, W) uint8, on the host.
    """
    names = list(rows)
    total = count * (len(rows[names[0]]) if names else 1)
    images = []
    for first in tqdm(range(0, total, batch_size), unit="batch", disable=None):
        ids = torch.arange(first, first + batch_size)
        row = ids.clamp(max=total - 1) // count
        condition = {name: rows[name][row].to(device) for name in names}
        images.append(sampler.generate(ids.to(device), condition, seed).cpu())
    return torch.cat(images)[:total]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="run directory, checkpoint, or exported file")
    parser.add_argument("--labels", help="classes, with commas between: a row each")
    parser.add_argument("--prompt", action="append", default=[], help="a text: a row each; may be given several times")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="images in a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--grid", required=True, type=Path, help="picture to write, .png")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once; changes their last bits")
    parser.add_argument("--weights", default="ema", choices=["ema", "master"], help="which (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    if args.count < 1 or args.batch_size < 1:
        parser.error("--count and --batch-size must be at least 1")
    if args.seed < 0 or args.grid.suffix.lower() != ".png":
        parser.error("--seed must be 0 or more, and --grid the name of a .png")
    with explained_exit():
        weights = load_weights(args.checkpoint, args.weights)
        config = parse_config(changed(deepcopy(weights.config), args.overrides), str(args.checkpoint))
        check_trained_as(weights, config)
        rows, empty = rows_of(config, args.labels, args.prompt, weights.text_encoder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        decoder = load_decoder(config)
        net = load_network(config, weights).to(device)
        sampler = Sampler(config, net, decoder.to(device) if decoder else None, empty)
        images = sample(config, sampler, rows, args.count, args.seed, args.batch_size, device)
        storage.write_bytes(str(args.grid), png(images, args.count))
    print(f"{args.grid}: {len(images)} images, {weights.kind} weights of step {weights.step} of {weights.origin}")


if __name__ == "__main__":
    main()
