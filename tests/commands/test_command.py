"""Commands are made of declarations: one at a time, each with its panels and its defaults."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import typer
from conftest import options_of
from typer.testing import CliRunner

from spiralrope_cli.commands.command import command
from spiralrope_cli.core.config import recipes
from spiralrope_cli.core.config.datasets import DIGITS
from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.option import PANELS, in_words, to_nested
from spiralrope_cli.core.config.plots import RopePlot
from spiralrope_cli.core.config.runs import AugmentConfig
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.resolve import resolve
from spiralrope_cli.main import COMMANDS, app, main


def built(*names):
    """A command as it is built when it is typed."""
    group = typer.main.get_command(app)
    for name in names:
        _, group, _ = group.resolve_command(typer.Context(group), [name])
    return group


def every_command():
    """The words of each command, `plot rope` among them."""
    for name in COMMANDS:
        inner = getattr(built(name), "commands", {})
        yield from ([name, each] for each in inner) if inner else [[name]]


EVERY = list(every_command())
SHOWN = re.compile(r" \[dim\]\\\[(?P<photographs>.*?)(; digits (?P<digits>.*))?\]\[/dim\]$")
"""The default, at the end of an option's help."""


# --- Only the command that was typed is imported.
@pytest.mark.parametrize(
    ("words", "env", "loaded"),
    [
        (["--help"], {}, []),
        (["--version"], {}, []),
        (["pretrain", "--help"], {}, ["pretrain"]),
        (["plot", "rope", "--help"], {}, ["plot"]),
        (["pretrain", "--arch", "deit-x"], {}, ["pretrain"]),
        (["nowhere"], {}, []),
        ([], {"_SPIRALROPE_COMPLETE": "complete_bash", "COMP_WORDS": "spiralrope d"}, []),
        (
            [],
            {"_SPIRALROPE_COMPLETE": "complete_bash", "COMP_WORDS": "spiralrope dit-train --v"},
            ["dit_train"],
        ),
    ],
)
def test_only_the_command_that_was_typed_is_imported(words, env, loaded, tmp_path):
    code = (
        "import sys\nfrom spiralrope_cli.main import main\n"
        f"sys.argv = ['spiralrope', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "here = 'spiralrope_cli.commands.'\n"
        "print(sorted(m.removeprefix(here) for m in sys.modules if m.startswith(here)),\n"
        "      [name for name in ('torch', 'pydantic') if name in sys.modules], file=sys.stderr)"
    )
    completing = {"COMP_CWORD": str(len(env.get("COMP_WORDS", "").split()) - 1), **env}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **(completing if env else {})},
    )
    modules, heavy = re.fullmatch(r"(\[.*\]) (\[.*\])", done.stderr.splitlines()[-1]).groups()
    assert modules == str(sorted([*loaded, "command", "completion"]))
    told_at_once = "--help" in words or words == ["--version"]
    assert heavy == "[]" if told_at_once else "torch" not in heavy
    if env:
        assert "--vae" in done.stdout or "dit-train" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_groups_line_is_the_first_of_the_commands_own_help(name):
    first = re.split(r"\n\s*\n", built(name).help.strip())[0]
    assert " ".join(first.split()) == COMMANDS[name]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_option_has_a_panel_and_panels_have_their_order(words):
    panels = [
        parameter.rich_help_panel
        for parameter in built(*words).params
        if parameter.param_type_name == "option" and parameter.name != "help"
    ]
    assert set(panels) <= set(PANELS)
    assert panels == sorted(panels, key=PANELS.index)


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_an_option_stands_once_and_says_a_sentence(words):
    spellings = [
        spelling
        for parameter in built(*words).params
        if parameter.param_type_name == "option"
        for spelling in (*parameter.opts, *parameter.secondary_opts)
    ]
    assert len(spellings) == len(set(spellings))
    for parameter in built(*words).params:
        assert parameter.help
        assert parameter.metavar != "", parameter.name
        shown = SHOWN.search(parameter.help)
        off = () if parameter.secondary_opts else ("off",)  # --a/--no-a says which it is
        assert not shown or shown["photographs"] not in ("", "None", "()", *off), parameter.name


