from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spiralrope_cli.core.config.models import DEIT_SIZES, DIT_SIZES
from spiralrope_cli.core.hub.catalog import ALIASES, ROWS
from spiralrope_cli.main import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def offered(runs, monkeypatch):
    """What bash is offered for the last word of a line."""

    def call(line):
        words = line.split(" ")
        env = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        env["_SPIRALROPE_COMPLETE"] = "complete_bash"
        result = CliRunner().invoke(app, [], prog_name="spiralrope", env=env)
        assert result.exit_code == 0, result.output
        return result.stdout.split()

    stages = (("pipe/dit-train", "dit-train"), ("sweep/rotate=1/pretrain", "pretrain"))
    plain = (("one", "pretrain"), ("two", "dit-train"), ("three", "finetune"))
    for name, command in (*stages, *plain):
        folder = runs / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"command: {command}\narch: x\n")
    (runs / "runs" / "fours").mkdir()
    (runs / "runs" / "fours" / "config.yaml").write_bytes(b"\xff\xfe")
    (runs / "deed.pth").touch()
    (runs / "notes.txt").touch()
    return call


NAMES = {kind: {row.name for row in ROWS if row.kind == kind} for kind in ("deit", "dit")}
NAMES["dit"] |= set(ALIASES)
DEITS = {"runs/one", "runs/three", "runs/sweep/rotate=1/pretrain"}
DITS = {"runs/two", "runs/pipe/dit-train"}


def test_arch(offered):
    assert offered("spiralrope pretrain --arch ") == list(DEIT_SIZES)
    assert offered("spiralrope pretrain --no-rope --arch deit-t") == ["deit-ti"]
    assert offered("spiralrope dit-train --arch ") == list(DIT_SIZES)
    assert offered("spiralrope dit-train --arch dit-b") == ["dit-b2", "dit-b4", "dit-b8"]
    assert offered("spiralrope dit-train --arch=dit-b4") == ["dit-b4"]


@pytest.mark.parametrize("typed", ["DiT-B", "DiT-B/", "dit-b/", "DIT-B"])
def test_arch_as_papers_write_it(offered, typed):
    begun = typed.removesuffix("/")
    expected = [f"{begun}/{patch}" for patch in (2, 4, 8)]
    assert offered(f"spiralrope dit-train --arch {typed}") == expected


def test_every_offered_arch_is_understood(offered):
    from spiralrope_cli.core.config.models import dit_size

    both = offered("spiralrope dit-train --arch D") + offered("spiralrope dit-train --arch ")
    assert len(both) == 2 * len(DIT_SIZES)
    assert {dit_size(name) for name in both} == set(DIT_SIZES.values())


def test_sources_are_those_that_the_command_takes(offered):
    for command in ("finetune", "eval", "eval x", "plot attention"):
        assert set(offered(f"spiralrope {command} ")) == DEITS | NAMES["deit"] | {"hf:"}
    for command in ("dit-sample", "dit-train --init-from"):
        assert set(offered(f"spiralrope {command} ")) == DITS | NAMES["dit"] | {"hf:"}
    everything = DEITS | DITS | NAMES["deit"] | NAMES["dit"] | {"hf:"}
    assert set(offered("spiralrope export ")) == everything


def test_plot(offered):
    assert set(offered("spiralrope plot run ")) == DEITS | DITS
    assert offered("spiralrope plot rope --arch DiT-S") == ["DiT-S/2", "DiT-S/4", "DiT-S/8"]
    assert offered("spiralrope plot rope --arch deit-s") == ["deit-s"]


def test_partial_words_of_sources(offered):
    assert offered("spiralrope dit-sample dit-xl2@") == ["dit-xl2@400k", "dit-xl2@7m"]
    newest_first = ["runs/three", "runs/one", "runs/sweep/rotate=1/pretrain"]
    assert offered("spiralrope finetune ru") == newest_first
    assert offered("spiralrope finetune runs/o") == ["runs/one"]
    assert offered("spiralrope eval de") == ["deed.pth", "deit-b", "deit-l", "deit-s"]


