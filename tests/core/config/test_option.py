"""What a field says about its option is how its value is read, checked and told."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import typing
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal

import pytest

from spiralrope_cli.core import config
from spiralrope_cli.core.config.fid import words
from spiralrope_cli.core.config.models import SIZE, RopeConfig, numbers, pair, size
from spiralrope_cli.core.config.option import (
    PANELS,
    PATH,
    Opt,
    check_fields,
    folder,
    in_words,
    leaves,
    option,
    path,
    read_values,
)
from spiralrope_cli.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group."""

    rate: float = option("A share.", "Run", gt=0, le=1, default=0.5)
    drop: float = option("A rate.", "Run", ge=0, lt=1, free=True, default=0.0)
    anything: float = option("Of any size.", "Run", default=0.0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Every:
    """Every kind of field."""

    count: int = option("A number.", "Run", ge=1, default=1)
    above: float = option("A number.", "Run", gt=0, default=1.0)
    perhaps: int | None = option("A number, or none.", "Run", ge=0, default=None)
    plain: int = option("A number.", "Run", default=0)
    flag: bool = option("A flag.", "Run", flag="--flag/--no-flag", default=False)
    word: str = option("A text.", "Run", default="")
    place: str = option("A text.", "Run", pattern=r"(.+:\d+)?", expects="HOST:PORT", default="")
    choice: Literal["one", "two"] = option("A word.", "Run", default="one")
    side: tuple[int, int] = option("A size.", "Run", **SIZE, default=(1, 1))
    span: tuple[int, int] = option("Two.", "Run", read=pair, expects="LO,HI", default=(0, 1))
    listed: tuple[int, ...] = option("Some.", "Run", read=numbers, expects="a list", default=())
    names: tuple[str, ...] = option("Some.", "Run", read=words, expects="names", default=())
    out: str = option("A folder.", "Run", **PATH, default="x")
    layers: tuple[int, ...] = option("N.", "Run", flag="--layer", ge=0, many=True, default=())
    sides: tuple[tuple[int, int], ...] = option("Sizes.", "Run", many=True, **SIZE, default=())
    shown: tuple[Literal["a", "b"], ...] = option("Words.", "Run", many=True, default=())
    source: str = option("From where.", metavar="SOURCE", argument=True, default="x")
    betas: tuple[float, float] = (0.9, 0.999)
    mean: tuple[float, ...] = (0.5,)
    classes: int = option(called="the number of classes", default=1)
    inner: Inner = dataclasses.field(default_factory=Inner)

    def __post_init__(self) -> None:
        check_fields(self)


READ = [
    ("count", "7", 7),
    ("count", 7, 7),
    ("count", 7.0, 7),
    ("rate", "1e-3", 1e-3),  # YAML reads 1e-3 as a word
    ("rate", 1, 1.0),
    ("anything", "-inf", -math.inf),
    ("perhaps", None, None),
    ("perhaps", "3", 3),
    ("flag", True, True),
    ("flag", False, False),
    ("word", "", ""),
    ("word", "~/x", "~/x"),
    ("choice", "two", "two"),
    ("side", "224", (224, 224)),
    ("side", "224X448", (224, 448)),
    ("side", 16, (16, 16)),
    ("side", [16, 8], (16, 8)),
    ("span", "0,600", (0, 600)),
    ("span", [0, 600], (0, 600)),
    ("listed", "207, 88", (207, 88)),
    ("listed", [207, 88], (207, 88)),
    ("names", "fid, IS,fid", ("fid", "is")),
    ("layers", ["0", "5"], (0, 5)),
    ("layers", (), ()),
    ("sides", ["160", "224x448"], ((160, 160), (224, 448))),
    ("shown", ["b", "a"], ("b", "a")),
    ("betas", [0.9, "1e-1"], (0.9, 0.1)),
    ("mean", [1, 2.5, 3], (1.0, 2.5, 3.0)),
]


@pytest.mark.parametrize(("name", "value", "read"), READ)
def test_a_word_or_a_value_of_yaml_becomes_the_fields_type(name, value, read):
    found = leaves(Every)[name].convert(value)
    assert found == read
    assert type(found) is type(read)


REFUSED = [
    ("count", "x", "--count is x; it must be a whole number, 1 or more"),
    ("count", "1.5", "--count is 1.5; it must be a whole number, 1 or more"),
    ("count", "", "--count is empty; it must be a whole number, 1 or more"),
    ("count", 2.5, "--count is 2.5; it must be"),
    ("count", True, "--count is True; it must be"),
    ("count", None, "--count is None; it must be"),
    ("count", math.inf, "--count is inf; it must be a whole number, 1 or more, and finite"),
    ("count", math.nan, "--count is nan; it must be"),
    ("count", [1], "--count is [1]; it must be"),
    ("plain", "x", "--plain is x; it must be a whole number"),
    ("rate", "x", "--rate is x; it must be a number, in (0, 1]"),
    ("rate", True, "--rate is True; it must be"),
    ("anything", "x", "--anything is x; it must be a number"),
    ("above", "x", "--above is x; it must be a number, above 0"),
    ("flag", "yes", "--flag is yes; it must be true or false"),
    ("flag", 1, "--flag is 1; it must be true or false"),
    ("word", 5, "--word is 5; it must be a text"),
    ("choice", 5, "--choice is 5; it must be one or two"),
    ("side", "x", "--side is x; it must be a side, as 224, or HxW, as 224x448"),
    ("side", "-8", "--side is -8; it must be a side"),
    ("side", "8x", "--side is 8x; it must be a side"),
    ("side", [8, 8, 8], "--side is [8, 8, 8]; it must be a side"),
    ("side", [8.5, 8], "--side is [8.5, 8]; it must be a side"),
    ("side", True, "--side is True; it must be a side"),
    ("side", {1: 2, 3: 4}, "--side is {1: 2, 3: 4}; it must be a side"),
    ("span", "600", "--span is 600; it must be LO,HI"),
    ("span", "1,2,3", "--span is 1,2,3; it must be LO,HI"),
    ("listed", "1,x", "--listed is 1,x; it must be a list"),
    ("listed", "", "--listed is empty; it must be a list"),
    ("out", "", "--out is empty; it must be a path"),
    ("out", " ", "--out is  ; it must be a path"),
    ("layers", ["0", "x"], "--layer is x; it must be a whole number, 0 or more"),
    ("sides", ["160", "x"], "--sides is x; it must be a side"),
    ("betas", [0.9], "betas is [0.9]; it must be a list, each a number"),
    ("betas", "0.9", "betas is 0.9; it must be a list, each a number"),
    ("mean", 0.5, "mean is 0.5; it must be a list, each a number"),
    ("classes", "x", "the number of classes is x; it must be a whole number"),
    ("source", 5, "SOURCE is 5; it must be a text"),
    (
        "count",
        2**31,
        "--count is 2147483648; it must be a whole number, 1 or more, at most 2147483647",
    ),
    ("count", "3000000000", "--count is 3000000000; it must be a whole number, 1 or more, at most"),
]


@pytest.mark.parametrize(("name", "value", "told"), REFUSED)
def test_what_cannot_be_read_is_told_in_a_line(name, value, told):
    with pytest.raises(ConfigError) as refused:
        leaves(Every)[name].convert(value)
    assert str(refused.value).startswith(told)
    assert "\n" not in str(refused.value)


OUT_OF_BOUNDS = [
    ("count", 0, "--count is 0; it must be a whole number, 1 or more"),
    ("above", 0.0, "--above is 0.0; it must be above 0"),
    ("above", math.inf, "--above is inf; it must be above 0, and finite"),
    ("above", math.nan, "--above is nan; it must be above 0"),
    ("rate", 0.0, "--rate is 0.0; it must be in (0, 1]"),
    ("rate", 1.1, "--rate is 1.1; it must be in (0, 1]"),
    ("rate", math.nan, "--rate is nan; it must be in (0, 1]"),
    ("drop", 1.0, "--drop is 1.0; it must be in [0, 1)"),
    ("drop", -0.1, "--drop is -0.1; it must be in [0, 1)"),
    ("perhaps", -1, "--perhaps is -1; it must be a whole number, 0 or more"),
    ("choice", "three", "--choice is three; it must be one or two"),
    ("place", "host:x", "--place is host:x; it must be HOST:PORT"),
    ("layers", (0, -1), "--layer is -1; it must be a whole number, 0 or more"),
    ("shown", ("a", "c"), "--shown is c; it must be a or b"),
]


@pytest.mark.parametrize(("name", "value", "told"), OUT_OF_BOUNDS)
def test_a_value_out_of_its_bounds_is_refused_wherever_it_came_from(name, value, told):
    with pytest.raises(ConfigError) as refused:
        leaves(Every)[name].check(value)
    assert str(refused.value) == told
    with pytest.raises(ConfigError) as of_python:  # noqa: PT012 - either class may hold it
        kind = Inner if name in leaves(Inner) else Every
        kind(**{name: value})
    assert str(of_python.value) == told


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("count", 1), ("above", 1e-9), ("rate", 1.0), ("drop", 0.0), ("drop", 0.999)),
        *(("perhaps", None), ("perhaps", 0), ("place", ""), ("place", "host:1")),
        *(("anything", math.inf), ("anything", -5.0), ("layers", ()), ("shown", ("a", "b"))),
    ],
)
def test_a_value_at_its_bound_is_as_the_bound_says(name, value):
    leaves(Every)[name].check(value)