# --- Defaults.
BY_RULE = {"lr": " × batch/512"}
OPEN = {"nproc"}
"""Options whose 0 means that the machine decides."""


def shown_defaults(name):
    """Option -> the default that its help shows, on photographs and on the digits."""
    found = {}
    for parameter in built(name).params:
        if match := SHOWN.search(getattr(parameter, "help", "") or ""):
            usual = match["photographs"].removesuffix(BY_RULE.get(parameter.name, ""))
            found[parameter.name] = usual, match["digits"] or usual
    return found


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Folder of one empty file for each of 4096 training images, of two classes."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 2048), ("val", 1)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.jpg").touch()
    return root


@pytest.mark.parametrize("name", ["pretrain", "dit-train"])
def test_a_default_of_the_help_is_the_one_that_resolution_gives(name, photographs):
    shown = shown_defaults(name)
    assert len(shown) > 35
    for place, data in enumerate((str(photographs), "digits")):
        run = resolve(name, {"data": data}).run
        values = {}
        for key, value in to_nested(run).items():
            values |= value if isinstance(value, dict) else {key: value}
        for option in options_of(name) - {"config", "name", "dry_run", "slurm", "out", "data"}:
            value = values[option]
            if option in shown:
                told = tuple(value) if isinstance(value, list) else value
                assert shown[option][place] == in_words(told), option
            else:
                assert not value, f"{option} is {value}, and the help shows no default"
                known = {*OPEN, "max_steps", "micro_batch_size", "workers"}
                assert isinstance(value, (bool, str)) or option in known, option


def test_finetune_shows_the_recipe_but_not_what_its_source_decides():
    shown = shown_defaults("finetune")
    assert shown["lr"] == ("1e-05", in_words(DIGITS.defaults_of("finetune")["lr"]))
    assert not shown.keys() & {"rotate", "theta", "image_size", "enabled"}
    assert shown["auto_augment"][0] == recipes.FINETUNE["auto_augment"]


@pytest.mark.parametrize(
    ("words", "option", "default"),
    [
        ("dit-sample", "cfg_interval", "0,1000"),
        ("dit-sample", "cfg_scale", "1"),
        ("dit-sample", "num_sampling_steps", "250"),
        ("dit-encode", "image_size", "256"),
        ("dit-encode", "precision", "fp32"),
        ("fid", "select", "all"),
        ("plot rope", "rotates", "2"),
        ("plot rope", "truncate_percentage", "0"),
        ("run dit", "sampling_seed", "100"),
    ],
)
def test_other_commands_show_their_defaults(words, option, default):
    [helped] = [p.help for p in built(*words.split()).params if p.name == option]
    assert SHOWN.search(helped)["photographs"] == default


def test_choices_are_those_of_the_command():
    choices = {
        name: next(p.help for p in built(name).params if p.name == "schedule")
        for name in ("pretrain", "dit-train")
    }
    assert "(cosine, constant, published)" in choices["pretrain"]
    assert "(cosine, constant)" in choices["dit-train"]
    precision = next(p.help for p in built("fid").params if p.name == "precision")
    assert "(fp32, tf32, bf16)" in precision


