from __future__ import annotations

import os
from typing import Annotated

import typer

from spiralrope_cli.commands import completion
from spiralrope_cli.commands import options as o
from spiralrope_cli.commands import recipe_options as r
from spiralrope_cli.commands.options import DATA, MACHINE, RUN, choice, option
from spiralrope_cli.core.config.latents import VAE_NAMES, EncodeRun, class_folder
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.resolve import DATA_VARIABLE
from spiralrope_cli.core.config.runs import PRECISIONS
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.runtime.launch import is_first_process, launch

EXACT = "fp32"
"""Latents are made once and used for a whole training, so that the exact ones are worth it."""

EXAMPLES = """
Examples:

  spiralrope dit-encode --data ~/imagenet/train           into latents/

  spiralrope dit-encode --data ~/imagenet --nproc 8       one process per GPU

  spiralrope dit-encode --data photos --image-size 512 --out latents-512

  spiralrope dit-encode --data photos --vae ~/my-vae --skip-bad

  spiralrope dit-train --latents latents                  what they are for
"""

Data = Annotated[
    str | None,
    option(
        "--data",
        panel=DATA,
        text="Folder with one folder of images per class, or with such a folder train/. "
        f"Without it: ${DATA_VARIABLE}.",
        metavar="FOLDER",
    ),
]
Vae = Annotated[
    str | None,
    option(
        "--vae",
        panel=DATA,
        text=f"The VAE: ema, mse, or a folder as diffusers saves it ({EncodeRun.vae}).",
        metavar="ema|mse|FOLDER",
        autocompletion=completion.words(*VAE_NAMES),
    ),
]
ImageSize = Annotated[
    str | None,
    option(
        "--image-size",
        panel=DATA,
        text=f"Side, or height x width, after the centre crop ({EncodeRun.image_size[0]}).",
        metavar="N|HxW",
        callback=o.parse_size,
    ),
]
Out = Annotated[
    str | None,
    option("--out", panel=RUN, text=f"Folder of the cache ({EncodeRun.out}).", metavar="FOLDER"),
]
BatchSize = Annotated[
    int | None,
    option(
        "--batch-size",
        panel=MACHINE,
        text=f"Images at a time per process ({EncodeRun.batch_size}).",
    ),
]
Precision = Annotated[
    str | None,
    option("--precision", panel=MACHINE, **choice(f"Of the VAE; {EXACT} by default.", PRECISIONS)),
]


def dit_encode(
    context: typer.Context,
    data: Data = None,
    vae: Vae = None,
    image_size: ImageSize = None,
    skip_bad: r.SkipBad = None,
    out: Out = None,
    dry_run: o.DryRun = False,
    batch_size: BatchSize = None,
    nproc: o.Nproc = None,
    nnodes: o.Nnodes = None,
    rdzv_endpoint: o.RdzvEndpoint = None,
    device: o.Device = None,
    precision: Precision = None,
    workers: o.Workers = None,
) -> None:
    """Encode images by a VAE once, so that DiT trains from cached latents.

    It holds the posterior's mean and deviation: every epoch draws anew, mirrored or not.

    The same command again goes on, and encodes anew what is damaged.
    """
    chosen = {"precision": EXACT, "data": os.environ.get(DATA_VARIABLE), **o.given(context)}
    del chosen["dry_run"]
    if not chosen["data"]:
        raise DataError(
            "--data is missing",
            f"name a folder with one folder of images per class, or set {DATA_VARIABLE}",
        )
    run: EncodeRun = build(EncodeRun, chosen)
    class_folder(run.data)
    from spiralrope_cli.core.hub.vae import find_vae

    find_vae(run.vae)
    from spiralrope_cli.core.jobs.encode_plan import check_and_tell  # from here on with torch

    check_and_tell(run, speak=is_first_process())
    if not dry_run:
        launch("spiralrope_cli.core.jobs.encode_latents:run", run)
