"""The rules between the sections of a configuration. Each takes the sections by name and gives (holds, message)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

Rule = tuple[bool, str]
"""(whether it holds, what to say if not)"""


def raise_broken(rules: Sequence[Rule]) -> None:
    """Raises ``ValueError`` with the messages of all rules that do not hold, a line each."""
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def rules_between(sections: Mapping[str, Any]) -> list[Rule]:
    """The rules that concern several sections, as (holds, message): those whose sections are all given."""
    rules: list[Rule] = []
    groups = (
        _space_rules,
        _text_rules,
        _label_rules,
        _sampling_rules,
        _precision_rules,
        _graph_rules,
        _attribution_rules,
        _profile_rules,
        _path_rules,
        _launch_rules,
        _node_loss_rules,
    )
    for group in groups:
        with contextlib.suppress(KeyError):
            rules += group(sections)
    return rules


def _space_rules(sections: Mapping[str, Any]) -> list[Rule]:
    model, data, autoencoder = sections["model"], sections["data"], sections["autoencoder"]
    pixels = data.space == "pixels"
    return [
        (
            pixels == (autoencoder is None),
            "autoencoder: data.space pixels has none" if pixels else "autoencoder: missing; latents need it",
        ),
        (
            not pixels or (model.in_chans, model.img_size) == (3, data.image_size),
            f"model.in_chans {model.in_chans} and model.img_size {model.img_size} must be 3 and data.image_size "
            f"{data.image_size}, the shape of the pixels",
        ),
        (
            (model.clip_dim is None) == (sections["text"] is None),
            "text: missing; model.clip_dim needs it" if model.clip_dim else "text: needs model.clip_dim",
        ),
        (
            model.clip_dim is None or data.format in ("coco", "webdataset"),
            f"data.format {data.format} has no captions; model.clip_dim needs those of data.format coco or webdataset",
        ),
    ]


def _text_rules(sections: Mapping[str, Any]) -> list[Rule]:
    text = sections["text"]
    return [
        (
            text is None or text.tokenizer is None or text.tower is not None,
            "text.tokenizer: needs text.tower; without it the tower is OpenAI's, whose tokenizer is built in",
        ),
    ]


def _label_rules(sections: Mapping[str, Any]) -> list[Rule]:
    model, diffusion, sample = sections["model"], sections["diffusion"], sections["sample"]
    null, last, text = diffusion.null_label, model.num_classes - 1, model.clip_dim is not None
    return [
        (
            null is None or (null == last and null > 0),
            f"diffusion.null_label {null} must be the last label, {last} = model.num_classes - 1"
            if model.num_classes > 0
            else f"diffusion.null_label {null}: the model has no labels (model.num_classes {model.num_classes})",
        ),
        (
            diffusion.label_dropout == 0 or null is not None or text,
            f"diffusion.label_dropout {diffusion.label_dropout} needs diffusion.null_label",
        ),
        (
            sample.cfg_scale == 0 or null is not None or text,
            f"sample.cfg_scale {sample.cfg_scale} needs diffusion.null_label",
        ),
    ]


def _sampling_rules(sections: Mapping[str, Any]) -> list[Rule]:
    solver, schedule = sections["sample"].solver, sections["diffusion"].schedule
    evaluate, model = sections["evaluate"], sections["model"]
    return [
        (
            not solver.startswith("euler_maruyama") or schedule == "vpsde",
            f"sample.solver {solver} needs diffusion.schedule vpsde, not {schedule}",
        ),
        (
            evaluate.labels == "uniform" or model.num_classes > 0,
            f"evaluate.labels {evaluate.labels}: the model has no labels (model.num_classes {model.num_classes})",
        ),
        (
            "clip_score" not in evaluate.asked or model.clip_dim is not None,
            "evaluate.scores: clip_score needs captions, and the model is not text-conditional (model.clip_dim)",
        ),
    ]


def _precision_rules(sections: Mapping[str, Any]) -> list[Rule]:
    return [
        (
            sections["train"].precision != "bf16" or sections["zero"].stage > 0,
            "train.precision bf16 needs zero.stage 1, 2 or 3, which keep its fp32 master weights",
        ),
    ]


def _graph_rules(sections: Mapping[str, Any]) -> list[Rule]:
    graphs, stage, train = sections["speed"].cuda_graphs, sections["zero"].stage, sections["train"]
    world = sections["launch"].nodes * sections["launch"].processes_per_node
    return [
        (
            not graphs or stage in (1, 2),
            f"speed.cuda_graphs needs zero.stage 1 or 2, not {stage}: a graph wants weights that stay in their place "
            "(stage 3 moves them) and gradients that are taken away (stage 0 leaves them)",
        ),
        (
            not graphs or stage == 2 or train.global_batch_size <= world * train.micro_batch_size,
            "speed.cuda_graphs needs zero.stage 2 where a rank's batch is several micro-batches "
            f"(train.global_batch_size {train.global_batch_size}, {world} ranks, train.micro_batch_size "
            f"{train.micro_batch_size}): stage 1 leaves gradients until the last of them; or make it one",
        ),
        (
            not graphs or sections["model"].use_checkpoint is not True,
            "speed.cuda_graphs: with model.use_checkpoint true a block runs again before its first results are used up;"
            " set it to selective or false",
        ),
    ]


def _attribution_rules(sections: Mapping[str, Any]) -> list[Rule]:
    rules, stage = sections["attribution"], sections["zero"].stage
    return [
        (
            not rules.replay or sections["train"].deterministic,
            "attribution.replay needs train.deterministic true: without it sound hardware gives two results as well",
        ),
        (
            not (rules.replay and sections["speed"].cuda_graphs),
            "attribution.replay needs speed.cuda_graphs false: a pass that records a graph may compute otherwise",
        ),
        (rules.replay or rules.replay_every is None, "attribution.replay_every needs attribution.replay true"),
        (
            rules.weights_every is None or stage != 3,
            "attribution.weights_every: at zero.stage 3 ranks have no weights in common; set it to null",
        ),
    ]


def _profile_rules(sections: Mapping[str, Any]) -> list[Rule]:
    profile, steps, launch = sections["profile"], sections["train"].steps, sections["launch"]
    world_size = launch.nodes * launch.processes_per_node
    return [
        (
            profile.span is None or profile.span[1] <= steps,
            f"profile.steps {profile.steps} must end within train.steps {steps}",
        ),
        (
            profile.span is None or all(rank < world_size for rank in profile.ranks),
            f"profile.ranks {profile.ranks}: launch has the ranks 0 to {world_size - 1}",
        ),
    ]


def _path_rules(sections: Mapping[str, Any]) -> list[Rule]:
    return [("://" not in sections["run_dir"], f"run_dir {sections['run_dir']} must be a local path, not a URL")]


def _launch_rules(sections: Mapping[str, Any]) -> list[Rule]:
    launch, storage = sections["launch"], sections["storage"]
    return [
        (
            storage.retry_s < launch.timeout_s,
            f"storage.retry_s {storage.retry_s:g} must be less than launch.timeout_s {launch.timeout_s:g}: while one "
            "rank retries, the others wait for it in a collective",
        ),
        (
            launch.target != "slurm" or storage.retry_s < launch.hang_s,
            f"storage.retry_s {storage.retry_s:g} must be less than launch.hang_s {launch.hang_s:g}: a rank that still "
            "retries would be taken for stuck",
        ),
        (
            launch.target != "local" or launch.nodes == 1,
            f"launch.nodes {launch.nodes}: launch.target local is this machine alone; set launch.nodes 1",
        ),
        (
            launch.target != "local" or launch.spares == 0,
            f"launch.spares {launch.spares}: launch.target local has no other nodes; set launch.spares 0",
        ),
        *batch_rules(sections["train"], sections["data"], launch.nodes * launch.processes_per_node),
    ]


def _node_loss_rules(sections: Mapping[str, Any]) -> list[Rule]:
    launch, lanes = sections["launch"], sections["data"].lanes
    least = launch.nodes if launch.min_nodes is None else launch.min_nodes
    return [
        (
            least <= launch.nodes,
            f"launch.min_nodes {least} must be at most launch.nodes {launch.nodes}; lower it, or leave it out",
        ),
        (
            least >= launch.nodes or bool(smaller_node_counts(sections)),
            f"launch.min_nodes {least}: no number of nodes from {least} to {launch.nodes - 1} will do: their ranks, "
            f"{launch.processes_per_node} each, must divide data.lanes {lanes} (and keep the rules of "
            "speed.cuda_graphs); lower it, or leave it out",
        ),
    ]


def smaller_node_counts(sections: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of nodes that a training may shrink to, the largest first: from below launch.nodes to launch.min_nodes,
    those on which its ranks divide data.lanes, and what else depends on their number holds."""
    launch, found = sections["launch"], []
    for nodes in range(launch.nodes - 1, (launch.nodes if launch.min_nodes is None else launch.min_nodes) - 1, -1):
        smaller = {**sections, "launch": launch.model_copy(update={"nodes": nodes})}
        rules = batch_rules(sections["train"], sections["data"], nodes * launch.processes_per_node)
        if all(holds for holds, _ in [*rules, *_graph_rules(smaller)]):
            found.append(nodes)
    return tuple(found)


def batch_rules(train: Any, data: Any, world_size: int) -> list[Rule]:
    """The batch arithmetic as (holds, message): the batch over lanes and ranks."""
    batch, lanes = train.global_batch_size, data.lanes
    divisors = [n for n in range(1, lanes + 1) if lanes % n == 0]
    return [
        (batch % lanes == 0, f"train.global_batch_size {batch} must be divisible by data.lanes {lanes}"),
        (
            lanes % world_size == 0,
            f"launch: {world_size} ranks must divide data.lanes {lanes}; valid numbers of ranks: {divisors}",
        ),
    ]


def micro_batch_size(train: Any, world_size: int) -> int:
    """Samples of a rank in one forward pass: the most up to train.micro_batch_size that a rank's batch is cut into.

    So a run goes on as it is on another number of ranks.
    """
    own = train.global_batch_size // world_size
    return max(size for size in range(1, min(train.micro_batch_size, own) + 1) if own % size == 0)
