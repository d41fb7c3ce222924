"""U-ViT: time, condition and noisy patches are all tokens; long skip connections (arXiv 2209.12152, section 3).

State-dict keys are the official ones, so released weights load as they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from uvit_dist.errors import DataError, MissingInputError, OutputError

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
"""Files of a folder of weights, named as on the Hugging Face Hub."""

_ATEN = torch.ops.aten
PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
}
"""What a compiler sees of linear layers and attention."""

Run = Callable[..., Tensor]
"""Of a function and its arguments, how autograd keeps what the backward pass needs of it."""


@torch.compiler.disable
def _recomputed(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """function(*args), of which autograd keeps the arguments alone and gets the rest again in the backward pass.

    That stops where the last thing wanted has been saved: a product that comes last is not done again.
    """
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn here
        # Under ZeRO-3 a weight is empty between its uses, which the metadata check would take for a change.
        determinism_check="none",
    )


def _product_or_not(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.MUST_RECOMPUTE


def _compiled_selectively(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """function(*args), for a compiler, which is told to keep the results of products and to recompute the rest."""
    contexts = partial(create_selective_checkpoint_contexts, _product_or_not)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _kept(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """function(*args), of which autograd keeps what it wants."""
    return function(*args)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 1e4) -> Tensor:
    """Sinusoidal embedding cat[cos, sin], "Attention Is All You Need", section 3.5.

    timesteps: (B,), may be fractional; dim: even. Returns (B, dim), float32.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def described(model: dict[str, Any]) -> bytes:
    """The ``config.json`` of a folder of weights. model: arguments of ``UViT``."""
    return (json.dumps({"library_name": "uvit_dist", "architectures": ["UViT"], **model}, indent=2) + "\n").encode()