# --- What a command's function gets.
def given_to(kind, words, **more):
    """What the function of a command with the options of a config gets."""
    got = []

    @command(kind, **more)
    def one(given):
        """One command."""
        got.append(given)

    result = CliRunner().invoke(one, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return got[0]


def test_a_function_gets_what_was_given_and_nothing_else():
    assert given_to(MachineConfig, []) == {}
    given = given_to(MachineConfig, ["--nproc", "0", "--no-compile", "--skip-bad"])
    assert given == {"nproc": 0, "compile": "off", "skip_bad": True}, "defaults too, if given"
    given = given_to(RopePlot, ["--rotate", "1", "--rotate", "4", "--grid", "7x28"])
    assert given == {"rotates": (1, 4), "grid": (7, 28)}
    assert given_to(RopeConfig, ["--theta", "5", "--theta", "1e3"]) == {"theta": 1000.0}
    with pytest.raises(ConfigError, match="--rotate is -1"):
        given_to(RopeConfig, ["--rotate", "-1"])


INTERRUPTED = """
import runpy, signal, sys

class Stop:
    def find_spec(name, *rest):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Stop)
sys.argv = ["spiralrope", "plot", "rope"]
runpy.run_module("spiralrope_cli", run_name="__main__")
"""


@pytest.mark.parametrize(
    "module", ["typer", "spiralrope_cli.commands.plot", "spiralrope_cli.core.plots.rope"]
)
def test_an_interrupted_command_says_so_wherever_it_is(module):
    """While the command line is imported, while Typer looks for the command, and in the job."""
    code = INTERRUPTED.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_command_can_leave_out_and_reword():
    @command(
        MachineConfig,
        leave_out=("nproc",),
        words={"precision": "Of the VAE."},
        defaults={"precision": "fp32", "device": ""},
    )
    def one(given):
        """One command."""

    told = {parameter.name: parameter.help for parameter in typer.main.get_command(one).params}
    assert "nproc" not in told
    assert told["precision"] == r"Of the VAE. (auto, bf16, tf32, fp32) [dim]\[fp32][/dim]"
    device = "Device; by default a GPU if there is one, else the CPU. (auto, cpu, cuda, mps)"
    assert told["device"] == device


@pytest.mark.parametrize(
    "words",
    [
        *([name] for name in COMMANDS if name not in ("run", "plot")),
        *(["run", kind] for kind in ("deit", "dit")),
        *(["plot", kind] for kind in ("run", "rope", "attention", "samples")),
    ],
    ids=" ".join,
)
def test_help_breaks_no_example_and_fills_its_paragraphs_at_80_columns(words):
    one = built(*words)
    page = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).output
    lines = [line.strip() for line in page.splitlines()]
    for example in (one.epilog or "").splitlines():
        assert example.strip() in lines
    for paragraph in one.help.split("\n\n"):
        assert "\n" not in paragraph


# --- Names of earlier versions, and of other tools.
def test_an_old_spelling_is_taken_and_named_anew():
    got = []

    @command(AugmentConfig)
    def one(given):
        """One command."""
        got.append(given)

    result = CliRunner().invoke(one, ["--max-shift", "2", "--degrees", "5"])
    assert got == [{"translate": 2.0, "degrees": 5.0}]
    assert result.stderr == "note: --max-shift is now --translate\n"
    assert "--max-shift" not in CliRunner().invoke(one, ["--help"]).output
    with pytest.raises(ConfigError, match="--translate is -1"):
        CliRunner().invoke(one, ["--max-shift", "-1"], catch_exceptions=False)
    for words in (
        ["--max-shift", "2", "--translate", "3"],
        ["--translate", "2", "--max-shift", "3"],
    ):
        with pytest.raises(ConfigError, match="--max-shift is now --translate, and both are given"):
            CliRunner().invoke(one, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "old", "new"),
    [
        ("pretrain", "--steps", "--max-steps"),
        ("finetune", "--max-rotation", "--degrees"),
        ("dit-train", "--init", "--init-from"),
        ("dit-train", "--label-dropout", "--class-dropout-prob"),
        ("dit-sample", "--steps", "--num-sampling-steps"),
        ("dit-sample", "--num", "--num-samples"),
        ("fid", "--num", "--num-samples"),
        ("doctor", "--num", "--num-samples"),
        ("plot samples", "--num", "--num-samples"),
        ("run deit", "--finetune-steps", "--finetune-max-steps"),
        ("run dit", "--steps", "--max-steps"),
        ("run dit", "--sampling-steps", "--num-sampling-steps"),
    ],
)
def test_every_old_spelling_is_hidden_beside_its_new_one(words, old, new):
    parameters = {each.opts[0]: each for each in built(*words.split()).params}
    assert parameters[old].hidden
    assert parameters[old].name == f"formerly_{parameters[new].name}"
    assert not parameters[new].hidden


