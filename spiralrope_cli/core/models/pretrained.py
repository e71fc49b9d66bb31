"""Networks in folders and on the Hugging Face Hub: weights, `config.json` and model card.

One `config.json` serves `from_pretrained`, which takes the arguments of the class from it, and
timm's `hf-hub:`, which takes `architecture`, `model_args` and `pretrained_cfg`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin
from safetensors.torch import save_file
from torch import Tensor

from spiralrope_cli import __version__
from spiralrope_cli.core.config.datasets import slug_of
from spiralrope_cli.core.config.hub import HUB
from spiralrope_cli.core.config.models import (
    RopeConfig,
    TransformerSize,
    arch_name,
    format_size,
)
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.storage import MODEL_FILE, with_checksum

CARD_TEMPLATE = Path(__file__).with_name("model_card.md.j2")
CONFIG_JSON = "config.json"
TIMM_NAMES = {
    f"deit-{size}": f"spiralrope_deit_{word}_patch16_224"
    for size, word in {"ti": "tiny", "s": "small", "b": "base", "l": "large"}.items()
}
"""Size of a DeiT -> name of its timm model."""


class Pretrained(PyTorchModelHubMixin, library_name="spiralrope"):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of the Hub's own mixin.

    Beside the mixin's: every tensor must be in the file, RoPE options become a `RopeConfig`, and
    `config.json` and the model card are ours.
    """

    family: str  # as names of its sizes begin
    init_args: dict[str, Any]  # arguments of the class, for JSON

    def _save_pretrained(self, save_directory: Path) -> None:
        save_folder(self, save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any] | None = None,
        strict: bool = True,
        **given: Any,
    ) -> Any:
        arch = str((config or {}).get("arch", ""))
        if not arch.startswith(f"{cls.family}-"):
            found = f"is a {arch}" if arch else f"has no {CONFIG_JSON} of this package"
            raise CheckpointError(
                f"{model_id} {found}, so it is no {cls.__name__}",
                f"spiralrope_cli.load_model reads other files (on the Hub as hf:{model_id})",
            )
        try:
            given["rope"] = RopeConfig(**given["rope"])
        except TypeError as error:
            raise CheckpointError(
                f"{CONFIG_JSON} of {model_id} has RoPE options of another version: {error}"
            ) from error
        # Older versions of huggingface_hub leave it in training mode.
        return super()._from_pretrained(model_id=model_id, strict=strict, **given).eval()

    def push_to_hub(
        self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> str:
        """As the mixin's; `model_card_kwargs` are arguments of `generate_model_card`."""
        card = {"repo": repo_id, **(model_card_kwargs or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **more)

    def generate_model_card(
        self,
        *,
        repo: str = "",
        name: str = "",
        summary: str = "",
        license: str = "unknown",
        data: str = "",
        rows: Sequence[Mapping[str, Any]] = (),
        pipeline: bool = False,
    ) -> ModelCard:
        """The model card (README.md), with the metrics of `rows` alone.

        Args:
            repo: OWNER/NAME on the Hub; empty for a folder.
            name: title; by default that of the repository.
            summary: what the weights are, in a sentence without a full stop.
            license: as the Hub spells it; only the owner of the weights can give one.
            data: training set by its name on the Hub, if it has one.
            rows: those of `eval.json` that are of these weights.
            pipeline: whether it is a pipeline of diffusers.
        """
        name = name or repo.rpartition("/")[2] or arch_of(self)
        classifies = self.family == "deit"
        task = "image-classification" if classifies else "class-conditional-image-generation"
        # Only the name of the data folder: its path is that of this machine.
        rows = [
            {**row, "data": slug_of(row["data"]), "pixels": format_size(row["image_size"])}
            for row in rows
        ]
        results = [
            EvalResult(
                task_type=task,
                dataset_type=row["data"],
                dataset_name=row["data"],
                dataset_split="validation",
                metric_type="accuracy",
                metric_name=f"{metric}, {row['pixels']} px, crop {row['crop_ratio']}",
                metric_value=row[key],
            )
            for row in rows
            for key, metric in (("acc1", "acc@1"), ("acc5", "acc@5"))
        ]
        card_data = ModelCardData(
            license=license,
            library_name="diffusers" if pipeline else "spiralrope",
            tags=["spiral-rope", "rotary-position-embedding", task, "arxiv:2602.03227"],
            pipeline_tag=task if classifies else None,
            datasets=[data] if data else None,
            model_name=name if results else None,
            eval_results=results or None,
        )
        args = {key: value for key, value in self.init_args.items() if key != "rope"}
        sizes = {k: format_size(v) if isinstance(v, tuple) else v for k, v in args.items()}
        return ModelCard.from_template(
            card_data,
            template_path=str(CARD_TEMPLATE),
            repo=repo,
            source=f"{HUB}{repo}" if repo else ".",
            network="DeiT" if classifies else "DiT",
            version=__version__,
            name=name,
            summary=summary or f"Weights of {arch_of(self)}",
            license=license,
            rows=rows,
            model={"arch": arch_of(self), **sizes},
            args=args,
            rope=self.init_args["rope"],
            classifies=classifies,
            pipeline=pipeline,
        )


def arch_of(model: Any) -> str:
    """`--arch` of a network."""
    args = model.init_args
    patch = args["patch_size"] if model.family == "dit" else 0
    return arch_name(TransformerSize(args["embed_dim"], args["depth"], args["num_heads"], patch))


def save_folder(
    model: Any,
    folder: Path,
    state: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
    **of_training: Any,
) -> None:
    """Writes `model.safetensors` and `config.json` of a `DeiT` or `DiT` into an existing folder.

    With a `state` the model may be on the meta device. By default the metadata is what any SOURCE
    needs. `of_training` are arguments of `hub_config`.
    """
    args = dict(model.init_args)
    if state is None:
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if metadata is None:
        run = {"arch": arch_of(model), "rope": args.pop("rope"), "model": args}
        metadata = {"config": json.dumps(run), "format": "pt"}
    save_file(state, folder / MODEL_FILE, with_checksum(state, metadata))
    config = json.dumps(hub_config(model, **of_training), indent=2)
    (folder / CONFIG_JSON).write_text(f"{config}\n")


def hub_config(
    model: Any, *, preprocessing: Mapping[str, Any] | None = None, class_names: Sequence[str] = ()
) -> dict[str, Any]:
    """What `config.json` holds; `preprocessing` is mean, std and crop_pct, where known."""
    args = model.init_args
    config = {"arch": arch_of(model), **args}
    if class_names:
        config["label_names"] = list(class_names)
    if model.family != "deit":
        return config
    not_of_timm = {"rope", "image_size", "num_classes"}
    return {
        **config,
        # A size without a name of its own is the smallest one, with other arguments.
        "architecture": TIMM_NAMES.get(config["arch"], TIMM_NAMES["deit-ti"]),
        "num_features": args["embed_dim"],
        "global_pool": "token",
        "model_args": {
            **{name: value for name, value in args.items() if name not in not_of_timm},
            "img_size": args["image_size"],
            **args["rope"],
        },
        "pretrained_cfg": {
            "num_classes": args["num_classes"],
            "input_size": (args["in_chans"], *args["image_size"]),
            "fixed_input_size": True,
            "pool_size": None,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **(preprocessing or {}),
        },
    }
