"""The configuration: frozen, typed sections, and the rules between them. ``config_yaml`` reads and writes it."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from uvit_dist.config_data import DataConfig, PrecomputeConfig, Section, StorageConfig
from uvit_dist.config_evaluate import EvaluateConfig
from uvit_dist.config_health import AttributionConfig, StragglersConfig
from uvit_dist.config_rules import raise_broken, rules_between
from uvit_dist.config_speed import ProfileConfig, SpeedConfig


class ModelConfig(Section):
    """The network, in the names of the official ``nnet`` configurations."""

    img_size: int = Field(gt=0, description="height and width of the network's input, in latent (or image) pixels")
    patch_size: int = Field(gt=0, description="side of a patch, in the same pixels")
    in_chans: int = Field(4, gt=0, description="channels of the input: 4 for Stable Diffusion latents, 3 for images")
    embed_dim: int = Field(gt=0, description="width of a token")
    depth: int = Field(gt=0, description="number of blocks without the middle one: half before it, half after")
    num_heads: int = Field(gt=0, description="attention heads")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a block's MLP over its width")
    qkv_bias: bool = Field(False, description="a bias on the query, key and value projection")
    mlp_time_embed: bool = Field(False, description="an MLP on the time embedding (ablation of the paper)")
    num_classes: int = Field(-1, ge=-1, description="labels, the null label included; -1: not class-conditional")
    clip_dim: int | None = Field(None, gt=0, description="width of a text token; none: not text-conditional")
    num_clip_token: int = Field(77, gt=0, description="number of text tokens")
    conv: bool = Field(True, description="a 3x3 convolution after unpatchify")
    skip: bool = Field(True, description="the long skip connections (off: ablation of the paper)")
    use_checkpoint: Literal[False, True, "selective"] = Field(
        False,
        description="what the backward pass recomputes: nothing; whole blocks; or ('selective') norms, GELU and the "
        "joined inputs behind skips, the results of products being kept",
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        rules = [
            (
                self.img_size % self.patch_size == 0,
                f"img_size {self.img_size} must be divisible by patch_size {self.patch_size}",
            ),
            (
                self.embed_dim % self.num_heads == 0,
                f"embed_dim {self.embed_dim} must be divisible by num_heads {self.num_heads}",
            ),
            (self.embed_dim % 2 == 0, f"embed_dim {self.embed_dim} must be even (half cosines, half sines)"),
            (
                self.depth % 2 == 0,
                f"depth {self.depth} must be even: each block before the middle has one after it",
            ),
            (self.num_classes != 0, "num_classes must be -1 (not class-conditional) or positive"),
            (self.num_classes < 0 or self.clip_dim is None, "num_classes and clip_dim exclude each other"),
        ]
        raise_broken(rules)
        return self


class DiffusionConfig(Section):
    """The noise schedule and the objective."""

    schedule: Literal["discrete_sd", "vpsde"] = Field(
        "discrete_sd", description="'discrete_sd': Stable Diffusion's 1000 steps; 'vpsde': continuous time, linear beta"
    )
    label_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of labels (or contexts) replaced by the null label (or empty context)"
    )
    null_label: int | None = Field(None, ge=0, description="the label that means 'no class'; needed for guidance")


class ValidationConfig(Section):
    """The loss on held-out samples, each at a noise and a timestep of its own that never change."""

    index: str = Field(description="path of the index of the held-out samples")
    samples: int = Field(1024, gt=0, description="samples used; at most those in the index")
    every: int = Field(1000, gt=0, description="steps between validations")
    batch_size: int = Field(64, gt=0, description="samples in one forward pass of a rank")


class AutoencoderConfig(Section):
    """The autoencoders: encoding and decoding ones may differ, as in the paper's H systems."""

    encoder: str = Field(description="path or URL of the encoding autoencoder")
    decoder: str = Field(description="path or URL of the decoding autoencoder")
    encoder_sha256: str | None = Field(None, description="hash of that file; a URL must have one")
    decoder_sha256: str | None = Field(None, description="hash of that file; a URL must have one")
    encoder_fingerprint: str | None = Field(None, description="hash of the encoder, where its file is not at hand")
    scale_factor: float = Field(gt=0, description="latents are multiplied by it: 1/std of the data set's latents")