def test_a_long_value_is_cut_in_messages():
    nested = "bombs"
    for _ in range(60):
        nested = [nested] * 9
    with pytest.raises(ConfigError, match=r"--count is \[\[\[") as refused:
        leaves(Every)["count"].convert(nested)
    assert len(str(refused.value)) < 600


def test_readers():
    assert size("224") == (224, 224)
    assert size("1x2") == (1, 2)
    assert numbers(" 1 , 2 ") == (1, 2)
    assert pair("3,4") == (3, 4)
    assert [folder("lat/"), folder("a//b"), folder("")] == ["lat", "a/b", ""]
    assert words("A,b , A") == ("a", "b")
    assert words("ALL") == ("fid", "sfid", "is", "kid", "precision", "recall")
    for reader, wrong in ((size, "x"), (numbers, "1,,2"), (pair, "1"), (path, "")):
        with pytest.raises(ValueError):  # noqa: PT011 - readers have no words of their own
            reader(wrong)


def test_no_shell_expands_a_home_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of-a-test")
    assert path("~/runs") == "/home/of-a-test/runs"
    assert leaves(Every)["out"].convert("~/runs") == "/home/of-a-test/runs"


def test_a_value_is_shown_as_it_would_be_typed():
    shown = {(224, 224): "224", (224, 448): "224x448", True: "on", 1e-5: "1e-05", 3.0: "3"}
    assert {value: in_words(value) for value in shown} == shown
    assert in_words("word") == "word"


