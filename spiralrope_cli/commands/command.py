"""Typer commands from configs: each field is an option.

Imports nothing slow, because every help page and completion imports it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from spiralrope_cli.commands import completion
from spiralrope_cli.core.config.models import size
from spiralrope_cli.core.config.option import PANELS, Opt, in_words, leaves, read_values
from spiralrope_cli.core.errors import ConfigError
from spiralrope_cli.core.runtime.launch import is_first_process, plan_only


class Group(TyperGroup):
    """A group of commands, with a faster start."""

    def get_params(self, ctx: Any) -> Any:
        """Sets flags that are None to False: for None Typer imports pydantic."""
        flags = super().get_params(ctx)
        for flag in flags:
            flag.default = flag.default or False
        return flags


HABITS = {
    "--model": ("SOURCE", "names", "arch"),
    "--num-heads": ("arch",),
    **dict.fromkeys(("--pretrained", "--checkpoint", "--ckpt"), ("source", "sources", "names")),
    **dict.fromkeys(("--init", "--init-from"), ("source",)),
    "--resume": ("sources",),
    **dict.fromkeys(("--num-classes", "--nb-classes"), ()),
    **dict.fromkeys(("--gpus", "--devices", "--nproc-per-node"), ("nproc",)),
    "--wandb": ("tracker wandb",),
    **dict.fromkeys(("--amp", "--fp16"), ("precision bf16",)),
    "--reprob": ("random_erasing",),
    "--crop-pct": ("crop_ratio", "crop_ratios"),
    **dict.fromkeys(("--img-size", "--input-size"), ("image_size", "image_sizes")),
    "--accum": ("micro_batch_size",),
    **dict.fromkeys(("--global-batch-size", "--per-proc-batch-size"), ("batch_size",)),
    "--learning-rate": ("lr",),
    "--data-path": ("data",),
    "--num-fid-samples": ("num_samples",),
    **dict.fromkeys(("--output-dir", "--results-dir", "--sample-dir", "--local-dir"), ("out",)),
    "--format": ("layout",),
    **dict.fromkeys(("--workers-per-gpu", "--num-workers"), ("workers",)),
}
"""Options of timm, DiT, torchrun and others -> fields here, perhaps with a value. The error names
the first one that the command has."""
ELSE = {
    **dict.fromkeys(
        ("--pretrained", "--checkpoint", "--ckpt", "--init", "--init-from"),
        "spiralrope finetune, or dit-train --init-from, starts from weights",
    ),
    "--resume": "run the same command again: it resumes",
    **dict.fromkeys(("--num-classes", "--nb-classes"), "it follows from the data or the weights"),
}
"""What the error says if the command has none of these fields."""


class Command(TyperCommand):
    """A command that answers options of other tools with its own."""

    known: Mapping[str, Opt]
    """Its options, by field."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises with the option of this command that does the same."""
        here: dict[Any, str] = {}
        for each in self.params:
            if each.param_type_name == "option":
                here[each.name] = each.opts[0]
            else:
                here[each.name] = here[each.metavar] = f"the argument {each.metavar}"
        shown = {flag for each in self.params for flag in each.opts + each.secondary_opts}
        for word in () if ctx.resilient_parsing else args:
            option = word.partition("=")[0].replace("_", "-")
            if option not in HABITS or option in shown:
                continue
            for habit in HABITS[option]:
                field, _, value = habit.partition(" ")
                if field in here:
                    hint = f"here it is {here[field]} {value}".strip()
                    raise ConfigError(f"no such option: {option}", hint)
            hint = ELSE.get(option, f"{ctx.info_name} has nothing like it")
            raise ConfigError(f"no such option: {option}", hint)
        given, args = args, self.with_values(args)
        ctx.meta[WORDS] = list(args)
        ctx.allow_extra_args = True  # for an error of our own
        try:
            unknown = super().parse_args(ctx, args)
        except Exception as error:  # the parser's, of which Typer has no public name
            refusal: Any = error
            if near := getattr(refusal, "possibilities", None):
                old = {each.opts[0] for each in self.params if FORMERLY in str(each.name)}
                # At the parser's cutoff --nproc would be near --reprob.
                refusal.possibilities = difflib.get_close_matches(
                    refusal.option_name, [flag for flag in near if flag not in old], cutoff=0.75
                )
            raise
        if unknown and not ctx.resilient_parsing:
            hint = self.place_of(unknown[0], given, here)
            raise ConfigError(f"unexpected argument: {unknown[0]}", hint)
        return unknown

    def place_of(self, word: str, given: list[str], here: dict[Any, str]) -> str:
        """Where an unexpected word may belong; `here` has the options and arguments."""
        at = given.index(word)
        if at and (opt := self.bare.get(given[at - 1])) and opt.choices:
            return f"as a value of {opt.called} it must be one of {', '.join(opt.choices)}"
        takes_data = "data" in here and not any("argument" in each for each in here.values())
        return f"use --data {word}" if takes_data else ""

    @property
    def bare(self) -> dict[str, Opt]:
        """Options that may stand without a value, as `--compile`, by their words."""
        return {word: opt for opt in self.known.values() for word in opt.bare}

    def with_values(self, args: list[str]) -> list[str]:
        """Adds the values of options that stand without one."""
        bare = self.bare
        words: list[str] = []
        for place, word in enumerate(args):
            if word == "--":
                return words + args[place:]
            opt = bare.get(word)
            if opt and not is_value(opt, *args[place + 1 : place + 2]):
                words += [f"{opt.called}={value}" for value in opt.bare[word]]
            else:
                words.append(word)
        return words