@pytest.fixture
def refused(monkeypatch, capsys):
    """What the command line prints for words that it refuses."""

    def call(words, code=2):
        monkeypatch.setattr(sys, "argv", ["spiralrope", *words.split()])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == code
        printed = capsys.readouterr()
        assert not printed.out
        assert len(printed.err.splitlines()) <= 2
        return printed.err

    return call


STARTS = "spiralrope finetune, or dit-train --init-from, starts from weights"
AGAIN = "run the same command again: it resumes"
CLASSES = "it follows from the data or the weights"
THE_SOURCE = "here it is the argument SOURCE"
HABITS = {
    "pretrain": {
        "--model": "here it is --arch",
        **dict.fromkeys(("--pretrained", "--checkpoint", "--ckpt", "--init-from"), STARTS),
        **dict.fromkeys(("--gpus", "--devices"), "here it is --nproc"),
        "--wandb": "here it is --tracker wandb",
        **dict.fromkeys(("--amp", "--fp16"), "here it is --precision bf16"),
        "--reprob": "here it is --random-erasing",
        "--crop-pct": "here it is --crop-ratio",
        **dict.fromkeys(("--img-size", "--input-size"), "here it is --image-size"),
        "--accum": "here it is --micro-batch-size",
        **dict.fromkeys(("--workers-per-gpu", "--num_workers"), "here it is --workers"),
        "--data-path": "here it is --data",
        "--output_dir": "here it is --out",
        **dict.fromkeys(("--num-classes", "--nb_classes"), CLASSES),
    },
    "fetch": {
        **dict.fromkeys(("--model", "--pretrained"), "here it is the argument NAME"),
        "--local-dir": "here it is --out",
    },
    "run deit": {"--init": STARTS, "--resume": AGAIN, "--num-classes": CLASSES},
    "finetune": dict.fromkeys(("--model", "--pretrained", "--checkpoint"), THE_SOURCE),
    "dit-train": {
        "--model": "here it is --arch",
        **dict.fromkeys(("--pretrained", "--ckpt"), "here it is --init-from"),
        "--results-dir": "here it is --out",
        "--reprob": "dit-train has nothing like it",
    },
    "eval": {
        **dict.fromkeys(("--model", "--checkpoint", "--resume"), THE_SOURCE),
        **{"--img-size=32": "here it is --image-size", "--crop-pct": "here it is --crop-ratio"},
    },
    "dit-sample": {
        **dict.fromkeys(("--model", "--ckpt"), THE_SOURCE),
        "--num-fid-samples": "here it is --num-samples",
        "--per-proc-batch-size": "here it is --batch-size",
        "--resume": AGAIN,
    },
    "export": {"--format": "here it is --layout", "--ckpt": THE_SOURCE},
    "fid": {
        **{"--devices": "here it is --nproc", "--fp16": "here it is --precision bf16"},
        "--model": "fid has nothing like it",
    },
}