class PatchEmbed(nn.Module):
    """Patches as tokens: (B, C, H, W) → (B, H·W/p², D)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W), H and W divisible by the patch size."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention in the compute dtype; ``qkv`` is one Linear, split as (K=3, H, D)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, qkv: Tensor) -> Tensor:
        """qkv: (B, L, 3D), what ``self.qkv`` makes of the tokens. Returns (B, L, D)."""
        parts = rearrange(qkv, "B L (K H D) -> B L K H D", K=3, H=self.num_heads).unbind(2)
        # Their gradients are joined where they are in memory: split along a leading K they would be copied once more.
        q, k, v = (rearrange(part, "B L H D -> B H L D") for part in parts)
        return self.proj(rearrange(scaled_dot_product_attention(q, k, v), "B H L D -> B L (H D)"))


class Mlp(nn.Module):
    """Linear → GELU → Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (B, L, hidden_dim), what ``self.fc1`` makes of the tokens. Returns (B, L, D)."""
        return self.fc2(self.act(hidden))


class Block(nn.Module):
    """Pre-LN transformer block; an out-block first maps cat[x, skip] (2D) to D (section 3.1 of the paper).

    selective: autograd keeps the residual stream and the results of products; norms, GELU and cat[x, skip], cheap to
    compute and as large as those, are computed again in the backward pass.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool = False, selective: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.selective = selective

    def _join(self, x: Tensor, skip: Tensor) -> Tensor:
        assert self.skip_linear is not None, "a block behind a skip connection"
        return self.skip_linear(torch.cat([x, skip], dim=-1))

    def _qkv(self, x: Tensor) -> Tensor:
        return self.attn.qkv(self.norm1(x))

    def _fc1(self, x: Tensor) -> Tensor:
        return self.mlp.fc1(self.norm2(x))

    def _forward(self, x: Tensor, skip: Tensor | None = None, run: Run = _kept) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = run(self._join, x, skip)
        x = x + self.attn(run(self._qkv, x))
        return x + run(self.mlp, run(self._fc1, x))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x, skip: (B, L, D). Returns (B, L, D)."""
        if not (self.selective and self.training and torch.is_grad_enabled()):
            return self._forward(x, skip)
        hooked = len(self.norm1._forward_pre_hooks) > 0  # by ZeRO-3: no compiler sees the block as a whole
        if torch.compiler.is_compiling() and not hooked:
            return _compiled_selectively(self._forward, x, skip)
        return self._forward(x, skip, _recomputed)


class UViT(nn.Module):
    """The noise prediction network. Arguments are named as in the official configurations.

    num_classes > 0: class-conditional (the null label counts); clip_dim: text-conditional; neither: unconditional.
    Tokens are [label, time, patches], [time, text, patches] or [time, patches].
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int = -1,
        use_checkpoint: bool | Literal["selective"] = False,
        conv: bool = True,
        skip: bool = True,
        clip_dim: int | None = None,
        num_clip_token: int = 77,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.arguments = arguments
        self.embed_dim, self.patch_size, self.use_checkpoint = embed_dim, patch_size, use_checkpoint
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed: nn.Module = nn.Identity()
        if mlp_time_embed:
            self.time_embed = nn.Sequential(
                nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim)
            )
        self.label_emb = nn.Embedding(num_classes, embed_dim) if num_classes > 0 else None
        self.context_embed = nn.Linear(clip_dim, embed_dim) if clip_dim is not None else None
        self.extras = 1 + (num_classes > 0) + (num_clip_token if clip_dim is not None else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (img_size // patch_size) ** 2, embed_dim))

        def block(with_skip: bool = False) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, with_skip, use_checkpoint == "selective")

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        self.reset_parameters()

    @staticmethod
    def from_file(path: str | Path) -> UViT:
        """A network with the weights of an exported safetensors file (``uvit_dist.export``), ready to sample.

        Raises ``MissingInputError``, or ``DataError`` where the file holds something else.
        """
        if not Path(path).is_file():
            raise MissingInputError(f"{path}: no such file; make it with python -m uvit_dist.export")
        try:
            with safe_open(path, framework="pt") as file:
                net = UViT(**json.loads(file.metadata()["model"]))
                net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{path}: no U-ViT exported by uvit_dist ({error}); make it with python -m uvit_dist.export"
            ) from None
        return net.eval()

    @staticmethod
    def from_pretrained(path: str | Path) -> UViT:
        """A network from a folder of ``save_pretrained`` or ``uvit_dist.export``, or a file, ready to sample.

        Raises ``MissingInputError``, or ``DataError`` where it holds something else.
        """
        path = Path(path)
        return UViT.from_file(path / WEIGHTS if path.is_dir() else path)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, weights as they are now, into a folder.

        Raises ``OutputError``.
        """
        folder = Path(directory)
        model = {name: value for name, value in self.arguments.items() if name != "use_checkpoint"}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in (
                (WEIGHTS, save(tensors, {"model": json.dumps(model)})),
                (DESCRIPTION, described(model)),
            ):
                temporary = folder / f".{name}.tmp-{os.getpid()}"
                temporary.write_bytes(content)
                temporary.replace(folder / name)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be written ({error.strerror or error}); make room, or give another"
            ) from None

    def reset_parameters(self) -> None:
        """Normal 0.02 for Linear weights and ``pos_embed``, zero biases; label_emb stays N(0, 1) (official code).

        The official ``trunc_normal_`` cuts at an absolute ±2, a hundred standard deviations: no cut at all.
        """
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def compile_blocks(self, **options: Any) -> None:
        """Have each block compiled at its first call, in its place: modules, hooks and state-dict keys stay.

        options: of ``torch.compile``.
        """
        for block in (*self.in_blocks, self.mid_block, *self.out_blocks):
            block.compile(**options)

    def _run(self, block: nn.Module, *args: Tensor) -> Tensor:
        whole = self.use_checkpoint is True and self.training and torch.is_grad_enabled()
        return _recomputed(block, *args) if whole else block(*args)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Predict the noise in x.

        x: (B, C, H, W), float; timesteps: (B,), n in 1…1000 or t·999, may be fractional; y: (B,) int64 labels;
        context: (B, num_clip_token, clip_dim) text features. Returns (B, C, H, W).
        """
        dtype = self.pos_embed.dtype
        x = self.patch_embed(x.to(dtype))
        time = timestep_embedding(timesteps, self.embed_dim)
        time_token = self.time_embed(time.to(dtype))[:, None]
        tokens = [time_token.to(x.dtype), x]
        if self.label_emb is not None:
            assert y is not None, "a class-conditional U-ViT needs y"
            tokens.insert(0, self.label_emb(y)[:, None])
        if self.context_embed is not None:
            assert context is not None, "a text-conditional U-ViT needs context"
            tokens.insert(1, self.context_embed(context.to(dtype)))
        x = torch.cat(tokens, dim=1) + self.pos_embed

        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())

        x = self.decoder_pred(self.norm(x))[:, self.extras :]
        side = math.isqrt(x.shape[1])
        x = rearrange(x, "B (h w) (p1 p2 C) -> B C (h p1) (w p2)", h=side, p1=self.patch_size, p2=self.patch_size)
        return self.final_layer(x)