def is_value(opt: Opt, word: str = "") -> bool:
    """Whether an option reads a word as its value."""
    try:
        value = opt.convert(word)
    except ConfigError:
        return False
    return not opt.choices or value in opt.choices


SETTINGS: dict[str, Any] = {
    "cls": Group,
    "add_completion": False,
    "rich_markup_mode": "rich",
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
FORMERLY = "formerly_"
WORDS = "spiralrope_cli.words"
"""Key of the words of the command in the metadata of its context, to submit it with --slurm."""
PLACEHOLDERS = {bool: " ", int: "N", float: "X", str: "TEXT"}


def commands(lines: Mapping[str, str], **more: Any) -> typer.Typer:
    """A group of commands, of which only the typed one is imported and built.

    `lines` is name -> first line of the help; `dit-train` is `dit_train` in commands/dit_train.py.
    """

    class OneOf(Group):
        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if args and args[0] in lines:
                name = args[0].replace("-", "_")
                module = importlib.import_module(f"spiralrope_cli.commands.{name}")
                self.commands[args[0]] = typer.main.get_command(getattr(module, name))
            return super().resolve_command(ctx, args)

    app = typer.Typer(no_args_is_help=True, **{**SETTINGS, "cls": OneOf, **more})
    for name, line in lines.items():
        app.command(name, help=line)(lambda: None)
    return app


def command(
    *kinds: type,
    leave_out: Iterable[str] = (),
    words: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
    group: typer.Typer | None = None,
) -> Callable[[Callable[[dict[str, Any]], Any]], typer.Typer]:
    """Makes an app of `function(given)`: field name -> value, only of options that were given.

    Args:
        kinds: configs; each field with help becomes an option.
        leave_out: fields without an option in this command.
        words: field -> help that replaces that of the field.
        defaults: field -> default in the help, if not that of the field.
        group: app to which the command is added; by default one of its own.
    """
    known = {
        name: dataclasses.replace(opt, help=(words or {}).get(name, opt.help))
        for kind in kinds
        for name, opt in leaves(kind).items()
        if opt.help and name not in leave_out
    }
    shown = sorted(known.values(), key=lambda opt: -1 if opt.argument else PANELS.index(opt.panel))

    def register(function: Callable[[dict[str, Any]], Any]) -> typer.Typer:
        def call(ctx: typer.Context, **values: Any) -> None:
            sources = {name: ctx.get_parameter_source(name) for name in values}
            typed = [n for n, source in sources.items() if source and source.name == "COMMANDLINE"]
            given: dict[str, Any] = {}
            for parameter in typed:
                opt = known[name := parameter.removeprefix(FORMERLY)]
                if name != parameter:
                    note = f"{opt.was} is now {opt.called}"
                    if name in typed:
                        raise ConfigError(f"{note}, and both are given", "give one")
                    if is_first_process():
                        typer.echo(f"note: {note}", err=True)
                given[name] = values[parameter]
                if not opt.may_be_empty and "" in (given[name], *(given[name] if opt.many else ())):
                    raise ConfigError(f"{opt.called} is empty", "give a value, or leave it out")
            read = read_values(known, given)
            plan_only.set(bool(read.get("dry_run")))
            if (allocation := read.pop("slurm", None)) is None:
                function(read)
                return
            from spiralrope_cli.core.runtime.slurm import submit

            command = ctx.command_path.partition(" ")[2]
            submit(allocation, command, ctx.meta[WORDS], read, function)

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        said = [each for opt in shown for each in _parameters(opt, (defaults or {}).get(opt.name))]
        call.__signature__ = inspect.Signature([context, *said])  # type: ignore[attr-defined]
        call.__annotations__ = {}  # Typer would evaluate these too
        text, _, examples = (inspect.getdoc(function) or "").partition("Examples:\n")
        # Typer keeps the line breaks inside of a paragraph of the help, but not of the epilog.
        text = "\n\n".join(" ".join(each.split()) for each in text.strip().split("\n\n"))
        epilog = "\n\n".join(["\nExamples:", *examples.splitlines()])
        app, cls = group or typer.Typer(**SETTINGS), type("Known", (Command,), {"known": known})
        name = function.__name__.replace("_", "-")
        app.command(name, help=text, epilog=epilog, cls=cls)(call)
        return app

    return register


def _parameters(opt: Opt, default: str | None) -> Iterator[inspect.Parameter]:
    """What Typer gets for an option and its old name: strings, as `Opt.convert` reads them."""
    kind: Any = bool if opt.hint is bool else list[str] if opt.many else str
    usual, words = PLACEHOLDERS.get(opt.hint), opt.help
    offered: Any = opt.choices or opt.complete or "paths"
    named = isinstance(offered, str)
    complete = getattr(completion, offered) if named else completion.choices(*offered)
    if opt.choices:
        usual = "WORD"
        words += f" ({', '.join(opt.choices)})"
    shown = _default(opt) if default is None else default
    if shown and not opt.argument:
        words += f" [dim]\\[{shown}][/dim]"
    said: dict[str, Any] = {
        "help": words,
        "metavar": opt.metavar or usual,
        "show_default": False,
        "autocompletion": complete,
        "rich_help_panel": opt.panel or None,
    }
    made = typer.Argument(**said) if opt.argument else typer.Option(opt.flag, **said)
    parameters = {opt.name: made}
    if opt.was:
        parameters[FORMERLY + opt.name] = typer.Option(opt.was, hidden=True, **said)
    required = opt.required or (opt.argument and opt.default is MISSING)
    for name, parameter in parameters.items():
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else None,
            annotation=Annotated[kind if required else kind | None, parameter],
        )


def _default(opt: Opt) -> str:
    """The default of a field for the help; empty if there is none."""
    default: Any = opt.default
    if default in (MISSING, None, "", ()) or (not default and "by default" in opt.help):
        return ""
    if default is False and "/" not in opt.flag:  # off unless given, as all flags
        return ""
    if isinstance(default, tuple) and opt.read is not size:
        return ",".join(map(in_words, default))
    return in_words(default)
