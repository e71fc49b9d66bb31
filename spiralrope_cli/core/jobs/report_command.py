"""Command lines that do the same as a run again, into another folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.nested import read_config
from spiralrope_cli.core.config.rope import RopeConfig
from spiralrope_cli.core.config.samples import DEFAULTS
from spiralrope_cli.core.data.sample_files import read_facts
from spiralrope_cli.core.runtime.run_folder import CONFIG_FILE, SOURCES_FILE, read_json

ANOTHER = "again"
"""Added to the folder: in its own a repeated run would find itself finished."""


def command(folder: Path) -> str:
    """A command line that repeats a run."""
    if not (folder / CONFIG_FILE).is_file():
        return _sampling(read_facts(folder) or {}, folder)
    config = read_config(folder / CONFIG_FILE)
    words = ["spiralrope", config["command"]]
    if source := config.get("source"):
        words += ["--init", source] if config["command"] == "dit-train" else [source]
    given = {"config": folder / CONFIG_FILE, "out": f"{folder}-{ANOTHER}"}
    if source:  # the file's own are those of the weights
        origins, rope = read_json(folder / SOURCES_FILE), RopeConfig.__dataclass_fields__
        given |= {name: config[name] for name in rope if origins.get(name) == "option"}
    return shlex.join([*words, *_options(given)])


def _sampling(facts: dict[str, Any], folder: Path) -> str:
    low, high = facts["cfg_interval"]
    given = {
        **{name: facts[name] for name in DEFAULTS},
        "cfg_scale": f"{facts['cfg_scale']:g}",
        "cfg_channels": facts["cfg_channels"],
        "cfg_interval": f"{low},{high}",
        "classes": ",".join(map(str, facts["classes"])),
        "vae": facts["vae"],
        "image_size": "x".join(map(str, facts["image_size"])),
        "precision": {"float32": "fp32", "bfloat16": "bf16"}[facts["precision"]],
        "ema": facts["weights"] == "ema",
        **{name: facts["rope"][name] for name in read_json(folder / SOURCES_FILE)},
        "out": f"{folder}-{ANOTHER}",
    }
    return shlex.join(["spiralrope", "dit-sample", facts["source"], *_options(given)])


def _options(given: dict[str, Any]) -> list[str]:
    """Words for field name -> value."""
    words: list[str] = []
    for name, value in given.items():
        option = "rope" if name == "enabled" else name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value != "":
            words += [f"--{option}", str(value)]
    return words
