from __future__ import annotations

from typing import Annotated, Any

import typer

from spiralrope_cli.commands import completion
from spiralrope_cli.commands import options as o
from spiralrope_cli.commands.options import MACHINE, choice, option
from spiralrope_cli.core.config.fid import FIGURES, PRECISIONS, FidRun, notes
from spiralrope_cli.core.config.runs import MachineConfig
from spiralrope_cli.core.runtime.launch import is_first_process, launch

MACHINE_OPTIONS = (
    *("nproc", "nnodes", "rdzv_endpoint", "device", "precision", "workers", "skip_bad"),
)
OF_FEATURES = {"weights", "batch_size", "skip_bad", "nproc", "device", "precision", "workers"}
"""Options without effect where both sides hold statistics alone."""

IMAGES, SCORES, RESULT = "Images and features", "Figures", "Result"

EXAMPLES = """
Examples:

  spiralrope fid samples.npz imagenet256.npz        all six figures

  spiralrope fid samples/ photos/ --select fid,is   two of them, from folders

  spiralrope fid photos/ --save-stats photos.npz    a reference for later

  spiralrope fid samples/ photos.npz --num 50000 --nproc 8 --json
"""

Samples = Annotated[
    str,
    typer.Argument(
        metavar="SAMPLES",
        help="Generated images: a folder, or an .npz.",
        autocompletion=completion.paths,
    ),
]
Reference = Annotated[
    str | None,
    typer.Argument(
        metavar="REFERENCE",
        help="Real images or their statistics: a folder, an .npz.",
        autocompletion=completion.paths,
    ),
]
Select = Annotated[
    str | None,
    option("--select", panel=SCORES, metavar="NAMES", text=f"Of {','.join(FIGURES)}; all."),
]
Num = Annotated[
    int | None,
    option("--num", panel=IMAGES, text="The first NUM of SAMPLES count; fewer are an error."),
]
Weights = Annotated[
    str | None,
    option("--weights", panel=IMAGES, metavar="FILE", text="Inception's, if not those fetched."),
]
BatchSize = Annotated[
    int | None,
    option(
        "--batch-size", panel=MACHINE, text=f"Images at a time per process ({FidRun.batch_size})."
    ),
]
SkipBad = Annotated[
    bool | None,
    option("--skip-bad", panel=IMAGES, metavar=" ", text="Leave out images that are damaged."),
]
Bootstrap = Annotated[
    int | None,
    option("--bootstrap", panel=SCORES, text="Error bar of the FID from N draws of SAMPLES."),
]
KidSubsets = Annotated[
    int | None, option("--kid-subsets", panel=SCORES, text=f"KID's subsets ({FidRun.kid_subsets}).")
]
KidSubsetSize = Annotated[
    int | None,
    option(
        "--kid-subset-size",
        panel=SCORES,
        text=f"Images in each of them ({FidRun.kid_subset_size}).",
    ),
]
Seed = Annotated[
    int | None,
    option("--seed", panel=SCORES, text=f"Of KID's subsets and of the bootstrap ({FidRun.seed})."),
]
AsJson = Annotated[
    bool, option("--json", panel=RESULT, metavar=" ", text="The result as JSON on stdout.")
]
SaveStats = Annotated[
    str | None,
    option(
        "--save-stats",
        panel=RESULT,
        metavar="FILE",
        text="Keep the statistics of SAMPLES as a REFERENCE for later (.npz).",
    ),
]
Precision = Annotated[
    str | None,
    option(
        "--precision", panel=MACHINE, **choice(f"Of the features ({PRECISIONS[0]}).", PRECISIONS)
    ),
]
Workers = Annotated[
    int | None, option("--workers", panel=MACHINE, text="Threads that decode, per process.")
]


def fid(
    context: typer.Context,
    samples: Samples,
    reference: Reference = None,
    num: Num = None,
    skip_bad: SkipBad = None,
    weights: Weights = None,
    select: Select = None,
    kid_subsets: KidSubsets = None,
    kid_subset_size: KidSubsetSize = None,
    bootstrap: Bootstrap = None,
    seed: Seed = None,
    json: AsJson = False,
    save_stats: SaveStats = None,
    batch_size: BatchSize = None,
    nproc: o.Nproc = None,
    nnodes: o.Nnodes = None,
    rdzv_endpoint: o.RdzvEndpoint = None,
    device: o.Device = None,
    precision: Precision = None,
    workers: Workers = None,
) -> None:
    """FID, sFID, Inception Score, KID, Precision and Recall of generated images.

    SAMPLES comes first, REFERENCE second (ADM's own script has it the other way round).

    An .npz holds arr_0 (N x H x W x 3 uint8), or statistics (mu, sigma, mu_s, sigma_s), or both.

    Statistics of a reference are kept and found again by its content.
    """
    given = o.given(context)
    run = _run(given)
    if is_first_process():
        for line in notes(run, given):
            typer.echo(line, err=True)
    from spiralrope_cli.core.jobs.score_plan import prepare

    ready = prepare(run)
    if not ready.weights and is_first_process():
        for name in sorted(OF_FEATURES & given.keys()):
            option = name.replace("_", "-")
            typer.echo(f"note: --{option} has no effect: no image is looked at", err=True)
    launch("spiralrope_cli.core.jobs.score_images:run", ready)


def _run(given: dict[str, Any]) -> FidRun:
    machine = {name: given[name] for name in MACHINE_OPTIONS if name in given}
    options = {name: value for name, value in given.items() if name not in machine}
    options["as_json"] = options.pop("json")
    if "select" in options:
        chosen = (name.strip().lower() for name in options["select"].split(","))
        options["select"] = tuple(dict.fromkeys(chosen))
    return FidRun(**options, machine=MachineConfig(**{"precision": PRECISIONS[0], **machine}))
