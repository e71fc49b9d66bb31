from __future__ import annotations

from typing import Any

import typer

from spiralrope_cli.commands.command import SETTINGS, command
from spiralrope_cli.core.config.dit_runs import DIT_WORDS, DiTRun
from spiralrope_cli.core.config.option import leaves
from spiralrope_cli.core.config.pipelines import DeiTStages, DiTStages, translate
from spiralrope_cli.core.config.recipes import shown_defaults
from spiralrope_cli.core.config.runs import AugmentConfig, ClassifierRun
from spiralrope_cli.core.config.slurm import SlurmOptions
from spiralrope_cli.core.config.training import TrainOptions
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.launch import is_first_process
from spiralrope_cli.core.runtime.slurm import Remaining

run = typer.Typer(no_args_is_help=True, **SETTINGS)
NOT_HERE = (
    *("source", "ema", "config", "resume", "keep_every", "min_lr", "lr_rule", "schedule", "freeze"),
    *("weight_decay", "clip_grad", "ema_decay", "ema_warmup"),
)
"""Options that are not in `run`: its trainings use the values of the recipe."""


@run.callback()
def about() -> None:
    """Run a whole pipeline in one folder: training, evaluation or sampling, report."""


@command(
    ClassifierRun,
    TrainOptions,
    DeiTStages,
    SlurmOptions,
    leave_out=(*NOT_HERE, *leaves(AugmentConfig)),
    defaults=shown_defaults("pretrain"),
    group=run,
)
def deit(given: dict[str, Any]) -> Remaining | None:
    """Pretrain a DeiT, finetune it, and evaluate it: eight rows.

    Without options: DeiT-Ti with four directions on the bundled digits, in minutes on two cores.

    Options of the recipe are for pretraining; those for finetuning begin with --finetune-.

    After an interruption run the same command again: it skips finished stages and resumes.

    Examples:
      spiralrope run deit                                   DeiT-Ti on digits
      spiralrope run deit --rotate 4 --data ~/imagenet --nproc 8
      spiralrope run deit --rotate 4 --eval-only            evaluate it again
      spiralrope run deit --sweep rotate=none,axial,mixed,2,4 --seeds 0,1,2
      spiralrope run deit --from-legacy "4 - - - - 8"       from run_all.sh
    """
    return run_pipeline("deit", given)


@command(
    DiTRun,
    TrainOptions,
    DiTStages,
    SlurmOptions,
    leave_out=(
        *(*NOT_HERE, "qk_norm", "hflip", "class_dropout_prob"),
        *("fid_reference", "fid_weights"),  # --reference and --weights
    ),
    words=DIT_WORDS,
    defaults=shown_defaults("dit-train"),
    group=run,
)
def dit(given: dict[str, Any]) -> Remaining | None:
    """Train a DiT, sample images from it, and compute their FID.

    Without options: DiT-Ti/2 on the bundled digits, in minutes on two cores.

    Its RoPE is axial unless --rotate is given, as in the published runs: --rotate 0.

    FID needs a --reference and the Inception weights (fetch inception); else it is skipped.

    After an interruption run the same command again: it skips finished stages and resumes.

    Examples:
      spiralrope run dit                                    DiT-Ti/2 on digits
      spiralrope run dit --no-rope --name baseline
      spiralrope run dit --rotate 2 --data ~/imagenet --arch dit-b4 --nproc 8
      spiralrope run dit --sweep rotate=none,axial,mixed,2,4 --seeds 0,1,2
      spiralrope run dit --reference imagenet256.npz --num-samples 10000 --dry-run
      spiralrope run dit --from-legacy "- 4"                from run_all.sh
    """
    return run_pipeline("dit", given)


def run_pipeline(kind: str, given: dict[str, Any]) -> Remaining | None:
    """Runs a pipeline or a sweep, or translates a line of an original script."""
    if "from_legacy" in given:
        say_translated(kind, given)
        return None
    if "sweep" in given or "seeds" in given:
        from spiralrope_cli.core.jobs.sweep import run_sweep

        return run_sweep(kind, given)
    from spiralrope_cli.core.jobs.pipeline import SETTLE, run_stages

    return run_stages(SETTLE[kind](given), dry_run=given.get("dry_run", False))


def say_translated(kind: str, given: dict[str, Any]) -> None:
    """Prints the command for an original line on stdout, and notes on stderr."""
    if list(given) != ["from_legacy"]:
        raise ConfigError(
            "--from-legacy allows no other options", "add them to the command that it prints"
        )
    command_line, notes = translate(given["from_legacy"], kind)
    if is_first_process():
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(command_line)
