"""What the documentation shows works: every command, every line of Python, every link.

Each command of README.md and docs/ goes through the app as it stands there, in a folder that holds
small things under the names that the pages use, up to where workers would start. The first of those
that differ in more than their plan goes on, with a tiny network. What no test runs is in NOT_RUN.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cli_reference
import numpy as np
import pytest
import slurm_stand_ins
import torch
import typer
from channel_layout import FIGURE, HEAD_DIM, ROTATES, draw
from conftest import call_launch_instead
from hub_server import CHECKS_CARDS_ELSEWHERE
from packaging.version import Version
from PIL import Image
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core import storage
from spiralrope_cli.core.data import sample_files
from spiralrope_cli.core.runtime import progress

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "cli.md"
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {GENERATED})]

NOT_RUN = {
    "pip install .": "it would install the package that is under test",
    "spiralrope --install-completion": "it writes into the shell's configuration; what it writes "
    "is run in real shells by tests/commands/test_completion.py",
    "docker build -t spiralrope .": "there is no docker here; a test compares the Dockerfile",
    "if [ $? -eq 143 ]; then scontrol requeue $SLURM_JOB_ID; fi": "a test runs the file",
    **dict.fromkeys(
        ("spiralrope fetch inception", "spiralrope fetch imagenet256-ref --out ."),
        "they come from the web; tests/commands/test_fetch.py does it by a local server",
    ),
    "COMP_WORDBREAKS=${COMP_WORDBREAKS//@}": "a setting of bash, not a command of ours",
}

GOLDEN = ROOT / "tests" / "golden" / "checkpoints"
DEIT_FILE, DIT_FILE = "published/deit_tiny_checkpoint.pth", "published/dit_tiny_0000007.pt"
STAND_INS = {
    "deit-b": [DEIT_FILE],
    "runs/pretrain-deit-b-imagenet-r2": [DEIT_FILE],
    "runs/sweep-deit-deit-s-imagenet/rotate=2-seed0/finetune": [DEIT_FILE],
    "runs/finetune-deit-b-imagenet-r2": [DEIT_FILE],
    "dit-xl2": [DIT_FILE, "--vae", "vae"],
    "runs/dit-train-dit-b4-imagenet-r2": [DIT_FILE, "--vae", "vae"],
    "runs/dit-train-dit-xl2-imagenet-r2": [DIT_FILE, "--vae", "vae"],
    "207,88": ["7,8"],
    "ema": ["vae"],  # of --vae
    "mse": ["vae"],
    "160": ["16"],
    "224": ["32"],
    "288": ["64"],
    "384": ["48"],
    "/data": ["~/imagenet"],  # inside of a container
    "wds/https://host/set-{train-{0000..0127},val-{00..07}}.tar": [
        "wds/pipe:cat ~/shards/{train,val}.tar"
    ],
    "wds/https://host/set-val-{00..07}.tar": ["wds/pipe:cat ~/shards/val.tar"],
    "wds/pipe:aws s3 cp s3://bucket/set-train-{0000..0127}.tar -": [
        "wds/pipe:cat ~/shards/train.tar"
    ],
    "run ~/imagenet": ["digits"],  # the recipes of its stages need more pictures
}
"""What is published is not here, nor is the time for large pictures; some for one command alone."""

_NEW = ["--name", "new"]  # the folder of the usual name holds another run already
_FEW_PICTURES = [
    *("--batch-size", "16", "--warmup-epochs", "0", "--mixup", "0", "--cutmix", "0", *_NEW),
]
FITTED = {
    "pretrain": _FEW_PICTURES,
    "finetune": _FEW_PICTURES,
    "dit-train": ["--batch-size", "8", *_NEW],
    "dit-encode": ["--vae", "vae"],
    "fid": ["--num-samples", "16"],
    "run": [
        "--dry-run"
    ],  # its stages are those above, its tests run them; --from-legacy only prints
}
"""Options that are added to every line of a command, as the data that stand in are few."""

_ONE_PROCESS = ["--nproc", "1", "--nnodes", "1", "--precision", "fp32"]
_TINY_RUN = ["--max-steps", "2", "--micro-batch-size", "8", "--image-size", "32", *_ONE_PROCESS]
TINY = {
    "pretrain": ["--arch", "deit-32x1x1", *_TINY_RUN],
    "finetune": _TINY_RUN,
    "eval": _ONE_PROCESS,
    "dit-train": [
        "--arch",
        "dit-32x1x1-2",
        "--max-steps",
        "2",
        "--image-size",
        "32",
        *_ONE_PROCESS,
    ],
    "dit-sample": ["--num-samples", "2", "--num-sampling-steps", "2", *_ONE_PROCESS],
    "dit-encode": ["--image-size", "32", *_ONE_PROCESS],
    "fid": ["--kid-subset-size", "4", *_ONE_PROCESS],
}
"""Options that are added where the line goes on to the end."""

PLAN_ONLY = {
    *("--rotate", "--name", "--seed", "--out", "--scaling", "--projection", "--json", "--select"),
    *("--bootstrap", "--kid-subset-size", "--classes", "--rdzv-endpoint", "--dry-run", "--vae"),
    *(
        "--fid-every",
        "--fid-reference",
        "--batch-size",
        "--num-samples",
        "--schedule",
        "--save-stats",
        "--max-restarts",
        "--shard",
    ),
}
"""Options that alone make no line worth another run to the end."""

NOT_TO_THE_END = {
    "fashion-mnist": "the data set is not here; tests/core/data reads one of its layout",
}


def blocks(*languages):
    """(page, language, text) of every block in one of these languages."""
    fences = "|".join(languages)
    return [
        (page.name, language, text)
        for page in PAGES
        for language, text in re.findall(
            rf"^```({fences})\n(.*?)^```", page.read_text(), re.M | re.S
        )
    ]


def shell_lines():
    """(page, line) of every command line in the documentation, without comments."""
    found = []
    for page, language, text in blocks("bash", "sh", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            if language == "console":
                line = line[2:] if line.startswith("$ ") else ""
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if line:
                found.append((page, line))
    return found


def words_of(line):
    """The words after `spiralrope`, whoever starts it; None where it is another program."""
    words = shlex.split(line)
    while words and re.fullmatch(r"srun|([A-Z_]+|--[a-z-]+)=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["spiralrope"]:
        return words[1:]
    if words[:2] == ["docker", "run"]:
        return words[words.index("spiralrope") + 1 :]
    if words[:1] == ["torchrun"]:
        return words[words.index("spiralrope_cli") + 1 :]
    return None


LINES = shell_lines()
COMMANDS = list(dict.fromkeys(line for _, line in LINES if words_of(line) and line not in NOT_RUN))


def told_apart(line):
    """What makes a line worth a run to the end, None where it is run up to its plan alone."""
    words = words_of(line)
    if {"--dry-run", "--slurm"}.intersection(words) or NOT_TO_THE_END.keys() & set(words):
        return None
    ours = {word for word in TINY.get(words[0], ()) if word.startswith("--")}
    options = {word for word in words if word.startswith("--")} - ours - PLAN_ONLY
    return words[0], frozenset(options)


TO_THE_END = {told_apart(line): line for line in reversed(COMMANDS) if told_apart(line)}


def test_every_line_of_a_shell_block_is_run_or_has_a_reason():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    tested = (ROOT / "tests" / "test_examples.py").read_text()
    unknown = []
    for page, line in LINES:
        program, *rest = line.split()
        if words_of(line) or line in NOT_RUN:
            continue
        is_target = program == "make" and rest and set(rest) <= targets
        is_file = program == "python" and (ROOT / rest[0]).is_file()
        if is_target or (is_file and (Path(rest[0]).stem in tested or "benchmarks" in rest[0])):
            continue
        unknown.append((page, line))
    assert not unknown
    assert set(NOT_RUN) <= {line for _, line in LINES}, "NOT_RUN names what no page shows"
    assert len(COMMANDS) >= 30
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"


@pytest.fixture(scope="session")
def small_things(tmp_path_factory, trained_once, drawn_once, tiny_vae, digit_pictures):
    """A folder with small things under the names that the pages use."""
    home = tmp_path_factory.mktemp("documentation")
    images = digit_pictures[:16]
    for name in ("samples.npz", "samples-xl2/samples.npz", "VIRTUAL_imagenet256_labeled.npz"):
        (home / name).parent.mkdir(exist_ok=True)
        np.savez(home / name, arr_0=images[::-1])
    for name in ("photos", "samples"):
        (home / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(home / name / f"{number}.png")
    np.savez(home / "photos.npz", arr_0=images)
    Image.new("RGB", (32, 32), "red").save(home / "photo.jpg")
    for number in range(30):  # as many classes as the small weights have
        folder = home / "imagenet" / ("val" if number < 10 else "train") / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit_pictures[number]).save(folder / f"{number}.png")
    (home / "shards").mkdir()
    for split in ("train", "val"):
        with tarfile.open(home / "shards" / f"{split}.tar", "w") as tar:
            tar.add(home / "imagenet" / split, ".")
    for name in ("imagenet-r", "imagenetv2-matched-frequency-format-val"):
        (home / name).symlink_to(home / "imagenet" / "val")
    (home / "vae").symlink_to(tiny_vae)
    # Copies: eval writes beside the weights.
    (home / "published").mkdir()
    for file in (DEIT_FILE, DIT_FILE):
        shutil.copy(GOLDEN / Path(file).name, home / file)
    shutil.copytree(trained_once, home / "runs" / "pretrain-deit-ti-digits-r2")
    shutil.copytree(drawn_once, home / "runs" / "dit-train-dit-ti2-digits-r0")
    words = ["dit-encode", "--data", str(home / "imagenet"), "--out", str(home / "latents")]
    more = ["--vae", str(tiny_vae)]
    pipeline = ["export", str(home / DIT_FILE), "--layout", "diffusers", *more]
    shared = ["export", str(trained_once), "--ema", "--out", str(home / "shared")]
    for line in (
        [*words, *more, "--image-size", "32"],
        [*pipeline, "--out", str(home / "dit-pipeline")],
        shared,
    ):
        result = CliRunner().invoke(cli.app, line)
        assert result.exit_code == 0, result.output
    return home


@pytest.fixture
def among_small_things(small_things, runs, monkeypatch, hub):
    """The working folder of one line: it finds them all, and writes beside them or on a Hub."""
    shared = small_things / "shared"
    hub.repos["me/vit-digits"] = {path.name: path.read_bytes() for path in shared.iterdir()}
    hub.private.add("me/vit-digits")
    for entry in small_things.iterdir():
        if entry.name != "runs":
            (runs / entry.name).symlink_to(entry)
    (runs / "runs").mkdir()
    for entry in (small_things / "runs").iterdir():
        (runs / "runs" / entry.name).symlink_to(entry.resolve())
    usage = shutil.disk_usage(runs)  # plans of 50 000 images are checked too
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10**14))
    monkeypatch.setenv("HOME", str(runs))
    monkeypatch.setenv("SPIRALROPE_CACHE", str(runs / "cache"))
    return runs


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_runs(line, among_small_things, monkeypatch, request):
    words = words_of(line)
    for_all = {word: STAND_INS.get(word, [word]) for word in words}
    words = [new for word in words for new in STAND_INS.get(f"{words[0]} {word}", for_all[word])]
    if "--save-stats" in words:
        words[words.index("--save-stats") + 1] = "kept.npz"  # photos.npz is there already
    if words[0] != "--out" and "--out" in words:
        place = words.index("--out") + 1
        words[place] = f"new-{words[place]}"
    if "--slurm" in words:
        (slurm_stand_ins.install(among_small_things / "bin") / "hold").touch()
        monkeypatch.setenv("PATH", f"{among_small_things / 'bin'}:{os.environ['PATH']}")
    words += [] if "--from-legacy" in words else FITTED.get(words[0], [])
    if "--fid-every" in words:
        words += [
            "--fid-weights",
            str(request.getfixturevalue("inception_weights")),
            "--vae",
            "vae",
        ]
    if words[0] == "fid":
        words += ["--weights", str(request.getfixturevalue("inception_weights"))]
    if "--shard" in words and Version(torch.__version__) < Version("2.11"):
        pytest.skip("torch before 2.11 cannot shard on a CPU")
    if "--push" in words and CHECKS_CARDS_ELSEWHERE:
        pytest.skip("this huggingface_hub asks huggingface.co about model cards, not HF_ENDPOINT")
    launched = []
    if TO_THE_END.get(told_apart(line)) == line:
        words += TINY.get(words[0], [])
    else:
        launched = call_launch_instead(monkeypatch)
    result = CliRunner().invoke(cli.app, words, prog_name="spiralrope")
    assert result.exit_code == 0, f"{words}\n{result.output}{result.exception!r}"
    if "--dry-run" in words:
        assert not launched


def test_the_file_for_sbatch_is_a_job_that_is_requeued_after_its_signal(
    among_small_things, monkeypatch
):
    [script] = [text for _, _, text in blocks("bash") if text.startswith("#!/bin/bash")]
    home = among_small_things
    state = slurm_stand_ins.install(home / "bin")
    # Two tasks; each is stopped when it runs for the first time.
    (home / "bin" / "spiralrope").write_text(
        '#!/bin/sh\nif mkdir "first-$SLURM_PROCID" 2>/dev/null; then exit 143; fi\n'
        f'exec {sys.executable} -m spiralrope_cli "$@" --arch deit-32x1x1 --max-steps 2 '
        "--batch-size 16 --image-size 32 --warmup-epochs 0 --precision fp32 --out run\n"
    )
    (home / "bin" / "spiralrope").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    (home / "job.sh").write_text(script.replace("--ntasks-per-node=8", "--ntasks-per-node=1"))
    subprocess.run(["sbatch", "job.sh"], check=True)
    slurm_stand_ins.wait_for((state / "4711.ended-0").exists)
    assert "2 process(es)" in (home / "pretrain-4711.log").read_text()
    assert (home / "run" / "checkpoints" / "0000002").is_dir()


def test_the_dockerfile_does_what_the_readme_says():
    lines = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines()]
    steps = [(step, rest) for step, rest in lines if step != "#"]
    commands = [rest.replace("--no-cache-dir ", "") for step, rest in steps if step == "RUN"]
    assert commands == ["pip install ."]
    assert set(commands) <= {line for page, line in LINES if page == "README.md"}
    project = (ROOT / "pyproject.toml").read_text()
    [(base, entry)] = [(dict(steps)["FROM"], json.loads(dict(steps)["ENTRYPOINT"]))]
    assert f"\n{entry[0]} = " in project
    least = re.search(r'requires-python = ">=3\.(\d+)"', project)[1]
    assert int(re.match(r"python:3\.(\d+)-slim", base)[1]) >= int(least)


def test_every_command_goes_to_the_end_somewhere():
    run = {key[0] for key in TO_THE_END}
    assert set(TINY) <= run
    assert {"export", "fetch"} <= run


@pytest.mark.parametrize(("page", "language", "block"), blocks("python"))
def test_a_python_block_runs(page, language, block, among_small_things, monkeypatch):
    place = "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(place, str(among_small_things / "modules"))
    exec(compile(block, page, "exec"), {})


def parsed(command, name, words, parent=None):
    """The context of the innermost command, options and values understood, nothing executed."""
    context = command.make_context(name, list(words), parent=parent)
    if not hasattr(command, "commands"):
        return context
    rest = [*context._protected_args, *context.args]
    inner = command.resolve_command(context, rest)[1]
    return parsed(inner, rest[0], rest[1:], context)


def examples_of_help():
    """Lines of the examples that `COMMAND --help` shows."""
    text = "".join(re.findall(r"```bash\n(.*?)```", cli_reference.reference(), re.DOTALL))
    return [re.sub(r"\s+#.*", "", line) for line in text.splitlines()]


@pytest.mark.parametrize("line", examples_of_help())
def test_an_example_of_help_is_understood(line):
    assert parsed(typer.main.get_command(cli.app), "spiralrope", words_of(line)).params


@pytest.mark.skipif(
    Version(typer.__version__) < Version("0.29"),
    reason="an earlier typer puts arguments in braces",
)
def test_the_reference_of_commands_is_what_the_app_says(monkeypatch):
    for name, value in {"COLUMNS": "50", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    assert GENERATED.read_text() == cli_reference.reference(), "make docs writes it anew"


def test_the_page_of_the_python_api_shows_what_the_fields_of_rope_say():
    assert cli_reference.rope_fields() in cli_reference.API_PAGE.read_text(), "make docs writes it"


def test_the_picture_of_channels_is_what_the_embedding_does():
    text = FIGURE.read_text()
    assert text == draw(), "make docs draws it anew"
    boxes = re.findall(r'data-pair="(\d+)" data-direction="(\d+)" data-frequency="(\d+)"', text)
    expected = [  # the rule in words of the method's page
        (pair, (2 * pair // 4) % rotate, pair % (HEAD_DIM // 4))
        for rotate in ROTATES
        for pair in range(HEAD_DIM // 2)
    ]
    assert [tuple(map(int, box)) for box in boxes] == expected


def anchors(page):
    """What links into a page may name, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, GENERATED, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=lambda page: page.name,
)
def test_links_and_pictures_are_there(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        inside = os.path.realpath(target).startswith(str(ROOT))
        if not (target.exists() and inside and (not anchor or anchor in anchors(target))):
            broken.append(link)
    assert not broken


def test_every_picture_is_shown():
    shown = "".join(page.read_text() for page in PAGES)
    pictures = [path.name for path in (ROOT / "docs" / "images").iterdir()]
    assert len(pictures) >= 5
    assert [name for name in pictures if f"images/{name})" not in shown] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f"({p.name})" not in index] == [
        "README.md"
    ]