class TextConfig(Section):
    """The text encoder of a text-conditional system."""

    encoder: str = Field(description="path or URL of CLIP's text tower, in open_clip's or Hugging Face's keys")
    encoder_sha256: str | None = Field(None, description="hash of that file; a URL must have one")
    tower: str | None = Field(
        None, description="open_clip's name of the model whose text tower that is; none: OpenAI's, padded with the end"
    )
    tokenizer: str | None = Field(
        None, description="local folder of Hugging Face's tokenizer, for a tower that needs one; none: that of encoder"
    )


class OptimizerConfig(Section):
    """AdamW with a constant rate after linear warm-up."""

    lr: float = Field(gt=0, description="learning rate after warm-up")
    betas: tuple[float, float] = Field((0.99, 0.99), description="Adam's decay rates of the moments")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.03, ge=0, description="decoupled weight decay, on every parameter")
    warmup_steps: int = Field(5000, ge=0, description="steps of linear warm-up; the first update has rate 0")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm; none: no clipping")

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        raise_broken([(all(0 <= b < 1 for b in self.betas), f"betas {list(self.betas)} must lie in [0, 1)")])
        return self


class EmaConfig(Section):
    """The exponential moving average of the weights, in fp32."""

    decay: float = Field(0.9999, ge=0, lt=1, description="decay at each step")
    warmup: bool = Field(False, description="decay min(decay, (1 + step) / (10 + step)): for short runs")


class TrainConfig(Section):
    """How long, and in which pieces."""

    steps: int = Field(gt=0, description="optimizer updates")
    global_batch_size: int = Field(gt=0, description="samples per update, over all ranks")
    micro_batch_size: int = Field(gt=0, description="samples per rank in one forward pass")
    precision: Literal["fp32", "bf16_autocast", "bf16"] = Field(
        "bf16_autocast",
        description="fp32; fp32 weights under bf16 autocast; or bf16 weights (and gradient sums) with fp32 masters",
    )
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    timestep_bins: int = Field(10, ge=0, description="parts of the time axis whose loss is logged apart; 0: none")
    init_from: str | None = Field(
        None, description="weights to start from where the run has no checkpoint: a run, a step of one, or an export"
    )
    deterministic: bool = Field(False, description="deterministic kernels on GPUs")
    trace: bool = Field(False, description="write every step's sample ids, timesteps, labels and noise to trace.jsonl")


class ZeroConfig(Section):
    """DeepSpeed's ZeRO: what is sharded over the ranks."""

    stage: Literal[0, 1, 2, 3] = Field(1, description="0 nothing; 1 optimizer; 2 and gradients; 3 and weights")
    bucket_size: int = Field(25_000_000, gt=0, description="elements in a bucket of gradients")
    overlap_comm: bool = Field(True, description="reduce gradients beside the backward pass (GPU only)")
    reduce_dtype: Literal["fp32", "bf16"] | None = Field(
        None,
        description="dtype in which ranks sum gradients: bf16 halves the bytes of fp32 gradients and rounds each sum "
        "to 8 bits; fp32 doubles those of bf16 gradients; none: that of the gradients",
    )


class CheckpointConfig(Section):
    """When the state is saved, and how much of it is kept."""

    every: int = Field(gt=0, description="steps between checkpoints")
    keep: int = Field(2, ge=2, description="newest checkpoints kept; at least two")
    keep_every: int | None = Field(
        None, gt=0, description="checkpoints of multiples of so many steps are kept for ever"
    )
    keep_best: int = Field(
        0, ge=0, description="checkpoints of the lowest validation losses kept, of steps with a validation"
    )
    keep_best_scores: int = Field(
        0, ge=0, description="checkpoints of the lowest FID (or Fréchet distance) kept, of those that were evaluated"
    )
    verify: Literal["size", "hash"] = Field("hash", description="what is checked of a checkpoint before it is loaded")
    background: bool = Field(True, description="write beside the training steps, which wait for a copy in memory alone")
    most_failures: int = Field(
        3,
        ge=0,
        description="saves in a row that may fail, for want of space say, before the run ends; 0: the first does",
    )
    copy_to: str | None = Field(
        None, description="URL or folder that each checkpoint is copied to, and resumed from where run_dir has none"
    )


