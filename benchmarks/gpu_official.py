"""The official code on a GPU, imported as it is: what ``benchmarks.gpu`` compares with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import official_parity
from uvit_dist.models.autoencoder import Autoencoder, to_official_keys


class Official:
    """Training steps, sampling and the autoencoder of a checkout of the official code."""

    def __init__(self, directory: Path, network: dict[str, Any], device: torch.device) -> None:
        self.modules = official_parity.official_modules(directory)
        self._network, self._device = network, device

    def trainer(self, batch: int, checkpointed: bool, amp: torch.dtype) -> Any:
        """A function that makes one training step of so many latents and returns its loss.

        amp: float16 with a loss scale is what its ``accelerate`` setting of mixed precision does.
        """
        utils, script = self.modules["utils"], self.modules["train_ldm_discrete"]
        settings = self.modules["configs.imagenet256_uvit_huge"].get_config()
        settings.nnet = {"name": "uvit", **self._network, "use_checkpoint": checkpointed}
        utils.set_seed(0)
        state = utils.initialize_train_state(settings, self._device)
        state.nnet.train()
        scaler = torch.amp.GradScaler(self._device.type, enabled=amp is torch.float16 and self._device.type == "cuda")
        schedule = script.Schedule(script.stable_diffusion_beta_schedule())
        side, channels = self._network["img_size"], self._network["in_chans"]

        def step() -> float:
            moments = torch.randn(batch, 2 * channels, side, side, device=self._device)
            mean, logvar = moments.chunk(2, dim=1)
            latents = 0.18215 * (mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean))
            labels = torch.randint(self._network["num_classes"] - 1, (batch,), device=self._device)
            state.optimizer.zero_grad()
            with torch.autocast(self._device.type, amp):
                loss = script.LSimple(latents, state.nnet, schedule, y=labels)
            scaler.scale(loss.mean()).backward()
            scaler.step(state.optimizer)
            scaler.update()
            state.lr_scheduler.step()
            state.ema_update(0.9999)
            return float(loss.mean().item())

        return step

    def sampler(self, net: nn.Module, autoencoder: nn.Module, steps: int, cfg_scale: float, amp: torch.dtype) -> Any:
        """A function that makes images (B, 3, H, W) in [0, 1] of labels (B,), as its evaluation script does."""
        from importlib import import_module

        solver, script = import_module("dpm_solver_pp"), self.modules["train_ldm_discrete"]
        betas = script.stable_diffusion_beta_schedule()
        null = self._network["num_classes"] - 1
        shape = (self._network["in_chans"], self._network["img_size"], self._network["img_size"])

        @torch.no_grad()
        def sample(labels: Tensor) -> Tensor:
            nothing = torch.full_like(labels, null)
            schedule = solver.NoiseScheduleVP("discrete", betas=torch.tensor(betas, device=self._device).float())

            def model(x: Tensor, t: Tensor) -> Tensor:
                cond = net(x, t * len(betas), y=labels)
                return cond + cfg_scale * (cond - net(x, t * len(betas), y=nothing))

            with torch.autocast(self._device.type, amp):
                start = torch.randn(len(labels), *shape, device=self._device)
                ours = solver.DPM_Solver(model, schedule, predict_x0=True, thresholding=False)
                images = autoencoder.decode(ours.sample(start, steps=steps, eps=1.0 / len(betas), T=1.0))
            return (0.5 * (images.float() + 1.0)).clamp(0.0, 1.0)

        return sample

    def network(self) -> nn.Module:
        """Its network, for sampling."""
        net = self.modules["utils"].get_nnet("uvit", **self._network)
        return net.to(self._device).eval().requires_grad_(False)

    def autoencoder(self, ours: Autoencoder) -> nn.Module:
        """Its autoencoder, of our weights."""
        from importlib import import_module

        config = ours.vae.config
        widths = list(config.block_out_channels)
        settings = {
            "double_z": True, "z_channels": config.latent_channels, "resolution": 256, "in_channels": 3, "out_ch": 3,
            "ch": widths[0], "ch_mult": [width // widths[0] for width in widths], "attn_resolutions": [],
            "num_res_blocks": config.layers_per_block, "dropout": 0.0,
        }  # fmt: skip
        module = import_module("libs.autoencoder")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "autoencoder.pth")
            torch.save(to_official_keys(ours.vae.state_dict()), path)
            return module.FrozenAutoencoderKL(settings, config.latent_channels, str(path)).to(self._device)
