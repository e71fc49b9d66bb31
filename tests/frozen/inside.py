"""Records a checkout from a process that has it on its path; `__main__.py` starts it.

It forks itself for each command line, which so needs no seconds to load torch.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from things import digest, gradients, write_things

HERE = Path(__file__).resolve().parent
RUNS, COMMANDS = HERE / "runs.txt", HERE / "commands.txt"
HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "diffusers",
    "torch_fidelity",
    "scipy.linalg",
    "matplotlib.pyplot",
)
OF_THE_MACHINE = re.compile(r"time|date|.*seconds.*|.*_per_s|sha256|.*_sha256|versions?|commit")
"""Keys that are left out, at every depth."""


def sections(path: Path) -> dict[str, list[str]]:
    """`[title]` -> the lines below it, without comments."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("[") and line.endswith("]"):
            lines = found.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in nested dicts and lists; empty ones are values."""
    if isinstance(tree, argparse.Namespace):
        tree = vars(tree)
    if isinstance(tree, (list, tuple)):
        tree = {f"{place:04}": value for place, value in enumerate(tree)} or "empty list"
    if not isinstance(tree, dict):
        yield path, tree
        return
    for key in sorted(tree, key=str):
        yield from leaves(tree[key], f"{path}/{key}")


def record(checkout: Path, out: Path, parts: list[str]) -> None:
    """Records all parts; the working folder is empty and temporary."""
    for name in HEAVY:
        importlib.import_module(name)
    package = importlib.import_module("spiralrope_cli")
    assert Path(str(package.__file__)).is_relative_to(checkout), package.__file__
    for module in pkgutil.walk_packages(package.__path__, "spiralrope_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    runs, work = sections(RUNS), Path.cwd()
    recorder = Recorder(checkout, work)
    known = [*(name for name in runs if name != "things"), "gradients", "commands"]
    if unknown := set(parts) - set(known):
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(known)}")
    write_things(work)
    recorder.runs(work / "things", runs["things"])
    facts: dict[str, Any] = {}
    for part in parts or known:
        start = time.monotonic()
        if part == "commands":
            facts[part] = recorder.answers(sections(COMMANDS))
        elif part == "gradients":
            facts[part] = gradients()
        else:
            codes = recorder.runs(work / part, runs[part])
            facts[part] = {"runs": codes, "files": recorder.files(work / part)}
        print(f"{part}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    out.write_text(json.dumps(facts, indent=1, sort_keys=True, default=str) + "\n")


class Recorder:
    """Runs command lines of a checkout and describes what they leave."""

    def __init__(self, checkout: Path, work: Path) -> None:
        self.checkout, self.work = checkout, work
        self.main = importlib.import_module("spiralrope_cli.main")
        sys.argv = ["spiralrope", "pretrain", "--lr", "nan"]  # loads what Typer loads late
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
            self.main.main()
        gc.freeze()  # or each fork would copy what its collector looks at

    def start(self, words: list[str], cwd: Path) -> int:
        """Forks a process for one command line; its output goes to files beside `cwd`."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.chdir(cwd)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(self.work / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = ["spiralrope", *words]
            self.main.main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:  # noqa: BLE001 - a traceback is an answer too
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def run(self, words: list[str], cwd: Path) -> int:
        """One command line to its end; the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(words, cwd), 0)[1])

    def said(self, name: str) -> str:
        """Its stdout or stderr."""
        return (self.work / name).read_text(errors="replace")

    def runs(self, cwd: Path, lines: list[str]) -> dict[str, Any]:
        """Runs lines one after the other: exit code and stdout of each."""
        cwd.mkdir(exist_ok=True)
        answers = {}
        for line in lines:
            stopped = line.startswith("stopped: ")
            words = shlex.split(line.removeprefix("stopped: "))
            code = self.stop(words, cwd) if stopped else self.run(words, cwd)
            text = self.said("stdout")
            if code != (143 if stopped else 0):  # a fact as others, but hardly one that was meant
                print(f"left with {code}: {line}\n{self.said('stderr')}", file=sys.stderr)
            parsed = self.scrubbed(json.loads(text)) if "--json" in words and not code else None
            answers[line] = {"code": code, "stdout": parsed or self.lines(text)}
        return answers

    def stop(self, words: list[str], cwd: Path) -> int:
        """Runs until the first checkpoint is there, then stops the command; the exit code."""
        pid, checkpoints = self.start(words, cwd), cwd / words[words.index("--out") + 1]
        while not list(checkpoints.glob("checkpoints/0*")):
            if os.waitpid(pid, os.WNOHANG)[0]:
                sys.exit(f"{words} ended early\n{self.said('stderr')}")
            time.sleep(0.005)
        os.kill(pid, signal.SIGTERM)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def answers(self, groups: dict[str, list[str]]) -> dict[str, Any]:
        """Command line -> exit code and what was said, each in a fresh copy of the things."""
        files = dict(line.split(" ", 1) for line in groups.pop("files"))
        lines = [f"{start} {line}".strip() for start, group in groups.items() for line in group]
        if twice := [line for line, count in Counter(lines).items() if count > 1]:
            sys.exit(f"{COMMANDS.name} has twice: {twice}")
        found = {}
        for line in lines:
            cwd = self.work / "line"
            shutil.rmtree(cwd, ignore_errors=True)
            shutil.copytree(self.work / "things", cwd)
            for name, text in files.items():
                (cwd / name).write_text(text.replace("\\n", "\n") + "\n")
            code = self.run([*shlex.split(line)], cwd)
            said = {name: self.lines(self.said(name)) for name in ("stdout", "stderr")}
            found[line] = {"code": code, **said}
        return found

    def lines(self, text: str) -> list[str]:
        """What was said, without what another minute, machine, folder or width changes."""
        text = self.normalised(text)
        text = re.sub("[\u2500-\u259f]", " ", text)
        lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
        return [line for line in lines if line]

    def normalised(self, text: str) -> str:
        """Without paths of this recording, times, rates and digests."""
        for path, name in ((self.work, "WORK"), (self.checkout, "CHECKOUT")):
            text = text.replace(str(path), name)
        for pattern, word in (
            (r"\x1b\[[0-9;?]*[A-Za-z]", ""),
            (r"\b[0-9a-f]{64}\b|\b[0-9a-f]{40}\b", "DIGEST"),
            (r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?(\.\d+)?(\+\d\d:\d\d|Z)?)?", "DATE"),
            (r"\b\d+:\d\d:\d\d\b", "TIME"),
            (r"[\d.,]+( images/s| per second| s\b)", "RATE"),
            (r"images/s +[\d.,]+", "RATE"),
            (r"[\d.]+ [kKMGT]i?B free", "SPACE free"),
            (r"float\d\d \d+(?=[^.\n]* GFLOP/s)", "SPEED"),
        ):
            text = re.sub(pattern, word, text)
        return text

    def scrubbed(self, tree: Any) -> Any:
        """Nested values without those of the machine or the minute."""
        if isinstance(tree, argparse.Namespace):
            tree = vars(tree)
        if isinstance(tree, dict):
            kept = {
                key: value for key, value in tree.items() if not OF_THE_MACHINE.fullmatch(str(key))
            }
            return {str(key): self.scrubbed(value) for key, value in kept.items()}
        if isinstance(tree, (list, tuple)):
            return [self.scrubbed(value) for value in tree]
        if isinstance(tree, str) and tree.startswith("{"):  # a config in a file's metadata
            return self.scrubbed(json.loads(tree))
        return self.normalised(tree) if isinstance(tree, str) else tree

    def files(self, folder: Path) -> dict[str, Any]:
        """Path -> content, of every file in a folder."""
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): self.content(path) for path in found}

    def content(self, path: Path) -> Any:
        """What of a file is frozen; of a kind that is not known here, that it is there."""
        import numpy as np
        import torch
        import yaml
        from PIL import Image
        from safetensors import safe_open

        if path.name in ("environment.json", "curves.png"):  # of this machine, with its speed
            return "there"
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return {"tensors": digest(tensors), "metadata": self.scrubbed(file.metadata())}
        if path.suffix in (".pt", ".pth"):
            tree = dict(leaves(torch.load(path, map_location="cpu", weights_only=False)))
            tensors = {name: tree.pop(name) for name in list(tree) if torch.is_tensor(tree[name])}
            return {"tensors": digest(tensors), "values": self.scrubbed(tree)}
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                words = {
                    name: str(arrays[name]) for name in arrays if arrays[name].dtype.kind == "U"
                }
                numbers = {name: digest({"": arrays[name]}) for name in arrays if name not in words}
                return {**self.scrubbed(words), **numbers}
        if path.suffix == ".npy":
            return digest({"": np.load(path)})
        if path.suffix == ".png":
            return digest({"": np.asarray(Image.open(path))})
        if path.suffix == ".jsonl":
            return [self.scrubbed(json.loads(line)) for line in path.read_text().splitlines()]
        if path.suffix == ".json":
            return self.scrubbed(json.loads(path.read_text()))
        if path.suffix == ".yaml":
            return self.scrubbed(yaml.safe_load(path.read_text()))
        return self.lines(path.read_text()) if path.suffix == ".md" else "there"


if __name__ == "__main__":
    record(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
