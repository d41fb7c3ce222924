"""The model card of exported weights: what they are, how they were trained, how they score, where that comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

SCORES = {
    "fid": "FID", "adm_fid": "FID (ADM)", "sfid": "sFID", "inception_score": "Inception Score",
    "precision": "precision", "recall": "recall", "kid": "KID", "clip_score": "CLIP score",
    "frechet_distance": "Fréchet distance", "class_accuracy": "accuracy of the classes",
}  # fmt: skip
"""What a record of ``score_log`` may hold."""
PAPER = "https://arxiv.org/abs/2209.12152"
Row = tuple[object, ...]


def model_card(manifest: Mapping[str, Any], kind: str, scores: Sequence[Mapping[str, Any]], name: str) -> str:
    """Markdown with the header that the Hugging Face Hub reads.

    manifest: of the checkpoint; scores: records of ``score_log`` of these weights, the latest last; name: of the model.
    """
    config = manifest["config"]
    model = {key: value for key, value in config["model"].items() if key != "use_checkpoint"}
    asked = "count=4" if model["num_classes"] <= 0 else "labels=[0, 1]"
    if model["clip_dim"] is not None:
        asked = 'prompts=["A green train."]'
    how = "" if kind == "ema" else f', weights="{kind}"'
    if config.get("autoencoder"):
        how += ', "autoencoder.decoder=PATH"'
    lines = [
        f"---\n{_header(config, scores, name).to_yaml()}\n---",
        f"# {name}\n",
        f"A U-ViT ([All are Worth Words]({PAPER})) trained by `uvit_dist`.\n",
        "```python\nfrom uvit_dist import UViTPipeline\n",
        f'pipe = UViTPipeline.from_pretrained("{name}"{how})\nimages = pipe({asked}, seed=0)\n```\n',
        "## Training\n",
        *_table(("What", "Value"), _training(manifest, kind)),
        "\n## Scores\n",
        *_scores(scores),
        f"\n## Network\n\n```json\n{json.dumps(model, indent=1)}\n```\n",
    ]
    return "\n".join(lines)


def _header(config: Mapping[str, Any], scores: Sequence[Mapping[str, Any]], name: str) -> ModelCardData:
    task = "unconditional-image-generation" if config["model"]["clip_dim"] is None else "text-to-image"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=str(config["data"]["format"]),
            dataset_name=_data_name(config["data"]),
            metric_type=key,
            metric_value=value,
        )
        for record in scores
        for key, value in _values(record)
    ]
    header = {"library_name": "uvit_dist", "pipeline_tag": task, "tags": ["u-vit", "diffusion"]}
    return ModelCardData(**header, **({"model_name": name, "eval_results": results} if results else {}))  # type: ignore[arg-type]


def _training(manifest: Mapping[str, Any], kind: str) -> list[Row]:
    config, step = manifest["config"], int(manifest["step"])
    data, train, optimizer = config["data"], config["train"], config["optimizer"]
    batch, versions = train["global_batch_size"], manifest.get("versions", {})
    rows: list[Row] = [
        ("weights", f"{'their exponential moving average' if kind == 'ema' else 'as optimized'}, fp32"),
        ("steps", f"{step:,} of {batch:,} samples: {step * batch:,} samples"),
        ("data", _data_name(data)),
        ("images", f"{data['image_size']} pixels, crop {data['crop']}, {'' if data['mirror'] else 'not '}mirrored"),
        ("index of the data, sha256", manifest.get("must_agree", {}).get("sha256 of data.index", "not known")),
        ("noise schedule", config["diffusion"]["schedule"]),
        ("label dropout", config["diffusion"]["label_dropout"]),
        ("precision", train["precision"]),
        ("AdamW", ", ".join(f"{key} {optimizer[key]}" for key in ("lr", "betas", "weight_decay", "warmup_steps"))),
        ("decay of the average", config["ema"]["decay"]),
        ("seed", config["seed"]),
        ("trained with", ", ".join(f"{key} {value}" for key, value in versions.items()) or "not known"),
    ]
    if config.get("autoencoder"):
        section = config["autoencoder"]
        rows.append(
            (
                "decoder",
                f"{Path(section['decoder']).name.partition('?')[0]}, sha256 {section['decoder_sha256'] or 'not given'}",
            )
        )
        rows.append(("scale of the latents", section["scale_factor"]))
    if manifest.get("text_encoder"):
        rows.append(("text encoder, fingerprint", manifest["text_encoder"]))
    return rows


def _values(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [(key, round(float(record[key]), 6)) for key in SCORES if record.get(key) is not None]


def _data_name(data: Mapping[str, Any]) -> str:
    return f"{data['format']}, {data['split']}"


def _table(head: Row, rows: Sequence[Row]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]


def _scores(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    settings = ("samples", "solver", "solver_steps", "cfg_scale", "labels", "sample_precision", "protocol")
    rows: list[Row] = []
    for record in scores:
        how = [record.get(setting) for setting in settings]
        how.append(str(record.get("reference_sha256"))[:12])
        rows += [(SCORES[key], f"{value:g}", *how) for key, value in _values(record)]
    if not rows:
        return ["No evaluation of these weights is on record: `python -m uvit_dist.launch --job evaluate`."]
    head = (
        "Score",
        "Value",
        "images",
        "sampler",
        "steps",
        "guidance",
        "asked for",
        "precision",
        "protocol",
        "reference",
    )
    return _table(head, rows)