def test_paths_are_left_to_the_shell(offered):
    for line in ("eval notes", "eval runs/one/ch", "pretrain --config ru", "pretrain --data ima"):
        assert offered(f"spiralrope {line}") == []
    assert offered("spiralrope export x --layout published --out we") == []
    for line in ("plot attention x pho", "plot samples sam", "fid sam", "fid samples.npz pho"):
        assert offered(f"spiralrope {line}") == []


def test_names_of_data_sets_and_of_published_things(offered):
    for command in ("pretrain", "finetune x", "eval", "dit-train"):
        assert offered(f"spiralrope {command} --data f") == ["fashion-mnist"]
    assert set(offered("spiralrope fetch ")) == {row.name for row in ROWS} | set(ALIASES)
    assert offered("spiralrope fetch deit-b vae") == ["vae-ema", "vae-mse"]


def test_options_of_few_words(offered):
    assert offered("spiralrope pretrain --precision ") == ["auto", "bf16", "tf32", "fp32"]
    assert offered("spiralrope fid a b --precision b") == ["bf16"]
    assert offered("spiralrope dit-sample x --vae m") == ["mse"]
    assert offered("spiralrope dit-sample x --vae ") == ["ema", "mse", "none"]
    assert offered("spiralrope dit-encode --vae ") == ["ema", "mse"]
    assert offered("spiralrope export x --layout s") == ["safetensors"]


def test_nothing_heavy_is_loaded():
    code = (
        "import os, sys\nfrom spiralrope_cli.main import main\n"
        "sys.argv = ['spiralrope']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'timm', 'numpy', 'yaml', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    env = {"COMP_WORDS": "spiralrope dit-sample d", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env, "_SPIRALROPE_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "dit-xl2@7m" in done.stdout.split()


@pytest.mark.parametrize(
    ("shell", "start"),
    [
        ("bash", ["bash", "--norc", "--noprofile", "-i"]),
        ("zsh", ["zsh", "-f", "-i"]),
    ],
)
def test_a_real_shell_completes(shell, start, runs):
    """Types the beginning of a line and a tab, as a person would."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    program = runs / "bin" / "spiralrope"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m spiralrope_cli "$@"\n')
    program.chmod(0o755)
    (runs / "weights").mkdir()
    (runs / "weights" / "mine.pth").touch()
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("COMP_")},
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(runs),
        "TERM": "dumb",
    }
    source = subprocess.run(
        [program],
        env={**env, "_SPIRALROPE_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    script = runs / "completion"
    script.write_text(("autoload -Uz compinit; compinit -D\n" if shell == "zsh" else "") + source)
    with Terminal(start, env, runs) as terminal:
        terminal.say(f". {script}; PS1='> '; echo loaded-$((1 + 1))\n", "loaded-2")
        terminal.say("spiralrope dit-train --arch DiT-XL/\t\t", "DiT-XL/8")
        terminal.say("\x15spiralrope fetch imagenet25\t", "imagenet256-ref")
        terminal.say("\x15spiralrope fetch incep\t", "inception")
        terminal.say("\x15spiralrope finetune wei\tmi\t", "mine.pth")


class Terminal:
    """A shell in a terminal of its own."""

    def __init__(self, command, env, folder):
        self.handle, inner = pty.openpty()
        self.shell = subprocess.Popen(
            command,
            env=env,
            cwd=folder,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shell.kill()
        self.shell.wait()
        os.close(self.handle)

    def say(self, keys, answer):
        """Types keys and waits for an answer."""
        os.write(self.handle, keys.encode())
        seen, deadline = "", time.monotonic() + 30
        while answer not in seen.replace("\r\n", "").replace("\x07", ""):
            left = deadline - time.monotonic()
            assert left > 0, seen
            if select.select([self.handle], [], [], left)[0]:
                seen += os.read(self.handle, 4096).decode(errors="replace")
