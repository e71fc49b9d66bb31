"""The model card beside exported weights, by huggingface_hub from a template."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.models import format_size, is_dit
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.runtime.run_folder import EVAL_FILE, read_rows

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
METRICS = {"acc1": "acc@1", "acc5": "acc@5"}


def eval_rows(folders: list[Path], sha256: str, ema: bool) -> list[dict[str, Any]]:
    """The rows of every `eval.json` in some folders that are of one set of weights of one file.

    Raises:
        CheckpointError: an `eval.json` that cannot be read.
    """
    return [
        row
        for path in dict.fromkeys(folder / EVAL_FILE for folder in folders)
        for row in read_rows(path, strict=True)
        if row.get("sha256") == sha256 and row.get("weights") == ("EMA" if ema else "raw")
    ]


def model_card(
    name: str,
    summary: str,
    arch: str,
    rope: RopeConfig,
    options: dict[str, Any],
    data: str,
    rows: list[dict[str, Any]],
) -> str:
    """README.md of a folder of weights.

    Args:
        name: of the model.
        summary: what the weights are, in a line.
        arch: `--arch`.
        rope: options of the rotary embedding.
        options: further arguments of `create_model`.
        data: the training set, empty where unknown.
        rows: from `eval_rows`.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    # The path of a folder of images means nothing elsewhere.
    rows = [
        {**row, "data": Path(row["data"]).name, "pixels": format_size(row["image_size"])}
        for row in rows
    ]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=row["data"],
            dataset_name=row["data"],
            metric_type="accuracy",
            metric_name=f"{metric}, {row['pixels']} px, crop {row['crop_ratio']}",
            metric_value=row[key],
        )
        for row in rows
        for key, metric in METRICS.items()
    ]
    task = "class-conditional-image-generation" if is_dit(arch) else "image-classification"
    card_data = ModelCardData(
        license="unknown",  # licences of weights are their owners' to give
        library_name="spiralrope",
        tags=["spiral-rope", "rotary-position-embedding", task, "arxiv:2602.03227"],
        pipeline_tag=None if is_dit(arch) else task,
        datasets=[data] if data else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        summary=f"{summary[:1].upper()}{summary[1:]}",
        rows=rows,
        model={"arch": arch, **{option: _plain(value) for option, value in options.items()}},
        rope=dataclasses.asdict(rope),
        command="dit-sample" if is_dit(arch) else "eval",
    )
    return f"{card}\n"


def _plain(value: Any) -> Any:
    """A size as it is typed; anything else as it is."""
    return format_size(value) if isinstance(value, (list, tuple)) else value