@pytest.mark.parametrize(
    ("name", "habit", "here"),
    [(name, *pair) for name, habits in HABITS.items() for pair in habits.items()],
)
def test_what_people_type_by_habit_is_named_in_a_line(refused, name, habit, here):
    typed = habit.partition("=")[0].replace("_", "-")
    assert refused(f"{name} {habit} x") == f"error: no such option: {typed}\n  {here}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretrain images", "unexpected argument: images\n  use --data images"),
        (
            "pretrain --compile maybe",
            "unexpected argument: maybe\n  as a value of --compile it must be one of auto, on, off",
        ),
        ("pretrain images --compile", "unexpected argument: images\n  use --data images"),
        ("dit-train ~/images --seed 1", "unexpected argument: ~/images\n  use --data ~/images"),
        ("run dit images", "unexpected argument: images\n  use --data images"),
        ("finetune run images", "unexpected argument: images"),
        (
            "plot rope run",
            "run is not a file, a run folder or a published name\n"
            "  spiralrope fetch --list shows all",
        ),
        (
            "pretrain --arch dit-xl2",
            "--arch dit-xl2 is a DiT\n  use spiralrope dit-train or run dit",
        ),
        (
            "pretrain --arch DiT-XL/2",
            "--arch DiT-XL/2 is a DiT\n  use spiralrope dit-train or run dit",
        ),
        ("run dit --arch deit-s", "--arch deit-s is a DeiT\n  use spiralrope pretrain or run deit"),
        (
            "pretrain --resume runs/x",
            "--resume is runs/x; it must be auto, must or never; the same command, or --config "
            "RUN/config.yaml --out RUN, resumes a run",
        ),
    ],
)
def test_what_people_type_in_other_places_is_named_too(refused, words, said):
    assert refused(words) == f"error: {said}\n"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        *((f"{name} --data=", "--data") for name in ("pretrain", "eval", "dit-encode", "doctor")),
        *(("dit-train --latents=", "--latents"), ("run dit --vae=", "--vae")),
        *(("fid a --select=", "--select"), ("plot rope --rotate=1 --rotate=", "--rotate")),
    ],
)
def test_an_empty_value_is_refused(refused, words, name):
    assert refused(words) == f"error: {name} is empty\n  give a value, or leave it out\n"


@pytest.mark.parametrize(
    ("words", "said", "see"),
    [
        (
            "dit-sample x --sampling-steps 2",
            "no such option: --sampling-steps (Possible options: --num-sampling-steps)",
            "dit-sample",
        ),
        (
            "dit-train --rotat 2",
            "no such option: --rotat (Possible options: --rotate)",
            "dit-train",
        ),
        ("dit-sample", "missing argument 'SOURCE'", "dit-sample"),
        ("plot x", "no such command 'x'", "plot"),
    ],
)
def test_a_wrong_command_line_is_an_error_of_the_usual_form(refused, words, said, see):
    assert refused(words) == f"error: {said}\n  see spiralrope {see} -h\n"
    assert refused("pretrain --lr") == "error: option '--lr' requires an argument\n"


def test_an_unknown_option_that_is_near_none_gets_no_suggestion():
    for words in ("dit-train --max-shift 2", "dit-sample x --max-steps 2", "eval --bias"):
        result = CliRunner().invoke(app, words.split(), env={"COLUMNS": "200"})
        assert result.exit_code == 2
        assert "Possible" not in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("words", ["run deit --from-legacy 4", "pretrain --help"])
def test_an_output_on_a_full_disk_is_a_message(words):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "spiralrope_cli", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "error: no space left on the disk of the output" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "x", "runs/a/.lock"), "no space left on the disk of runs/a/.lock"),
        (OSError(errno.EFBIG, "x", "a.npz"), "a file reached the size limit (ulimit -f): a.npz"),
        (OSError(errno.EMFILE, "x"), "too many files are open (ulimit -n)"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "a"), "a: Too many levels of"),
        (OSError(errno.EACCES, "Permission denied", "a"), "a: Permission denied"),
        (MemoryError("Unable to allocate 4.00 GiB for an array"), "out of memory: 4.00 GiB more"),
    ],
)
def test_an_error_of_the_system_outside_of_workers_is_a_line_or_two(
    refused, monkeypatch, error, told
):
    monkeypatch.setattr("spiralrope_cli.core.jobs.plot.draw_rope", Mock(side_effect=error))
    assert refused("plot rope", code=1).startswith(f"error: {told}")
