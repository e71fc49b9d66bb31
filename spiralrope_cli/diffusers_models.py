"""DiT as the transformer of diffusers' `DiTPipeline`; folders of `export` import it.

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
    images = pipeline(class_labels=[207], num_inference_steps=25).images

diffusers' own `DiTTransformer2DModel` has no RoPE, and other frequencies of the timestep: their
exponents are divided by 127, those of DiT by 128. So weights without RoPE need this class, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, __version__
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import save_file
from torch import Tensor

from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.samples import BETA_FIRST, BETA_LAST, NUM_TRAIN_STEPS
from spiralrope_cli.core.hub.catalog import (
    DIFFUSERS_FILE,
    DIFFUSERS_INDEX,
    HUB_CONFIG,
    TRANSFORMER_FOLDER,
)
from spiralrope_cli.core.models.dit import DiT
from spiralrope_cli.core.storage import with_checksum

__all__ = ["SpiralRopeDiT", "save_pipeline"]

MODULE = "spiralrope_dit"
"""Name of the file in a pipeline that imports the class below."""

NULL_LABEL = 1000
"""What `DiTPipeline` takes as the null class, whatever the number of classes."""


class SpiralRopeDiT(ModelMixin, ConfigMixin):
    """`DiT` with the config and the `forward` that `DiTPipeline` expects.

    Args:
        num_attention_heads: heads per block.
        attention_head_dim: channels of a head.
        num_layers: blocks.
        in_channels: channels of the latents.
        out_channels: twice as many: noise and variance.
        sample_size: side of the latents.
        patch_size: side of a patch in latent pixels.
        num_embeds_ada_norm: classes, without the null class.
        rope: fields of `RopeConfig`.
        pretrain_grid: patch grid of pretraining, as (rows, columns).
        qk_norm: RMS norm of queries and keys, per head.
        mlp_ratio: hidden width of the MLP over the width.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        num_layers: int,
        in_channels: int,
        out_channels: int,
        sample_size: int,
        patch_size: int,
        num_embeds_ada_norm: int,
        rope: dict[str, Any],
        pretrain_grid: tuple[int, int] | None = None,
        qk_norm: bool = False,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.dit = DiT(
            num_attention_heads * attention_head_dim,
            num_layers,
            num_attention_heads,
            rope=RopeConfig(**rope),
            input_size=sample_size,
            patch_size=patch_size,
            in_chans=in_channels,
            num_classes=num_embeds_ada_norm,
            pretrain_grid=pretrain_grid,
            qk_norm=qk_norm,
            mlp_ratio=mlp_ratio,
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """[B, L, H, W] latents, [B] timesteps and labels -> [B, 2L, H, W] noise and variance."""
        null = self.dit.num_classes
        out = self.dit(
            hidden_states, timestep, torch.where(class_labels == NULL_LABEL, null, class_labels)
        )
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def save_pipeline(
    model: DiT,
    folder: Path,
    state: dict[str, Tensor],
    metadata: dict[str, str],
    vae: Path,
    class_names: Sequence[str] = (),
) -> None:
    """Writes a pipeline: diffusers' own `DiTPipeline`, scheduler and VAE, and our transformer.

    Args:
        model: network, which may be on the meta device.
        folder: an existing folder.
        state: name -> tensor of the network.
        metadata: of the file of weights.
        vae: folder of the VAE, which is copied.
        class_names: by class number, where known.
    """
    args = model.init_args
    config = {
        "_class_name": SpiralRopeDiT.__name__,
        "num_attention_heads": args["num_heads"],
        "attention_head_dim": args["embed_dim"] // args["num_heads"],
        "num_layers": args["depth"],
        "in_channels": args["in_chans"],
        "out_channels": 2 * args["in_chans"],
        "sample_size": args["input_size"][0],
        "num_embeds_ada_norm": args["num_classes"],
        **{name: args[name] for name in ("patch_size", "rope", "pretrain_grid", "qk_norm")},
        "mlp_ratio": args["mlp_ratio"],
    }
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": __version__,
        TRANSFORMER_FOLDER: [MODULE, SpiralRopeDiT.__name__],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        **({"id2label": dict(enumerate(class_names))} if class_names else {}),
    }
    transformer = folder / TRANSFORMER_FOLDER
    transformer.mkdir()
    (folder / DIFFUSERS_INDEX).write_text(f"{json.dumps(index, indent=2)}\n")
    (transformer / HUB_CONFIG).write_text(f"{json.dumps(config, indent=2)}\n")
    (transformer / f"{MODULE}.py").write_text(
        f"from {__name__} import {SpiralRopeDiT.__name__}  # noqa: F401\n"
    )
    named = {f"dit.{name}": value for name, value in state.items()}
    save_file(named, transformer / DIFFUSERS_FILE, with_checksum(named, metadata))
    ddim: Any = DDIMScheduler(NUM_TRAIN_STEPS, BETA_FIRST, BETA_LAST, "linear", clip_sample=False)
    ddim.save_config(folder / "scheduler")
    (folder / "vae").mkdir()
    for name in (HUB_CONFIG, DIFFUSERS_FILE):
        shutil.copyfile(vae / name, folder / "vae" / name)
