"""The model card beside exported weights, by huggingface_hub from a template."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.models import is_dit
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.runtime.run_folder import EVAL_FILE

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
METRICS = {"acc1": "acc@1", "acc5": "acc@5"}


def eval_rows(folders: list[Path], sha256: str, ema: bool) -> list[dict[str, Any]]:
    """What `eval` measured of the averaged or the raw weights of one file.

    Args:
        folders: where an `eval.json` may lie.
        sha256: of the file; rows of other files are left out.
        ema: whether rows of the averaged or of the raw weights count.
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
        {**row, "data": Path(row["data"]).name, "pixels": _by(row["image_size"])} for row in rows
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
        model={"arch": arch, **{option: _by(value) for option, value in options.items()}},
        rope=dataclasses.asdict(rope),
        command="dit-sample" if is_dit(arch) else "eval",
    )
    return f"{card}\n"


def _by(value: Any) -> Any:
    """Sides as 224 or 224x448; anything else as it is."""
    if not isinstance(value, (list, tuple)):
        return value
    return "x".join(map(str, value[:1] if len(set(value)) == 1 else value))
