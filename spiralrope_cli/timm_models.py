"""The DeiTs as timm models: importing this module registers them with `timm.create_model`.

    import timm
    import spiralrope_cli.timm_models

    model = timm.create_model("spiralrope_deit_small_patch16_224", rotate=4, num_classes=10)

Every field of `RopeConfig` is a keyword. Parameters have the published names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from timm.models._hub import download_from_hf, load_cfg_from_json
from timm.models._pretrained import PretrainedCfg
from torch import Tensor, nn

from spiralrope_cli.core.config.models import RopeConfig, deit_size
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.catalog import HUB_CONFIG
from spiralrope_cli.core.hub.published import freqs_note, split_freqs
from spiralrope_cli.core.models.deit import INIT_STD, DeiT
from spiralrope_cli.core.models.mixed_rope import MixedRoPE
from spiralrope_cli.core.models.pretrained import TIMM_NAMES
from spiralrope_cli.core.rope import Grid, SpiralRoPE
from spiralrope_cli.core.storage import MODEL_FILE

__all__ = ["SpiralRopeDeiT"]

POOLS = ("token", "avg", "")
ROPE_OPTIONS = tuple(field.name for field in dataclasses.fields(RopeConfig))


class SpiralRopeDeiT(DeiT):
    """`DeiT` with the methods and keywords that timm's scripts and wrappers expect.

    In training mode stochastic depth uses torch's global generator, as timm's models do, unless
    `drop_path_mask` is given. All blocks have the same rate, as in the published recipe.

    Args:
        embed_dim: width C.
        depth: blocks.
        num_heads: heads per block.
        img_size: side or (height, width) in pixels.
        patch_size: side of a patch in pixels.
        in_chans: channels of the images.
        num_classes: outputs; 0: no head.
        global_pool: input of the head: `token`, the class token; `avg`, the mean of the patch
            tokens; "", all tokens.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth rate.
        mlp_ratio: hidden width of the MLP over C.
        pretrain_grid: patch grid of pretraining, to which positions are interpolated; by default
            the model's own.
        device: device of the parameters.
        dtype: dtype of the parameters.
        rope: fields of `RopeConfig`.

    Raises:
        TypeError: unknown keyword.
        ConfigError: sizes that do not divide, or RoPE options that do not fit the heads.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        img_size: Grid = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mlp_ratio: float = 4.0,
        pretrain_grid: Grid | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rope: Any,
    ) -> None:
        unknown = [name for name in rope if name not in ROPE_OPTIONS]
        if unknown:
            known = f"RoPE options are {', '.join(ROPE_OPTIONS)}"
            raise TypeError(f"{', '.join(unknown)}: no keyword of this model; {known}")
        with torch.device(device) if device is not None else contextlib.nullcontext():
            super().__init__(
                embed_dim,
                depth,
                num_heads,
                rope=RopeConfig(**rope),
                image_size=img_size,
                patch_size=patch_size,
                in_chans=in_chans,
                num_classes=num_classes,
                pretrain_grid=pretrain_grid,
                drop_path=drop_path_rate,
                mlp_ratio=mlp_ratio,
            )
        self.to(dtype=dtype)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = 1
        self.global_pool = _checked_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.feature_info = [
            {"module": f"blocks.{number}", "num_chs": embed_dim, "reduction": patch_size}
            for number in range(depth)
        ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **more: Any) -> Any:
        """`timm.create_model` with the weights of a folder, or of OWNER/NAME on the Hub."""
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            return timm.create_model(f"hf-hub:{folder}", pretrained=True, **more)
        name, file = load_cfg_from_json(folder / HUB_CONFIG)["architecture"], folder / MODEL_FILE
        overlay = {"file": str(file), **more.pop("pretrained_cfg_overlay", {})}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **more)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.global_pool != "token":
            raise CheckpointError(f"global_pool is {self.global_pool!r}; DeiT has only 'token'")
        super()._save_pretrained(save_directory)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Also loads published state dicts; warns if their frequencies are not the model's."""
        state, freqs = split_freqs(dict(state_dict))
        rope = self.rope if isinstance(self.rope, SpiralRoPE) else None
        if rope is not None and (note := freqs_note(freqs, rope.config, rope.head_dim)):
            warnings.warn(note, stacklevel=2)
        return super().load_state_dict(state, strict, assign)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, 1 + N, C] -> logits [B, classes]; with `pre_logits` the input of the head."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, self.num_prefix_tokens :].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor, drop_path_mask: Tensor | None = None) -> Tensor:
        """[B, channels, height, width] -> logits [B, classes]."""
        return self.forward_head(self.forward_features(images, drop_path_mask))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Patch tokens after chosen blocks.

        Args:
            x: images [B, channels, height, width].
            indices: n for the last n blocks, or a list of block numbers; by default all blocks.
            return_prefix_tokens: return pairs (patch tokens, class token [B, 1, C]).
            norm: apply the final norm to each.
            stop_early: skip the blocks after the last chosen one.
            output_fmt: `NCHW`, [B, C, h, w], or `NLC`, [B, N, C].
            intermediates_only: return only the list.

        Returns:
            (tokens after the final norm [B, 1 + N, C], list of the chosen ones), or only the list.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be NCHW or NLC")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        mask = self.own_drop_path_mask(x)
        x, cos_sin = self.embed(x)
        taken = []
        for number in range(last + 1 if stop_early else len(self.blocks)):
            x = self.run_block(number, x, cos_sin, mask)
            if number in chosen:
                taken.append(self.norm(x) if norm else x)
        prefix = [tokens[:, : self.num_prefix_tokens] for tokens in taken]
        patches = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            patches = [
                tokens.unflatten(1, self.grid).permute(0, 3, 1, 2).contiguous()
                for tokens in patches
            ]
        found = list(zip(patches, prefix, strict=True)) if return_prefix_tokens else patches
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the layers after the chosen blocks; returns the numbers of these, from 0."""
        chosen, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if isinstance(self.rope, MixedRoPE):
            self.rope.freqs = nn.Parameter(self.rope.freqs[:, : last + 1].detach().clone())
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head with a new one; 0 classes remove it."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            like = self.cls_token
            head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(head.weight, std=INIT_STD)
            nn.init.zeros_(head.bias)
            self.head = head
        self.head.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides all that are one-dimensional."""
        return {"pos_embed", "cls_token", "rope.freqs"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the layers, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable


def _checked_pool(global_pool: str) -> str:
    if global_pool not in POOLS:
        raise ValueError(
            f"global_pool is {global_pool!r}; it must be {', '.join(map(repr, POOLS))}"
        )
    return global_pool


def _create(name: str, arch: str, pretrained: bool, **given: Any) -> nn.Module:
    if pretrained:
        source = resolve_pretrained_cfg(
            name, given.get("pretrained_cfg"), given.get("pretrained_cfg_overlay")
        )
        if not (source.has_weights or source.state_dict):
            raise CheckpointError(
                f"timm has no pretrained weights for {name}",
                "say where those that spiralrope export wrote are: "
                "pretrained_cfg_overlay=dict(hf_hub_id='OWNER/NAME'), or dict(file=FILE)",
            )
        given = _as_stored(name, source, given)
    size = deit_size(arch)
    sizes = {"embed_dim": size.dim, "depth": size.depth, "num_heads": size.heads}
    out_indices = given.pop("out_indices", 3)
    return build_model_with_cfg(
        SpiralRopeDeiT,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**sizes, **given},
    )