def test_groups_share_one_list_of_names():
    found = leaves(Every)
    assert {"rate", "drop"} < found.keys()
    assert "inner" not in found
    assert found["drop"].default == 0.0
    assert [name for name, opt in found.items() if opt.free] == ["drop"]


def test_two_groups_with_one_name_are_refused():
    twice = dataclasses.make_dataclass("Twice", [("a", Inner), ("b", Inner)])
    with pytest.raises(TypeError, match=r"Twice: .* is in two groups"):
        leaves(twice)


def test_a_public_config_has_its_fields_in_its_help():
    text = RopeConfig.__doc__ or ""
    for name, opt in leaves(RopeConfig).items():
        assert opt.help
        assert f"    {name} ({opt.default!r}): {opt.help}" in text


# --- All configs of the package.
def every_config():
    """Every dataclass of the package's configs with options of its own, however hidden."""
    modules = [
        importlib.import_module(f"{config.__name__}.{module.name}")
        for module in pkgutil.iter_modules(config.__path__)
    ]
    kinds = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value is not Opt
    }
    declared = [kind for kind in kinds if own_options(kind) or hidden_options(kind)]
    return sorted(declared, key=lambda kind: kind.__name__)


def own_options(kind: type) -> list[Opt]:
    said = [field.metadata["option"] for field in fields(kind) if "option" in field.metadata]
    return [opt for opt in said if opt.help]


def hidden_options(kind: type) -> list[str]:
    """Fields whose `Opt` nobody would find: it stands in the type, or is the default itself."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [
        field.name
        for field in fields(kind)
        if isinstance(field.default, Opt) or options_inside(hints[field.name])
    ]


def options_inside(hint: Any) -> list[Opt]:
    """Every `Opt` in a type hint, however deep."""
    mine = [said for said in getattr(hint, "__metadata__", ()) if isinstance(said, Opt)]
    return mine + [opt for inner in typing.get_args(hint) for opt in options_inside(inner)]


def test_a_hidden_option_is_found():
    hidden: Any = Annotated[int, Opt("Nobody finds it.", "Run")] | None
    default = dataclasses.field(default=Opt("Nor this one.", "Run"))
    kind = dataclasses.make_dataclass("Hides", [("count", hidden), ("word", str, default)])
    assert hidden_options(kind) == ["count", "word"]


CONFIGS = every_config()


def test_all_configs_are_looked_at():
    names = {kind.__name__ for kind in CONFIGS}
    assert {"ClassifierRun", "DiTRun", "EvalOptions", "FidRun", "SampleRun", "Checkup"} <= names
    assert len(CONFIGS) >= 20


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_no_config_hides_an_option(kind):
    assert not hidden_options(kind)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_option_says_what_it_is(kind):
    for name, opt in leaves(kind).items():
        if opt.help:
            assert opt.argument or opt.panel in PANELS, name
            assert opt.help.endswith((".", "...")), name
            assert not opt.argument or opt.metavar, name
            assert opt.read in (None, folder) or opt.expects or opt.choices, (
                f"{name}: a reader needs its words"
            )
            assert not (opt.pattern and not opt.expects), f"{name}: no user reads a pattern"
            upper = opt.le is not None or opt.lt is not None
            assert not upper or opt.ge is not None or opt.gt is not None, f"{name}: one bound"
            assert opt.allowed(), name
            assert not opt.many or opt.default is MISSING or isinstance(opt.default, tuple), name


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_default_is_one_that_the_option_takes(kind):
    for opt in leaves(kind).values():
        if opt.help and opt.default is not MISSING:
            opt.check(opt.default)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("digits", [60, 5000])
def test_a_whole_number_of_many_digits_is_refused_in_a_line(kind, digits):
    for name, opt in leaves(kind).items():
        if opt.help and "seed" not in name and opt.hint in (int, tuple[int, int], tuple[int, ...]):
            value = ",".join(["9" * digits] * 2) if opt.read in (numbers, pair) else "9" * digits
            with pytest.raises(ConfigError) as refused:
                read_values({name: opt}, {name: [value] if opt.many else value})
            assert len(str(refused.value)) < 400, name
