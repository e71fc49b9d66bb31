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
    out, origins = f"{folder}-{ANOTHER}", read_json(folder / SOURCES_FILE)
    if not (folder / CONFIG_FILE).is_file():
        facts = read_facts(folder) or {}
        words, given = ["dit-sample", facts["source"]], _of_sampling(facts, [*origins])
        given["out"] = out
    else:
        config = read_config(folder / CONFIG_FILE)
        words, given = [config["command"]], {"config": folder / CONFIG_FILE, "out": out}
        if source := config.get("source"):
            words += ["--init", source] if config["command"] == "dit-train" else [source]
            # Other options of RoPE are those of the weights, which the config file holds too.
            rope = RopeConfig.__dataclass_fields__
            given |= {name: config[name] for name in rope if origins.get(name) == "option"}
    for name, value in given.items():
        option = "rope" if name == "enabled" else name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value != "":
            words += [f"--{option}", str(value)]
    return shlex.join(["spiralrope", *words])


def _of_sampling(facts: dict[str, Any], given_rope: list[str]) -> dict[str, Any]:
    """Field name -> value of the options of `dit-sample`, by what it left."""
    low, high = facts["cfg_interval"]
    return {
        **{name: facts[name] for name in DEFAULTS},
        "cfg_scale": f"{facts['cfg_scale']:g}",
        "cfg_channels": facts["cfg_channels"],
        "cfg_interval": f"{low},{high}",
        "classes": ",".join(map(str, facts["classes"])),
        "vae": facts["vae"],
        "image_size": "x".join(map(str, facts["image_size"])),
        "precision": {"float32": "fp32", "bfloat16": "bf16"}[facts["precision"]],
        "ema": facts["weights"] == "ema",
        **{name: facts["rope"][name] for name in given_rope},
    }