def _as_stored(name: str, source: PretrainedCfg, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model: the given ones, and those in the `config.json` of its weights."""
    if source.file and (path := Path(source.file).with_name(HUB_CONFIG)).is_file():
        config = load_cfg_from_json(path)
    elif source.hf_hub_id and not (source.file or source.state_dict or source.url):
        config = load_cfg_from_json(download_from_hf(source.hf_hub_id, HUB_CONFIG))
    else:
        return given
    if config["architecture"] != name:
        raise CheckpointError(f"these weights are of {config['architecture']}, not of {name}")
    args = config.get("model_args", {})
    for option in {*ROPE_OPTIONS} & given.keys() & args.keys():
        if given[option] != args[option]:
            warnings.warn(
                f"{option} is {given[option]!r}, and was {args[option]!r} in training", stacklevel=4
            )
    overlay = {**config["pretrained_cfg"], **(given.get("pretrained_cfg_overlay") or {})}
    return {**args, **given, "pretrained_cfg_overlay": overlay}


CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    # pos_embed has a fixed size. With this set, timm's scripts pass their image size to the model.
    "fixed_input_size": True,
    "pool_size": None,
    # The published evaluation uses two crop ratios, 0.875 and 1.0; timm has room for one.
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "paper_ids": "arXiv:2602.03227",
}
default_cfgs = generate_default_cfgs(dict.fromkeys(TIMM_NAMES.values(), CFG))


@register_model
def spiralrope_deit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-Ti with Spiral RoPE."""
    return _create("spiralrope_deit_tiny_patch16_224", "deit-ti", pretrained, **kwargs)


@register_model
def spiralrope_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-S with Spiral RoPE."""
    return _create("spiralrope_deit_small_patch16_224", "deit-s", pretrained, **kwargs)


@register_model
def spiralrope_deit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-B with Spiral RoPE."""
    return _create("spiralrope_deit_base_patch16_224", "deit-b", pretrained, **kwargs)


@register_model
def spiralrope_deit_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DeiT-L with Spiral RoPE."""
    return _create("spiralrope_deit_large_patch16_224", "deit-l", pretrained, **kwargs)
