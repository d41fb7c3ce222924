"""G6 and G7: guided sampling with decoding, and the autoencoder both ways."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchvision.utils import save_image

from benchmarks.gpu_session import DEVICE, Session, configuration, seconds
from uvit_dist.models.autoencoder import Autoencoder
from uvit_dist.models.uvit import UViT
from uvit_dist.sampler import Sampler


def random_autoencoder(session: Session) -> Autoencoder:
    """An autoencoder of Stable Diffusion's shape, random weights."""
    widths = session.size.levels
    count = len(widths)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * count, up_block_types=["UpDecoderBlock2D"] * count,
        block_out_channels=widths, layers_per_block=2, latent_channels=4,
    )  # fmt: skip
    return Autoencoder(vae).to(DEVICE).eval().requires_grad_(False)


def sampling(session: Session) -> None:
    """G6 and G7: images/s of guided sampling with decoding, and of the autoencoder both ways."""
    size = session.size
    config = configuration(session, size.micro_batches[-1])
    torch.manual_seed(0)
    net = UViT(**config.model.model_dump()).to(DEVICE).eval().requires_grad_(False)
    autoencoder = random_autoencoder(session)
    sampler, batch = Sampler(config, net, autoencoder), size.sub_batch
    labels = torch.arange(batch, device=DEVICE) % (size.network["num_classes"] - 1)
    done = 0

    def generate() -> Tensor:
        nonlocal done
        ids = torch.arange(done, done + batch, device=DEVICE)
        done += batch
        return sampler.generate(ids, {"y": labels}, 0).cpu()

    each = seconds(generate, max(1, size.images // batch - 1), warm_ups=1) / batch
    session.tell(
        "G6 minutes for 50,000 samples", 50_000 * each / 60, images_per_s=1 / each, precision="fp32", scored=False
    )
    side = size.network["img_size"]
    latents = torch.randn(8, 4, side, side, device=DEVICE)
    images = torch.rand(8, 3, autoencoder.factor * side, autoencoder.factor * side, device=DEVICE) * 2 - 1
    ours = {"decode": lambda: autoencoder.decode(latents), "encode": lambda: autoencoder.encode_moments(images)}
    with torch.inference_mode():
        rates = {name: 8 / seconds(work, size.repeat) for name, work in ours.items()}
        for name, rate in rates.items():
            session.tell(f"G7 {name}, images/s in fp32", rate)
    if session.official is None:
        return
    theirs = session.official.autoencoder(autoencoder)
    with torch.inference_mode():
        session.tell("G7 decode", rates["decode"] * seconds(lambda: theirs.decode(0.18215 * latents), size.repeat) / 8)
        session.tell("G7 encode", rates["encode"] * seconds(lambda: theirs.encode_moments(images), size.repeat) / 8)
    official = session.official.sampler(session.official.network(), theirs, size.solver_steps, 0.7, torch.float16)

    def with_files() -> None:
        for number, image in enumerate(official(labels)):
            save_image(image, session.directory / f"{number}.png")

    session.tell(
        "G6 against official", seconds(with_files, 1, warm_ups=1) / batch / each, official="fp16, its PNGs written"
    )
