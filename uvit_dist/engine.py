"""The training engine over DeepSpeed: step, gradient norm, fp32 masters, EMA under ZeRO 0–3, state in and out.

The one module that knows DeepSpeed, but for ``gradient_sums``, which takes the place of a part of it. Its fp32 master
weights and Adam's moments are reached as *fragments*: runs of a parameter that this rank owns. Fragments of all ranks
tile every parameter exactly, so that a state saved on any number of ranks at any stage can be loaded on any other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from uvit_dist import dist, gradient_sums
from uvit_dist.acceleration import attention_kernel, begin_graphs, compile_blocks
from uvit_dist.config import Config
from uvit_dist.config_rules import micro_batch_size
from uvit_dist.dist import Ranks
from uvit_dist.ema import ema_decay_at, ema_update_
from uvit_dist.errors import CheckpointError
from uvit_dist.host_memory import use_huge_pages
from uvit_dist.replay import Replay
from uvit_dist.stragglers import ForwardClock

log = logging.getLogger(__name__)
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
"""What is kept of every parameter, all fp32: master weight, Adam's two moments, EMA."""

Source = Callable[[str, str, int, int], Tensor]
"""(kind, parameter name, first element, number of elements) → flat fp32 tensor."""


@dataclass(frozen=True)
class Fragment:
    """``numel`` elements of a flattened parameter from ``start``, at ``offset`` of a flat master tensor."""

    name: str
    start: int
    numel: int
    master: int
    offset: int


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the global batch; grad_norm: of the averaged gradient, before clipping; lr: of this update.

    flags: of each flag, whether any rank raised it; applied: whether the update was made; own_loss: the mean over this
    rank's part of the batch, all else being the same on all ranks.
    """

    loss: float
    grad_norm: float
    lr: float
    flags: tuple[bool, ...]
    applied: bool
    own_loss: float


class _Autocast(nn.Module):
    """The network under bf16 autocast, entered inside the module, where DeepSpeed leaves it alone."""

    def __init__(self, net: nn.Module, device_type: str, enabled: bool) -> None:
        super().__init__()
        self.net, self.device_type, self.enabled = net, device_type, enabled

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # Without its cache autocast keeps no bf16 copy of a weight beyond its use, which ZeRO-3 relies on.
        autocast = torch.autocast(self.device_type, torch.bfloat16, cache_enabled=False)
        with autocast if self.enabled else nullcontext():
            return self.net(*args, **kwargs)


def learning_rate(step: int, lr: float, warmup_steps: int) -> float:
    """min(step / warmup, 1) * lr: the rate of the update number ``step``, from 0 (official code)."""
    return lr * min(step / warmup_steps, 1.0) if warmup_steps else lr


class Engine:
    """Trains a network with AdamW under DeepSpeed ZeRO. ``step`` counts the updates made.

    After construction every rank holds the same weights, and the EMA equals them. Raises what DeepSpeed raises, and
    ``ConfigError`` where the device cannot do what ``speed`` asks for.
    """

    def __init__(self, net: nn.Module, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks, self.step = config, ranks, 0
        self._micro_batch = micro_batch_size(config.train, ranks.world_size)
        self._micro_batches = config.train.global_batch_size // (self._micro_batch * ranks.world_size)
        if self._micro_batch != config.train.micro_batch_size:
            log.info("micro-batches of %d: train.micro_batch_size %d does not divide a rank's batch",
                     self._micro_batch, config.train.micro_batch_size)  # fmt: skip
        self._attention = attention_kernel(config, ranks.device)
        compile_blocks(net := net.to(ranks.device), config.speed, ranks.device)
        self._shapes = {name: p.shape for name, p in net.named_parameters()}
        initial = {name: p.detach().clone().flatten() for name, p in net.named_parameters()}
        wrapped = _Autocast(net, ranks.device.type, config.train.precision == "bf16_autocast")
        optimizer = torch.optim.AdamW(
            wrapped.parameters(),
            lr=0.0,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            # The CPU's fused kernel rounds the tail of a tensor otherwise: results would depend on how it is cut.
            fused=ranks.device.type == "cuda",
        )
        # Its CPU shared-memory collective is compiled at first use, into a cache that all processes share.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._ds, *_ = deepspeed.initialize(
            model=wrapped, optimizer=optimizer, config=self._deepspeed_config(), dist_init_required=False
        )
        if ranks.world_size == 1 and config.zero.stage == 0:
            self._ds.enable_backward_allreduce = False  # it copies all gradients together and back
        elif ranks.world_size > 1 and config.zero.stage in (1, 2):
            gradient_sums.send_to_owners(self._ds.optimizer, ranks)
        self._names = {p: name.removeprefix("net.") for name, p in self._ds.module.named_parameters()}
        self.checks = Replay(self._ds, list(self._names), config.zero.stage, self._micro_batches)
        self.clock = ForwardClock(ranks.device)
        if config.zero.stage == 3:
            for waiting in ("fetch_sub_module", "reset_step"):  # the latter compares what ranks do, at first
                self.clock.leave_out(self._ds.optimizer.parameter_offload.get_param_coordinator(), waiting)
        self._base: torch.optim.Optimizer = getattr(self._ds.optimizer, "optimizer", self._ds.optimizer)
        self._masters = self._find_masters()
        self.fragments = tuple(self._find_fragments())
        self._ema = [master.detach().clone() for master in self._masters]
        self._create_adam_state()
        use_huge_pages(self._flat(kind, master) for kind in KINDS for master in range(len(self._masters)))
        zeros = {name: torch.zeros_like(value) for name, value in initial.items()}
        start = {"master": initial, "ema": initial, "exp_avg": zeros, "exp_avg_sq": zeros}
        # Under bf16, DeepSpeed's masters start from rounded weights: put the unrounded ones there.
        self.load_state(lambda kind, name, first, n: start[kind][name][first : first + n], step=0)

    def _deepspeed_config(self) -> dict[str, Any]:
        train, zero = self.config.train, self.config.zero
        return {
            "train_batch_size": train.global_batch_size,
            "train_micro_batch_size_per_gpu": self._micro_batch,
            "gradient_accumulation_steps": self._micro_batches,
            "gradient_clipping": self.config.optimizer.clip_grad_norm or 0.0,
            # Whether gradients are finite is known before DeepSpeed is asked for an update: see _agree.
            "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": False},
            "communication_data_type": zero.reduce_dtype,
            "zero_optimization": {
                "stage": zero.stage,
                # For it DeepSpeed waits for the device at the end of a backward pass; one rank has nothing to overlap.
                "overlap_comm": zero.overlap_comm and self.ranks.device.type == "cuda" and self.ranks.world_size > 1,
                "contiguous_gradients": True,
                "reduce_bucket_size": zero.bucket_size,
                "allgather_bucket_size": zero.bucket_size,
                "stage3_prefetch_bucket_size": zero.bucket_size,
                # A norm of its own, for which the host would wait a second time, is needed for clipping alone.
                "compute_grad_norm": zero.stage in (0, 3) or self.config.optimizer.clip_grad_norm is not None,
                # This option would replace torch.nn.functional.linear for the whole process.
                "memory_efficient_linear": False,
            },
            "steps_per_print": 2**62,
            "wall_clock_breakdown": False,
        }

    # -- one update -----------------------------------------------------------------------------------------------

    def train_step(
        self,
        micro_batches: Sequence[Any],
        loss_of: Callable[[nn.Module, Any], Tensor],
        admit: Callable[[float, float], bool],
        flags: Sequence[bool] = (),
    ) -> StepResult:
        """One optimizer update over this rank's micro-batches, then the EMA.

        loss_of(network, micro_batch) is the mean loss, a scalar; admit(loss, gradient norm): whether the update is
        made, the same on every rank, False where one of the two is not finite; flags: things to tell all ranks (a
        signal, say), as many on each. Every rank learns the same loss, gradient norm and flags, by one collective.
        Without the update all is as if the step had never been.
        """
        assert len(micro_batches) == self._micro_batches
        lr = learning_rate(self.step, self.config.optimizer.lr, self.config.optimizer.warmup_steps)
        for group in self._base.param_groups:
            group["lr"] = lr
        self._ds.train()
        losses = []
        with self._attention():
            for number, micro_batch in enumerate(micro_batches):
                begin_graphs(self.config.speed)
                with record_function("forward"), self.clock.forward():
                    loss = loss_of(self._ds, micro_batch)
                with record_function("backward"):
                    self._ds.backward(loss)
                losses.append(loss.detach().float())
                if number < len(micro_batches) - 1:
                    self._ds.step()  # not yet an update: it counts micro-batches
        with record_function("agree"):
            loss_mean, grad_norm, raised, own_loss = self._agree(torch.stack(losses).mean(), flags)
        self.clock.step_over()
        applied = admit(loss_mean, grad_norm)
        with record_function("update"):
            if applied:
                self._update()
            else:
                self._discard_gradients()
        return StepResult(loss_mean, grad_norm, lr, raised, applied, own_loss)

    def _update(self) -> None:
        """AdamW, then the EMA."""
        self._ds.step()
        assert self._ds.was_step_applied(), "DeepSpeed skipped an update that was admitted"
        decay = ema_decay_at(self.step, self.config.ema.decay, self.config.ema.warmup)
        ema_update_(self._ema, self._masters, decay)
        self.step += 1

    def _discard_gradients(self) -> None:
        """Drop what was accumulated, and begin an update anew.

        Under ZeRO by DeepSpeed's own path for a gradient that is not finite, which leaves its counters and buffers as
        after any update: this gradient is made such a one.
        """
        if self.config.zero.stage == 0:  # here DeepSpeed has no such path
            self._ds.zero_grad()
            self._ds.micro_steps += 1
            return
        gradients, optimizer = self._local_gradients(), self._ds.optimizer
        for gradient in gradients:
            gradient.fill_(math.nan)
        optimizer.check_grad_overflow = True
        self._ds.step()
        optimizer.check_grad_overflow = False
        assert not self._ds.was_step_applied(), "DeepSpeed made an update that was not admitted"
        for gradient in gradients:
            gradient.zero_()  # under ZeRO-3 these are buffers, whose padding nothing else would write

    def replay(self, passes: Callable[[nn.Module], Iterator[Tensor]]) -> None:
        """As ``Replay.run``: the passes of a step before its update, each a scalar loss, for ``checks`` alone."""

        def begun(net: nn.Module) -> Iterator[Tensor]:
            begin_graphs(self.config.speed)
            for loss in passes(net):
                yield loss
                begin_graphs(self.config.speed)

        with self._attention():
            self.checks.run(begun)

    @torch.no_grad()
    def forward_only(self, compute: Callable[[nn.Module], Any]) -> Any:
        """compute(network) without gradients; under ZeRO-3 every rank must call the network equally often."""
        self._ds.eval()
        begin_graphs(self.config.speed)
        with self._attention():
            return compute(self._ds)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The network computes with the EMA inside; afterwards all is as it was, bit for bit. A collective call."""
        kept = [master.detach().clone() for master in self._masters]
        try:
            for master, average in zip(self._masters, self._ema, strict=True):
                master.data.copy_(average)
            self.refresh_weights()
            yield
        finally:
            for master, value in zip(self._masters, kept, strict=True):
                master.data.copy_(value)
            self.refresh_weights()

    def _agree(self, loss: Tensor, flags: Sequence[bool]) -> tuple[float, float, tuple[bool, ...], float]:
        """Mean loss, gradient norm, of each flag whether it is up on any rank, and this rank's own loss.

        Here the host waits for the device, once in a step: whether the update is made is decided by numbers.
        """
        squares = [g.float().square().sum() for g in self._local_gradients()]  # torch's norms are 3e-5 off on CPUs
        norm_square = torch.stack(squares).sum() if squares else loss.new_zeros(())
        if self.config.zero.stage == 0:  # every rank holds all of the gradient
            norm_square = norm_square / self.ranks.world_size
        raised = [loss.new_full((), float(flag)) for flag in flags]  # filled on the device, not copied to it
        told = dist.sum_(torch.stack([loss / self.ranks.world_size, norm_square, *raised]))
        mean, total, *counts, own_loss = torch.cat([told, loss[None]]).tolist()
        return mean, math.sqrt(total) if total >= 0 else math.nan, tuple(count > 0 for count in counts), own_loss

    def _local_gradients(self) -> list[Tensor]:
        """The averaged gradients that this rank owns (at stage 0 all of them)."""
        if self.config.zero.stage == 0:
            return [p.grad for p in self._ds.module.parameters() if p.grad is not None]
        return [g for group in self._ds.optimizer.averaged_gradients.values() if group for g in group if g is not None]

    # -- where the state lives ------------------------------------------------------------------------------------

    def _find_masters(self) -> list[Tensor]:
        """Flat fp32 master tensors of this rank."""
        stage, optimizer = self.config.zero.stage, self._ds.optimizer
        if stage == 0:
            return [p.data.view(-1) for p in self._names]
        if stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def _find_fragments(self) -> Iterator[Fragment]:
        stage, optimizer = self.config.zero.stage, self._ds.optimizer
        if stage == 0:
            for master, (p, name) in enumerate(self._names.items()):
                yield Fragment(name, 0, p.numel(), master, 0)
        elif stage == 3:
            for group in optimizer.fp16_groups:
                for p in group:
                    master, offset, padded = optimizer.grad_position[optimizer.get_param_id(p)]
                    start = optimizer._get_param_partition_rank(p) * padded
                    numel = min(padded, p.ds_numel - start)  # the rest of the last ranks' shard is padding
                    if numel > 0:
                        yield Fragment(self._names[p], start, numel, master, offset)
        else:
            for master, group in enumerate(optimizer.bit16_groups):
                for p in group:
                    if p._hp_mapping is not None:
                        high, low = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                        yield Fragment(self._names[p], low.start, low.numel, master, high.start)

    def _stepped(self) -> list[Any]:
        """The tensors that AdamW steps, in the order of the masters: the keys of its state."""
        return (
            [p for group in self._base.param_groups for p in group["params"]]
            if self.config.zero.stage == 0
            else self._masters
        )

    def _create_adam_state(self) -> None:
        """Adam's state does not exist before its first step; without it there is nothing to load into."""
        fused = self.ranks.device.type == "cuda"
        for key in self._stepped():
            state = self._base.state[key]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=key.device if fused else "cpu")
                state["exp_avg"] = torch.zeros_like(key, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(key, dtype=torch.float32)

    def _flat(self, kind: str, master: int) -> Tensor:
        if kind == "master":
            return self._masters[master].data.view(-1)
        if kind == "ema":
            return self._ema[master].view(-1)
        return self._base.state[self._stepped()[master]][kind].view(-1)

    def _view(self, kind: str, fragment: Fragment) -> Tensor:
        return self._flat(kind, fragment.master)[fragment.offset : fragment.offset + fragment.numel]

    # -- state in and out -----------------------------------------------------------------------------------------

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every parameter by name."""
        return self._shapes

    def local_state(self) -> dict[str, Tensor]:
        """What this rank has to save: "kind/name/start" → flat fp32 tensor (views, not copies).

        Together the ranks' states hold every element once; at stage 0 rank 0 holds them all.
        """
        if self.config.zero.stage == 0 and not self.ranks.is_main:
            return {}
        return {f"{kind}/{f.name}/{f.start}": self._view(kind, f) for kind in KINDS for f in self.fragments}

    @torch.no_grad()
    def load_state(self, source: Source, step: int) -> None:
        """Take the state of update number ``step`` from ``source``, in place, exactly. A collective call.

        Raises ``CheckpointError`` on every rank where ``source`` fails on any.
        """
        problem = None
        try:
            for kind in KINDS:
                for fragment in self.fragments:
                    self._view(kind, fragment).copy_(source(kind, fragment.name, fragment.start, fragment.numel))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            problem = f"rank {self.ranks.rank}: {error}"
        problems = [told for told in dist.gather(problem) if told is not None]
        if problems:
            raise CheckpointError("the state cannot be loaded: " + "; ".join(problems) + "; use another checkpoint")
        for key in self._stepped():
            self._base.state[key]["step"].fill_(float(step))
        self.step = step
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Bring the parameters that the network computes with in line with the masters. A collective call."""
        stage, optimizer = self.config.zero.stage, self._ds.optimizer
        if stage in (1, 2):
            optimizer.update_lp_params()
        elif stage == 3:
            optimizer._partition_all_parameters()
            for group in range(len(self._masters)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
