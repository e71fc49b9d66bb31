"""`--slurm`: what a job of SLURM is given. Standard library only."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field

from spiralrope_cli.core.config.option import option
from spiralrope_cli.core.errors import ConfigError

EXAMPLE = "such as --slurm partition=gpu,nodes=2,gpus-per-node=8,time=24h"
SIGNAL_SECONDS = 120
"""How long before its end a job gets the signal to save."""

WITHOUT_VALUE = ("contiguous", "exclusive", "hold", "overcommit", "oversubscribe", "spread-job")
KEYS = (
    *("account", "array", "begin", "cluster-constraint", "comment", "constraint"),
    *("core-spec", "cpu-freq", "cpus-per-gpu", "cpus-per-task", "deadline", "dependency"),
    *("exclude", "export", "extra", "gpu-bind", "gpu-freq", "gpus-per-node", "gres", "gres-flags"),
    *("hint", "licenses", "mail-type", "mail-user", "mcs-label", "mem", "mem-bind", "mem-per-cpu"),
    *("mem-per-gpu", "mincpus", "network", "nice", "nodelist", "nodes", "partition", "power"),
    *("prefer", "priority", "profile", "propagate", "qos", "reservation", "signal", "switches"),
    *("thread-spec", "threads-per-core", "time", "tmp", "wckey", *WITHOUT_VALUE),
)
"""Options of sbatch that a job may have. submitit and the command set the others."""

GPUS = "the number of processes follows from gpus-per-node=N"
INSTEAD = {
    **dict.fromkeys(("gpus", "gpus-per-task", "gpus-per-socket", "tres-per-task"), GPUS),
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "ntasks-per-gpu", "tasks-per-node"),
        "a job has one task per machine, which starts one process per GPU",
    ),
    **dict.fromkeys(("output", "error", "open-mode"), "the logs are in slurm/ of the run folder"),
    **dict.fromkeys(
        ("chdir", "job-name", "requeue", "no-requeue", "wait", "wrap", "time-min", "input"),
        "the command sets it, or does without",
    ),
}
"""Other options of sbatch -> why a job may not have them."""


@dataclass(frozen=True)
class Allocation:
    """What a job gets on each of its machines, and for how long."""

    minutes: int
    nodes: int = 1
    gpus: int = 0  # per machine
    signal_seconds: int = SIGNAL_SECONDS
    at_once: int | None = None  # points of a sweep that may run at the same time
    more: dict[str, str | bool] = field(default_factory=dict)  # other options of sbatch

    def __str__(self) -> str:
        machines = f"{self.nodes} machine(s)" + f" with {self.gpus} GPU(s) each" * bool(self.gpus)
        hours, minutes = divmod(self.minutes, 60)
        time = f"{hours} h" * bool(hours) + f" {minutes} min" * bool(minutes)
        more = "".join(f", {k}" if v is True else f", {k}={v}" for k, v in self.more.items())
        return f"{machines}, {time.strip()}{more}"


def read_allocation(text: str) -> Allocation:
    """Reads `partition=gpu,nodes=2,time=24h`. A value may have commas: `exclude=node1,node2`."""
    given: dict[str, str | bool] = {}
    for word in re.split(rf",(?=[\w-]+=|(?:{'|'.join(WITHOUT_VALUE)})(?:,|$))", text):
        name, equals, value = word.strip().partition("=")
        key = name.removeprefix("--").replace("_", "-")
        if key in INSTEAD or (key == "gres" and re.search(r"\bgpu\b", value)):
            raise ConfigError(f"--slurm {word}: a job may not have it", INSTEAD.get(key, GPUS))
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else EXAMPLE
            raise ConfigError(f"--slurm {word}: sbatch has no such option", hint)
        if bool(value) is (not equals) or (not equals and key not in WITHOUT_VALUE):
            raise ConfigError(f"--slurm {word} has no value", EXAMPLE)
        if key in given:
            raise ConfigError(f"--slurm {key} is given twice", "leave one of them out")
        given[key] = value or True
    if "time" not in given:
        raise ConfigError("--slurm has no time", "give the limit of the partition: time=24h")
    gpus = _number(given, "gpus-per-node", r"(?:\w+:)?(\d+)", "a number of GPUs, such as 8", 0)
    if not gpus:
        given.pop("gpus-per-node", None)
    found = Allocation(
        minutes=minutes_of(str(given.pop("time"))),
        nodes=_number(given, "nodes", r"(\d+)", "a whole number, 1 or more", 1),
        gpus=gpus,
        signal_seconds=_number(given, "signal", r"USR2@(\d+)", "USR2@SECONDS", SIGNAL_SECONDS),
        at_once=_number(given, "array", r"%(\d+)", "%N, for N points of a sweep at once", 0)
        or None,
        more=given,
    )
    if found.nodes < 1:
        raise ConfigError("--slurm nodes=0; it must be a whole number, 1 or more")
    if 60 * found.minutes <= found.signal_seconds:
        raise ConfigError(
            f"--slurm time is {found.minutes} min, and the command saves and leaves "
            f"{found.signal_seconds} s before its end",
            "give more time",
        )
    return found


def _number(
    given: dict[str, str | bool], key: str, pattern: str, expects: str, default: int
) -> int:
    """Takes a number out of the given values, but for GPUs, whose type sbatch needs."""
    value = given.get(key) if key == "gpus-per-node" else given.pop(key, None)
    if value is None:
        return default
    if not (found := re.fullmatch(pattern, str(value))):
        raise ConfigError(f"--slurm {key}={value}; it must be {expects}")
    return int(found[1])


def minutes_of(text: str) -> int:
    """Minutes of `24h`, `1d12h`, `90m`, or of a time as sbatch reads it; rounded up."""
    if (found := re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?", text)) and text:
        in_days, in_hours, in_minutes = (int(part or 0) for part in found.groups())
        return (24 * in_days + in_hours) * 60 + in_minutes
    if found := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text):
        days, *rest = found.groups()
        parts = [int(part) for part in rest if part is not None]
        if days is None and len(parts) < 3:  # minutes, or minutes:seconds
            parts.insert(0, 0)
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return (24 * int(days or 0) + hours) * 60 + minutes + math.ceil(seconds / 60)
    raise ConfigError(
        f"--slurm time={text} is no time", "such as 24h, 90m, 1d12h, or D-HH:MM:SS as sbatch has it"
    )


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """An option of the commands that compute. A stored run has none: its job would submit it."""

    slurm: Allocation | None = option(
        "Submit the command as a job of SLURM, with these options of sbatch: "
        "partition=gpu,time=24h, ...",
        "Machine",
        metavar="KEY=V,...",
        read=read_allocation,
        expects="KEY=VALUE,..., such as partition=gpu,time=24h",
        default=None,
    )
