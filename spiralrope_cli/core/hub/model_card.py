"""The model card beside exported weights: Hugging Face front matter, figures, how to load them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.runtime.run_folder import EVAL_FILE

METRICS = {"acc1": "acc@1", "acc5": "acc@5"}
# Licences of weights are their owners' to give.
LICENSE = "unknown"


def eval_rows(folders: list[Path], sha256: str, ema: bool) -> list[dict[str, Any]]:
    """What `eval` measured of one set of weights of one file.

    Args:
        folders: where an `eval.json` may lie.
        sha256: of the file that holds the weights; rows of other files are left out.
        ema: whether rows of the averaged or of the raw weights count.

    Raises:
        CheckpointError: an `eval.json` that cannot be read.
    """
    found: list[dict[str, Any]] = []
    for path in dict.fromkeys(folder / EVAL_FILE for folder in folders):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
            rows = content["rows"] if isinstance(content, dict) else content
            found += [
                row
                for row in rows
                if row["sha256"] == sha256 and ("ema" in str(row["weights"]).lower()) == ema
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}", "evaluate again, or move it away"
            ) from error
    return found


def model_card(
    name: str,
    summary: str,
    arch: str,
    rope: RopeConfig,
    sizes: dict[str, Any],
    data: str,
    rows: list[dict[str, Any]],
) -> str:
    """README.md of a folder of weights.

    Args:
        name: of the model.
        summary: what the weights are, in a line.
        arch: `--arch`.
        rope: options of the rotary embedding.
        sizes: further arguments of `create_model`.
        data: the training set, empty where unknown.
        rows: of `eval.json`.
    """
    front = _front_matter(name, arch, data, rows)
    use = "dit-sample" if is_dit(arch) else "eval"
    parts = [
        f"---\n{front}\n---",
        f"# {name}",
        f"{summary[:1].upper()}{summary[1:]}. Written by `spiralrope export`; sizes and RoPE "
        "options lie in the metadata of `model.safetensors`, and in `config.yaml` to be read.",
        "Spiral RoPE: rotary position embedding in many directions, "
        "[arXiv 2602.03227](https://arxiv.org/abs/2602.03227).",
    ]
    if rows:
        parts += ["## Figures", _figures(rows)]
    parts += [
        "## Model",
        _table([("option", "value"), ("arch", arch), *_plain(sizes)]),
        "## Spiral RoPE",
        _table([("option", "value"), *_plain(dataclasses.asdict(rope))]),
        "## Use",
        "```python\nfrom spiralrope_cli import load_model\n\n"
        f'model = load_model("{name}")  # this folder\n```',
        f"```\nspiralrope {use} {name}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(name: str, arch: str, data: str, rows: list[dict[str, Any]]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=_data(row),
            dataset_name=_data(row),
            metric_type="accuracy",
            metric_name=f"{label}, {_pixels(row['image_size'])} px, crop {row['crop_ratio']}",
            metric_value=row[key],
        )
        for row in rows
        for key, label in METRICS.items()
    ]
    task = "class-conditional-image-generation" if is_dit(arch) else "image-classification"
    return ModelCardData(
        license=LICENSE,
        library_name="spiralrope",
        tags=["spiral-rope", "rotary-position-embedding", task, "arxiv:2602.03227"],
        pipeline_tag=None if is_dit(arch) else task,
        datasets=[data] if data else None,
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _figures(rows: list[dict[str, Any]]) -> str:
    head = ("data", "pixels", "crop ratio", "acc@1 %", "acc@5 %", "loss", "images")
    lines = [
        (
            *(_data(row), _pixels(row["image_size"]), row["crop_ratio"]),
            *(f"{row['acc1']:.2f}", f"{row['acc5']:.2f}", f"{row['loss']:.4f}", row["count"]),
        )
        for row in rows
    ]
    return _table([head, *lines])


def _data(row: dict[str, Any]) -> str:
    """The data set's name; where a folder lies means nothing elsewhere."""
    return Path(row["data"]).name


def _pixels(size: Any) -> str:
    sides = list(size) if isinstance(size, (list, tuple)) else [size]
    return "x".join(map(str, dict.fromkeys(sides) if len(set(sides)) == 1 else sides))


def _plain(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, _pixels(value) if isinstance(value, (list, tuple)) else str(value))
        for name, value in values.items()
    ]


def _table(rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
