"""Every command that the documentation shows is understood, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.commands import dit_encode, dit_sample, evaluate, fid, training
from spiralrope_cli.core.jobs import score_plan

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

GOLDEN = ROOT / "tests" / "golden" / "checkpoints"
STAND_INS = {
    "deit-b": str(GOLDEN / "deit_tiny_checkpoint.pth"),
    "dit-xl2": str(GOLDEN / "dit_tiny_0000007.pt"),
    "207,88": "7,8",
}
"""What is published is not here; a small file of the same layout is."""


def blocks(language):
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


COMMANDS = [
    (page, line)
    for page, block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("spiralrope ")
]


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_block_runs(page, line, runs, image_folder, tiny_vae, monkeypatch):
    launched = []
    for command in (training, fid, evaluate, dit_sample, dit_encode):
        monkeypatch.setattr(command, "launch", lambda job, run: launched.append(run))
    monkeypatch.setattr(score_plan, "prepare", lambda run: run)  # it would look for the files
    words = shlex.split(line, comments=True)[1:]
    words = [STAND_INS.get(word, word) for word in words]
    if words[0] == "run":
        words = planned(words, image_folder, tiny_vae)
    if words[0] in ("dit-sample", "dit-encode"):
        words += ["--vae", str(tiny_vae)]
    if words[0] == "eval" and STAND_INS["deit-b"] not in words:
        words += [STAND_INS["deit-b"]]
    if words[0].startswith("dit-") and "~/imagenet" in words:
        words[words.index("~/imagenet")] = str(image_folder / "train")
        words = [str(tiny_vae) if word == "ema" else word for word in words]
        words += ["--batch-size", "8"]
    elif words[0] != "run" and "~/imagenet" in words:
        # Any class folder stands in for ImageNet; only its size needs another batch.
        words[words.index("~/imagenet")] = str(image_folder)
        words = [word for word in words if word != "2048"]
        words = [word for word in words if word != "--batch-size"]
        words += ["--batch-size", "16", "--warmup-epochs", "0", "--mixup", "0", "--cutmix", "0"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    if words[0] == "run":
        assert not list(runs.iterdir())
        return
    if words[0] in ("export", "plot"):
        assert list(runs.glob(f"{words[0]}s/*"))
        return
    assert bool(launched) != ("--dry-run" in words)


def planned(words, image_folder, tiny_vae):
    """The plans of a pipeline, with small pictures in place of ImageNet."""
    if "--from-legacy" in words:
        return words
    if "~/imagenet" not in words:
        return [*words, "--dry-run"]
    words[words.index("~/imagenet")] = str(image_folder)
    if words[1] == "dit":
        return [*words, "--vae", str(tiny_vae), "--batch-size", "8", "--nproc", "1", "--dry-run"]
    sizes = [("batch-size", "16"), ("warmup-epochs", "0")]
    small = [word for name, n in sizes for word in (f"--{name}", n, f"--finetune-{name}", n)]
    return [*words, *small, "--nproc", "1", "--dry-run"]


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_a_python_block_runs(page, block):
    exec(compile(block, page, "exec"), {})


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word for page, block in blocks("bash") for word in re.findall(r"^make (\w+)", block, re.M)
    }
    assert named
    assert named <= targets
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


def test_pictures_are_there():
    for page in PAGES:
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / link).is_file()
