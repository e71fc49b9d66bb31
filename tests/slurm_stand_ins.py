"""Stand-ins for the programs of SLURM on one machine; `install` writes them into a folder for PATH.

sbatch refuses options that it does not know, and runs the script as a job. srun starts all tasks
here, with the variables that srun sets. scontrol requeues a job. scancel sends a signal to all
processes of a job's tasks, the most that a cluster may do. squeue lists jobs that have not ended.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
SBATCH = {
    *("account", "array", "constraint", "cpus-per-task", "exclude", "exclusive", "gpus-per-node"),
    *("job-name", "mem", "nodes", "ntasks-per-node", "open-mode", "output", "partition", "qos"),
    *("requeue", "signal", "time", "wckey"),
}
FIRST_ID = 4711


def install(folder: Path) -> Path:
    """Writes the programs; returns the folder where they keep what they know of the jobs."""
    state = folder / "state"
    state.mkdir(parents=True)
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} {state} "$@"\n')
        program.chmod(0o755)
    return state


def options_of(script: str) -> dict[str, str]:
    """The #SBATCH lines of a script."""
    lines = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line[2:].partition("=") for line in lines)}


def sbatch(state: Path, script: str) -> None:
    given = options_of(Path(script).read_text())
    if unknown := set(given) - SBATCH:
        sys.exit(f"sbatch: error: unrecognized option '--{unknown.pop()}'")
    if given.get("partition") == "nowhere":
        sys.exit(
            "sbatch: error: invalid partition specified: nowhere\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified"
        )
    job_id = FIRST_ID + len(list(state.glob("*.sh")))
    kept = state / f"{job_id}.sh"
    kept.write_text(Path(script).read_text())
    first, last = re.match(r"(\d+)-(\d+)|", given.get("array", "")).groups()
    elements = range(int(first), int(last) + 1) if first else [None]
    for element in elements:
        name = str(job_id) if element is None else f"{job_id}_{element}"
        (state / f"{name}.json").write_text(json.dumps(given))
        if not (state / "hold").exists():
            words = [sys.executable, __file__, "job", str(state), name]
            subprocess.Popen(
                words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
    print(f"Submitted batch job {job_id}")


def job(state: Path, name: str) -> None:
    """Runs a job until it ends without a requeue."""
    told = state / f"{name}.json"
    given, requeue = json.loads(told.read_text()), state / f"{name}.requeue"
    job_id, _, element = name.partition("_")
    nodes = int(given.get("nodes", 1))
    env = {
        **os.environ,
        "SLURM_JOB_ID": str(int(job_id) + int(element or 0)),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes),
        "SLURM_NTASKS": str(nodes * int(given.get("ntasks-per-node", 1))),
    }
    if element:
        env |= {"SLURM_ARRAY_JOB_ID": job_id, "SLURM_ARRAY_TASK_ID": element}
    while True:
        with open(given["output"].replace("%j", name).replace("%A_%a", name), "a") as log:
            script = ["bash", state / f"{job_id}.sh"]
            done = subprocess.run(script, env=env, stdout=log, stderr=subprocess.STDOUT)
        if not requeue.exists():
            break
        requeue.unlink()
    told.rename(state / f"{name}.ended-{done.returncode}")


def srun(state: Path, *words: str) -> None:
    options = {}
    rest = list(words)
    while rest[0].startswith("--"):
        name, equals, value = rest.pop(0)[2:].partition("=")
        options[name] = value if equals or name == "unbuffered" else rest.pop(0)
    element = os.environ.get("SLURM_ARRAY_TASK_ID")
    job_id = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    name = job_id if element is None else f"{job_id}_{element}"
    count, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = []
    for rank in range(count):
        node, local = divmod(rank, count // nodes)
        env = {
            **os.environ,
            "SLURM_PROCID": str(rank),
            "SLURM_NODEID": str(node),
            "SLURM_LOCALID": str(local),
            "SLURM_STEP_NUM_TASKS": str(count),
            "SLURM_STEP_TASKS_PER_NODE": f"{count // nodes}(x{nodes})",
            "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
        }
        output = options.get("output", "/dev/stdout")
        for key, value in {"%j": name, "%A": job_id, "%a": element, "%t": rank}.items():
            output = output.replace(key, str(value))
        with open(output, "a") as log:
            both = {"stdout": log, "stderr": subprocess.STDOUT}
            tasks.append(subprocess.Popen(rest, env=env, start_new_session=True, **both))
    (state / f"{name}.tasks").write_text(" ".join(str(task.pid) for task in tasks))
    sys.exit(max(task.wait() for task in tasks))


def squeue(state: Path, *words: str) -> None:
    assert words == ("--me", "--noheader", "--format", "%i %T %j"), words
    for told in sorted(state.glob("*.json")):
        begun = told.with_suffix(".tasks").exists()
        print(
            told.stem, "RUNNING" if begun else "PENDING", json.loads(told.read_text())["job-name"]
        )


def scancel(state: Path, name: str, option: str = "--signal=TERM") -> None:
    """To every process of each task: some clusters send it to the tasks alone."""
    for pid in (state / f"{name}.tasks").read_text().split():
        os.killpg(int(pid), signal.Signals[f"SIG{option.partition('=')[2]}"])


def scontrol(state: Path, verb: str, name: str) -> None:
    assert verb == "requeue"
    (state / f"{name}.requeue").touch()


def wait_for(condition, seconds: float = 240, what: str = "") -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what or "it took too long"
        time.sleep(0.1)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
