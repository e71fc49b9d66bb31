"""`--slurm`: submits a command as a job, by submitit.

The plan is made and checked here, as by `--dry-run`. A job has one task per machine, which runs the
same command, and that starts its workers itself: a pipeline joins no other launcher's, and workers
that are bound to one GPU each could not reach those of the others. submitit is imported late.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.slurm import Allocation
from spiralrope_cli.core.errors import ConfigError, LaunchError, SpiralRopeError
from spiralrope_cli.core.runtime.launch import joined_world_size, say_notes
from spiralrope_cli.core.runtime.progress import say_result

LOGS = "slurm"
"""Folder of the logs, in the run folder."""
MOST_REQUEUES = 100
"""Of a job whose time is up; one that never advances must end."""
NEVER_RESUMED = ("eval", "fid")
"""Commands that keep nothing of an interrupted run: they need more time, not another try."""
SIGNAL = signal.SIGUSR2
"""What submitit asks SLURM to send before the time is up."""

WHOLE: tuple[tuple[str, ...], ...] = ((),)
"""One part: the command as it was typed."""


@dataclass(frozen=True)
class Remaining:
    """What a command still has to compute: one job for each part, with their logs in a folder.

    A part is what its command line has in place of the typed options `replaced`, such as those of a
    point of a sweep. A finished command has no parts.
    """

    folder: str
    parts: Sequence[tuple[str, ...]] = WHOLE
    replaced: tuple[str, ...] = ()


@dataclass
class SlurmTask:
    """A task of a job, as submitit runs it: the command, as a process of its own."""

    words: tuple[str, ...]
    nodes: int = 1
    process: subprocess.Popen[bytes] | None = None
    asked: bool = False  # to save and leave
    terminated: bool = False

    def __call__(self) -> None:
        """Runs the command, and exits with its code."""
        import submitit

        job, words = submitit.JobEnvironment(), list(self.words)
        if self.nodes > 1:
            endpoint = f"{job.hostnames[0]}:{20000 + int(job.raw_job_id) % 20000}"
            words += ["--nnodes", str(self.nodes), "--rdzv-endpoint", endpoint]
        say_result(f"$ spiralrope {shlex.join(words)}")
        # With these it would join the tasks of the other machines.
        env = {name: value for name, value in os.environ.items() if "SLURM_STEP" not in name}
        signal.signal(signal.SIGTERM, self.end)
        # SLURM may send the signal to all processes: blocked, it does not end those of the command.
        signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
        self.process = subprocess.Popen([sys.executable, "-m", "spiralrope_cli", *words], env=env)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
        if self.terminated:  # before the command had begun
            self.ask()
        code = self.process.wait()
        while self.terminated:  # SLURM requeues a preempted job only if it has not ended
            signal.pause()
        if code and not (code == 143 and job.global_rank):  # else the first task requeues the job
            sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """Lets the command save and leave; returns what runs after the requeue.

        submitit calls it in the handler of the signal, before it requeues the job.
        """
        import submitit

        self.ask()
        if self.process:
            with contextlib.suppress(ChildProcessError):  # it has ended
                # Not by Popen: `__call__` holds its lock.
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(SlurmTask(self.words, self.nodes))

    def ask(self) -> None:
        """Once: a second SIGTERM would end the command without a checkpoint."""
        if self.process and not self.asked:
            self.asked = True
            self.process.terminate()

    def end(self, *_: object) -> None:
        """On scancel or preemption: lets the command save, and waits for the end of the job."""
        self.terminated = True
        self.ask()


def notes_on(allocation: Allocation, num_jobs: int) -> list[str]:
    """What the user may not expect of these jobs."""
    notes = []
    if not {"cpus-per-task", "cpus-per-gpu", "exclusive"}.intersection(allocation.more):
        notes.append("most clusters bind a task to one core, unless --slurm has cpus-per-task=N")
    if allocation.at_once and num_jobs == 1:
        notes.append("--slurm array has no effect: there is one job")
    return notes


def submit(
    allocation: Allocation,
    command: str,
    words: Sequence[str],
    given: dict[str, Any],
    compute: Callable[[dict[str, Any]], Remaining],
) -> None:
    """Checks a command, such as `run deit`, submits it, and prints how to follow and cancel it.

    `words` follow it on the command line, and give the options `given`. `compute` does the command
    with these; after a dry run it returns what remains.
    """
    dry_run = given.get("dry_run", False)
    if joined_world_size() is not None:
        raise ConfigError("--slurm submits once, not from each process of srun or torchrun")
    if typed := [name for name in ("nnodes", "rdzv_endpoint") if name in given]:
        option = "--" + typed[0].replace("_", "-")
        raise ConfigError(f"{option} and --slurm exclude each other", "use --slurm nodes=N")
    missing = what_is_missing()
    if missing and not dry_run:
        raise missing
    added: dict[str, Any] = {} if "nproc" in given else {"nproc": allocation.gpus or 1}
    if allocation.gpus and "device" not in given:
        added["device"] = "cuda"
    machines = {"nnodes": allocation.nodes, "rdzv_endpoint": "first-machine:29500"}
    remaining = compute(
        {**given, **added, **(machines if allocation.nodes > 1 else {}), "dry_run": True}
    )
    if not remaining.parts:
        say_result("finished: nothing to submit; without --slurm the command prints its results")
        return
    replaced = ("--slurm", "--resume", *remaining.replaced)
    shared = [word for name, value in added.items() for word in (f"--{name}", str(value))]
    # Without --resume never, too: a requeued job has to resume.
    shared += without([word for word in words if word != "--dry-run"], replaced)
    tasks = [
        SlurmTask((*command.split(), *part, *shared), allocation.nodes) for part in remaining.parts
    ]
    say_notes(notes_on(allocation, len(tasks)))
    if dry_run:
        say_notes([f"{missing.message}: {missing.hint}"] if missing else [])
        say_result(f"would submit {len(tasks)} job(s): {allocation}")
        for task in tasks:
            say_result(f"  $ spiralrope {shlex.join(task.words)}")
        return
    logs, name = Path(remaining.folder) / LOGS, job_name(command, remaining.folder, words)
    job_id, state = queued(name)
    if job_id:
        say_result(f"job {job_id} of this command is {state} already")
    else:
        requeues = 0 if command in NEVER_RESUMED else MOST_REQUEUES
        job_id = enqueue(tasks, logs, name, allocation, requeues)[0].job_id.split("_")[0]
        say_result(f"submitted job {job_id}: {allocation}")
    elements = f"_{{0..{len(tasks) - 1}}}" if len(tasks) > 1 else ""
    # The first process, which prints, may be on any machine.
    ranks = f"{{0..{allocation.nodes - 1}}}" if allocation.nodes > 1 else "0"
    say_result(f"  follow  tail -F {logs}/{job_id}{elements}_{ranks}_log.out")
    say_result(f"          squeue --job {job_id}")
    say_result(f"  cancel  scancel {job_id}")


def what_is_missing() -> SpiralRopeError | None:
    """What this machine lacks to submit a job, if anything."""
    if importlib.util.find_spec("submitit") is None:
        return ConfigError("--slurm needs submitit", 'pip install "spiralrope[slurm]"')
    if lacking := [name for name in ("sbatch", "srun", "squeue") if not shutil.which(name)]:
        return ConfigError(
            f"--slurm needs SLURM, and there is no {lacking[0]} on this machine",
            "run it on a login node of the cluster",
        )
    return None


def without(words: Sequence[str], options: Sequence[str]) -> Iterator[str]:
    """The words of a command line without some options and their values."""
    rest = iter(words)
    for word in rest:
        if word in options:
            next(rest)
        elif word.partition("=")[0] not in options:
            yield word


def job_name(command: str, folder: str, words: Sequence[str]) -> str:
    """The name of a job, by which the same command finds it again."""
    digest = hashlib.sha256("\0".join([os.getcwd(), command, *words]).encode()).hexdigest()
    prefix = command.replace(" ", "-") + "-"
    return f"{prefix}{Path(folder).name.removeprefix(prefix)}-{digest[:8]}"


def queued(name: str) -> tuple[str, str]:
    """Number and state of a job of this user that has not ended; both empty if there is none."""
    command = ["squeue", "--me", "--noheader", "--format", "%i %T %j"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"squeue failed: {done.stderr.strip() or done.returncode}")
    for line in done.stdout.splitlines():
        job_id, state, its_name = line.split(maxsplit=2)
        if its_name.strip() == name:
            return job_id.split("_")[0], state
    return "", ""


def enqueue(
    tasks: Sequence[SlurmTask],
    logs: Path,
    name: str,
    allocation: Allocation,
    requeues: int,
    cluster: str = "slurm",
) -> list[Any]:
    """Submits the tasks; several are an array. Returns the jobs of submitit."""
    import submitit
    from submitit.core.utils import FailedJobError

    more = allocation.more
    # srun does not have it from sbatch.
    cpus = [f"--cpus-per-task={more['cpus-per-task']}"] if "cpus-per-task" in more else []
    executor = submitit.AutoExecutor(
        logs, cluster=cluster, **{f"{cluster}_max_num_timeout": requeues}
    )
    executor.update_parameters(
        name=name,
        timeout_min=allocation.minutes,
        nodes=allocation.nodes,
        tasks_per_node=1,
        stderr_to_stdout=True,
        slurm_signal_delay_s=allocation.signal_seconds,
        slurm_array_parallelism=allocation.at_once or len(tasks),
        slurm_srun_args=cpus,
        slurm_additional_parameters={**more, "requeue": True},
    )
    try:
        # Inside of another job, its variables would be taken for options. submitit prints what
        # sbatch says before it raises it.
        with submitit.helpers.clean_env(), contextlib.redirect_stderr(io.StringIO()):
            return executor.submit_array(tasks)
    except FailedJobError as error:
        lines = str(error).splitlines()
        said = [line.partition("error: ")[2] for line in lines if "error: " in line] or lines
        raise LaunchError(f"sbatch refused the job: {'; '.join(said)}") from error