class GuardConfig(Section):
    """What becomes of steps whose loss or gradient is not finite, and of losses that leap."""

    skip_nonfinite: int = Field(
        0, ge=0, description="steps in a row that may be skipped for a loss or gradient that is not finite; then, and "
        "with 0 at once, the run rolls back, or ends"
    )  # fmt: skip
    spike: float | None = Field(
        None, gt=0, description="a loss so many standard deviations above the mean of the last losses; none: any passes"
    )
    window: int = Field(100, gt=1, description="losses that the mean and deviation are taken of; fewer do not tell")
    rollbacks: int = Field(
        0, ge=0, description="times that a run may go back to the last checkpoint and pass over the data from there on"
    )


class SampleConfig(Section):
    """How images are generated."""

    solver: Literal["dpm_solver_pp", "dpm_solver", "euler_maruyama_sde", "euler_maruyama_ode"] = Field(
        "dpm_solver_pp",
        description="DPM-Solver++ (data prediction, steps uniform in t), DPM-Solver (noise prediction, steps uniform "
        "in logSNR), or Euler-Maruyama on the reverse SDE or the probability-flow ODE",
    )
    steps: int = Field(50, gt=1, description="calls of the network for each image")
    cfg_scale: float = Field(0.0, ge=0, description="s in cond + s * (cond - uncond); 0: no guidance")
    precision: Literal["fp32", "bf16_autocast"] = Field(
        "fp32",
        description="fp32 without TF32; or bf16 autocast of the network and, as the official code does it, fp16 "
        "autocast of the decoder; the solver's arithmetic is fp32 always",
    )


class LaunchConfig(Section):
    """Where the job runs."""

    target: Literal["local", "slurm"] = Field("local", description="processes on this machine, or a SLURM job")
    nodes: int = Field(1, gt=0, description="machines")
    spares: int = Field(
        0, ge=0, description="nodes beside those in a SLURM job of training, which wait until one is lost"
    )
    min_nodes: int | None = Field(
        None,
        gt=0,
        description="nodes that training goes on with, at least, where some are lost and no spare is left: the most of "
        "them whose ranks divide data.lanes; none: the job goes back to the queue",
    )
    processes_per_node: int = Field(gt=0, description="ranks on each machine, one for each GPU")
    timeout_s: float = Field(600.0, gt=0, description="seconds a collective may take before the ranks give up")
    cluster: str | None = Field(
        None, description="the cluster's profile, as those in slurm/; none: its defaults (launch.target slurm)"
    )
    attempts: int = Field(3, gt=0, description="failures in a row without a new checkpoint before a SLURM job gives up")
    silence_s: float = Field(60.0, gt=0, description="seconds without a heartbeat after which a rank is taken for lost")
    hang_s: float = Field(450.0, gt=0, description="seconds without progress after which a rank is taken for stuck")
    start_s: float = Field(1800.0, gt=0, description="the same while ranks start: imports, resuming, the first step")
    preflight: bool = Field(False, description="let the ranks of a SLURM job talk and be timed before they start")


class Config(Section):
    """The whole configuration."""

    run_dir: str = Field(description="directory of everything the run writes")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of initialisation, order, noise, timesteps and dropout")
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig
    precompute: PrecomputeConfig = PrecomputeConfig()
    storage: StorageConfig = StorageConfig()
    validation: ValidationConfig | None = Field(None, description="none: no validation loss")
    autoencoder: AutoencoderConfig | None = Field(None, description="none: the network is trained on pixels")
    text: TextConfig | None = Field(None, description="needed where model.clip_dim is set")
    optimizer: OptimizerConfig
    ema: EmaConfig = EmaConfig()
    train: TrainConfig
    zero: ZeroConfig = ZeroConfig()
    speed: SpeedConfig = SpeedConfig()
    profile: ProfileConfig = ProfileConfig()
    checkpoint: CheckpointConfig
    guard: GuardConfig = GuardConfig()
    stragglers: StragglersConfig = StragglersConfig()
    attribution: AttributionConfig = AttributionConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig
    launch: LaunchConfig

    @property
    def world_size(self) -> int:
        """Number of ranks that the launch section asks for."""
        return self.launch.nodes * self.launch.processes_per_node

    @model_validator(mode="after")
    def _check(self) -> Config:
        raise_broken(rules_between({name: getattr(self, name) for name in type(self).model_fields}))
        return self


def config_hash(section: BaseModel) -> str:
    """sha256 of a section's values, 16 hexadecimal digits."""
    return hashlib.sha256(section.model_dump_json().encode()).hexdigest()[:16]
