from __future__ import annotations

import re
from typing import Any

import typer

from spiralrope_cli.commands import dit_sample
from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.dit_runs import DIT_WORDS, DiTRun
from spiralrope_cli.core.config.legacy import translate
from spiralrope_cli.core.config.nested import build
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.config.pipelines import DeiTStages, DiTStages, deit_stages
from spiralrope_cli.core.config.recipes import shown_defaults
from spiralrope_cli.core.config.runs import AugmentConfig, ClassifierRun, TrainOptions
from spiralrope_cli.core.config.sweeps import points
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.launch import is_first_process, joined_world_size

DEIT_EXAMPLES = """
Examples:

  spiralrope run deit                                   DeiT-Ti on digits

  spiralrope run deit --rotate 4 --data ~/imagenet --nproc 8

  spiralrope run deit --rotate 4 --eval-only            measure it again

  spiralrope run deit --sweep rotate=none,1,2,4 --seeds 0,1,2

  spiralrope run deit --from-legacy "4 - - - - 8"       an old line
"""

DIT_EXAMPLES = """
Examples:

  spiralrope run dit                                    DiT-Ti/2 on digits

  spiralrope run dit --no-rope --name baseline

  spiralrope run dit --rotate 2 --data ~/imagenet --arch dit-b4 --nproc 8

  spiralrope run dit --reference imagenet256.npz --num 10000 --dry-run

  spiralrope run dit --from-legacy "- 4"                an old line
"""

app = typer.Typer(no_args_is_help=True, **SETTINGS)
NOT_HERE = (
    *("source", "config", "resume", "keep_every", "min_lr", "lr_rule", "schedule", "freeze"),
    *("weight_decay", "clip_grad", "ema_decay"),
)
"""Options that the trainings of a pipeline have at their recipe's values."""


@app.callback()
def run() -> None:
    """Whole pipelines, from the first training to the last figure, in one folder."""


@command(
    app,
    "deit",
    ClassifierRun,
    TrainOptions,
    DeiTStages,
    examples=DEIT_EXAMPLES,
    leave_out=(*NOT_HERE, *leaves(AugmentConfig)),
    defaults=shown_defaults("pretrain"),
)
def deit(given: dict[str, Any]) -> None:
    """Pretrain a DeiT, finetune it, and measure it eight times.

    Without options: DeiT-Ti with four directions on the bundled digits, in minutes on two cores.

    Options of the recipe are of pretraining; those of finetuning begin with --finetune-.

    The same command again skips what is done and goes on with what is not.
    """
    if "from_legacy" in given:
        say_translated(given, "deit")
        return
    own: DeiTStages = build(DeiTStages, given)
    chosen = options_of_training(given, DeiTStages, "finetune_")
    check_not_joined()
    grid = points(own.sweep)
    stages = deit_stages(
        eval_only=own.eval_only, skip_training=own.skip_training, finetune=own.with_finetune
    )
    if own.sweep or own.seeds:
        from spiralrope_cli.core.jobs.sweep_plan import deit_sweep

        planned = deit_sweep(chosen, grid, own.seeds, stages, finetune=own.with_finetune)

        from spiralrope_cli.core.jobs.sweep import run_sweep

        run_sweep(planned, dry_run=own.dry_run)
        return
    from spiralrope_cli.core.jobs.pipeline_plan import deit_pipeline

    pipeline = deit_pipeline(chosen, stages, finetune=own.with_finetune)

    from spiralrope_cli.core.jobs.pipeline import run_deit

    run_deit(pipeline, dry_run=own.dry_run)


@command(
    app,
    "dit",
    DiTRun,
    TrainOptions,
    DiTStages,
    examples=DIT_EXAMPLES,
    leave_out=(*NOT_HERE, "qk_norm", "hflip", "label_dropout"),
    words=DIT_WORDS,
    defaults=shown_defaults("dit-train"),
)
def dit(given: dict[str, Any]) -> None:
    """Train a DiT, draw images with it, and measure them.

    Without options: DiT-Ti/2 on the bundled digits, in minutes on two cores.

    FID needs a --reference and the weights that fetch inception brings; it is left out otherwise.

    The same command again skips what is done and goes on with what is not.
    """
    if "from_legacy" in given:
        say_translated(given, "dit")
        return
    own: DiTStages = build(DiTStages, given)
    chosen = options_of_training(given, DiTStages)
    check_not_joined()
    sampling = {field: given[name] for name, field in OF_SAMPLING.items() if name in given}
    try:
        dit_sample.check_words(sampling)
    except ConfigError as error:
        told = (OF_SAMPLES.sub(r"--sampling-\1", text) for text in (error.message, error.hint))
        raise ConfigError(*told) from error
    from spiralrope_cli.core.jobs.pipeline_plan import dit_pipeline

    pipeline = dit_pipeline(chosen, sampling, reference=own.reference, weights=own.weights)

    from spiralrope_cli.core.jobs.pipeline_dit import run_dit

    run_dit(pipeline, dry_run=own.dry_run)


OF_SAMPLING = {
    **{name: name for name in ("num", "sampler", "cfg_scale")},
    **{"sampling_steps": "steps", "sampling_seed": "seed"},
}
"""Option -> the one of `dit-sample` that it is."""
OF_SAMPLES = re.compile(r"--(steps|seed)\b")
"""Those of them that training has too, as errors of `dit-sample` call them."""


def options_of_training(given: dict[str, Any], own: type, but: str = "-") -> dict[str, Any]:
    """The given options without the pipeline's own, but with those that begin with a word."""
    mine = {name for name in leaves(own) if not name.startswith(but)} - {"out"}
    return {name: value for name, value in given.items() if name not in mine}


def check_not_joined() -> None:
    """Refuses processes that a launcher started: each stage forms a group of its own.

    Raises:
        ConfigError: says what to use in its place.
    """
    if (joined_world_size() or 1) > 1:
        raise ConfigError(
            "run starts the processes of each stage itself, and cannot join those of a launcher",
            "use --nproc, --nnodes and --rdzv-endpoint in place of torchrun or srun's tasks; the "
            "single commands do join",
        )


def say_translated(given: dict[str, Any], kind: str) -> None:
    """Prints the command for an old line on stdout, and what to know about it on stderr.

    Raises:
        ConfigError: a word that cannot be, or other options beside the line.
    """
    if list(given) != ["from_legacy"]:
        raise ConfigError(
            "--from-legacy stands alone", "add the other options to the command that it prints"
        )
    command_line, notes = translate(given["from_legacy"], kind)
    if is_first_process():
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(command_line)
