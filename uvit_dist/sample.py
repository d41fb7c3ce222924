"""Sample images from a checkpoint into one picture.

    python -m uvit_dist.sample --checkpoint runs/uvit_h_imagenet512 --labels 207,360 --seed 0 --grid out.png
    python -m uvit_dist.sample --checkpoint mscoco.safetensors --prompt "A green train." --grid out.png
    python -m uvit_dist.sample --checkpoint runs/uvit_s_cifar10/ema.safetensors --count 64 --grid out.png

A row for each label or prompt. The noise of an image is a function of (seed, image id), ids counted row by row: the
same command gives the same picture. --checkpoint: a run directory, a checkpoint of one, or what uvit_dist.export or
uvit_dist.convert wrote; its configuration is taken from it, and can be changed with section.key=value.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from uvit_dist import storage
from uvit_dist.dist import Ranks
from uvit_dist.errors import ConfigError, explained_exit
from uvit_dist.evaluation.point import png
from uvit_dist.host_memory import keep_memory
from uvit_dist.pipeline import UViTPipeline


def labels_of(text: str | None) -> list[int] | None:
    """Numbers with commas between. Raises ``ConfigError``."""
    try:
        return None if text is None else [int(label) for label in text.split(",")]
    except ValueError:
        raise ConfigError(f"--labels {text}: give numbers with commas between: --labels 0,1") from None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="run directory, checkpoint, or export")
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
    if Ranks().device.type == "cpu":
        keep_memory()
    with explained_exit():
        pipeline = UViTPipeline.from_pretrained(args.checkpoint, *args.overrides, weights=args.weights)
        images = pipeline.tensors(labels_of(args.labels), args.prompt, args.count, args.seed, args.batch_size)
        storage.write_bytes(str(args.grid), png(images, args.count))
    print(f"{args.grid}: {len(images)} images, {pipeline.origin}")


if __name__ == "__main__":
    main()