HELPED = re.findall(r"^## spiralrope ?(.*)$", GENERATED.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", HELPED)
def test_help_fits_80_columns(name):
    words = [*name.split(), "--help"]
    said = CliRunner().invoke(cli.app, words, prog_name="spiralrope", env={"COLUMNS": "80"}).output
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said


@pytest.mark.parametrize("name", HELPED)
def test_the_line_of_torchrun_works_for_every_option(name):
    from torch.distributed.run import parse_args

    command = typer.main.get_command(cli.app)
    for word in name.split():
        command = command.resolve_command(typer.Context(command), [word])[1]
    [line] = [line for _, line in LINES if line.startswith("torchrun")]
    start = shlex.split(line)[1 : -len(words_of(line))]
    words = [*name.split(), *(flag for each in command.params for flag in each.opts)]
    read = parse_args([*start, *words])
    assert read.module
    assert [read.training_script, *read.training_script_args] == [start[-1], *words]


def test_every_file_that_a_run_leaves_is_described():
    modules = (progress, storage, sample_files)
    found = [item for each in modules for item in vars(each).items()]
    names = {value for name, value in found if name.endswith("_FILE")}
    assert len(names) >= 15
    page = (ROOT / "docs" / "formats.md").read_text()
    assert [name for name in sorted(names) if name not in page] == []


def test_every_package_is_in_the_table_of_contributing():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    core = ROOT / "spiralrope_cli" / "core"
    packages = {path.name + "/" for path in core.iterdir() if (path / "__init__.py").is_file()}
    packages |= {path.name for path in core.glob("*.py")} - {"__init__.py", "errors.py"}
    assert len(packages) >= 12
    assert [each for each in sorted(packages) if f"`{each}`" not in page] == []
