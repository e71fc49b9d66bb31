"""Frozen facts of a checkout: what a refactor must not change, bit for bit.

    python tests/frozen record CHECKOUT OUT.json [--only PART ...]
    python tests/frozen compare A.json B.json

`record` drives the command line of CHECKOUT (and its public API, for gradients) on the CPU, with
tiny seeded networks, and writes what came out: SHA-256 of tensors, logged numbers, configs, JSON
results, pixels, and the answers to some hundred command lines. Internals of the package are not
named here, so that any commit can be recorded:

    git worktree add ../base main && python tests/frozen record ../base base.json
    python tests/frozen record . mine.json && python tests/frozen compare base.json mine.json

Bits are those of one machine and of one version of torch: record the base anew elsewhere.
`runs.txt` holds the runs, section by section, and `commands.txt` the command lines.
PARTs are the sections of the former, `gradients` and `commands`; by default all of them.
`compare` leaves with 1 where numbers, exit codes or values in answers differ. Words of answers may
be changed on purpose: they are listed last, and count with `--strict` alone.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from inside import leaves

RENAMED = {
    **{"steps": "max_steps", "label_dropout": "class_dropout_prob", "pictures": "images"},
    **{"max_shift": "translate", "max_rotation": "degrees"},
}
"""Config keys that have another name since; options may keep their old spelling in `runs.txt` and
`commands.txt`, which every commit takes."""
CONFIG = re.compile(r"/(config\.yaml|sources\.json|metadata/config)/")
"""Where config keys stand in the path of a value."""
IS_NOW = re.compile(r"note: --[\w-]+ is now --[\w-]+")
SHOWN = 20
"""Differences of values that `compare` prints."""


def record(checkout: Path, out: Path, parts: list[str]) -> None:
    """Records in a process whose surroundings are the same everywhere."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
    with tempfile.TemporaryDirectory(prefix="frozen-") as folder:
        env = {name: os.environ[name] for name in kept if name in os.environ} | {
            **{"PYTHONPATH": str(checkout), "HOME": folder, "PYTHONHASHSEED": "0"},
            **{"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000", "CUDA_VISIBLE_DEVICES": ""},
            **{"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "MPLBACKEND": "agg"},
            **{"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"},
        }
        inside = str(Path(__file__).resolve().with_name("inside.py"))
        words = [sys.executable, inside, str(checkout), str(out), *parts]
        if code := subprocess.run(words, env=env, cwd=folder, check=False).returncode:
            sys.exit(code)


def compare(a: Path, b: Path, strict: bool) -> int:
    """Prints what two recordings do not share; the exit code."""
    old, new = (json.loads(path.read_text()) for path in (a, b))
    both = [part for part in old if part in new]
    print(f"parts: {', '.join(both)}; in one file alone: {', '.join({*old} ^ {*new}) or 'none'}")
    words = [each.pop("commands", {}) if "commands" in both else {} for each in (old, new)]
    kept = [{part: each[part] for part in both if part in each} for each in (old, new)]
    x, y = ({today(name): value for name, value in leaves(each)} for each in kept)
    missing = "(is not there)"
    pairs = [(name, x.get(name, missing), y.get(name, missing)) for name in sorted({*x, *y})]
    differ = [pair for pair in pairs if pair[1] != pair[2]]
    places = Counter("/".join(name.split("/")[1:5]) for name, *_ in differ)
    print(f"values: {len(pairs)} compared, {len(differ)} differ")
    for place, count in places.items():
        print(f"  {count} in {place[:200]}")
    for name, left, right in differ[:SHOWN]:
        print(f"  {name}\n    - {str(left)[:300]}\n    + {str(right)[:300]}")
    if len(differ) > SHOWN:
        print(f"  ... and {len(differ) - SHOWN} more values")
    graver, reworded = compare_answers(*words)
    return int(bool(differ) or graver or (strict and reworded))


def today(path: str) -> str:
    """The path of a value with today's names of config keys."""
    if not (found := CONFIG.search(path)):
        return path
    keys = path[found.end() :].split("/")
    return path[: found.end()] + "/".join(RENAMED.get(key, key) for key in keys)


def compare_answers(old: dict[str, Any], new: dict[str, Any]) -> tuple[bool, bool]:
    """Prints the command lines that are answered otherwise, the gravest first.

    Returns:
        whether exit codes or values differ, and whether words alone do.
    """
    kinds: dict[str, list[str]] = {"exit code": [], "values": [], "words": []}
    for line in sorted(old.keys() & new.keys()):
        x, y = old[line], new[line]
        for each in (x, y):
            each["stderr"] = [said for said in each["stderr"] if not IS_NOW.fullmatch(said)]
        if x != y:
            same = [x["code"] == y["code"], values_in(x) == values_in(y), False]
            kinds[list(kinds)[same.index(False)]].append(line)
    counts = ", ".join(f"{len(lines)} differ in {kind}" for kind, lines in kinds.items())
    print(f"answers: {len(old.keys() & new.keys())} compared; {counts}")
    for line in sorted(old.keys() ^ new.keys()):
        print(f"  in one file alone: {line}")
    for kind, lines in kinds.items():
        for line in lines:
            print(f"\n{kind}: {line}")
            texts = [
                (f"exit code {each['code']}", *each["stdout"], *each["stderr"])
                for each in (old[line], new[line])
            ]
            unified = list(difflib.unified_diff(*texts, lineterm="", n=0))
            print("\n".join(f"  {each[:300]}" for each in unified[2:] if not each.startswith("@@")))
    return bool(kinds["exit code"] or kinds["values"]), bool(kinds["words"])


def values_in(answer: dict[str, Any]) -> Counter[str]:
    """The numbers and names with digits in what was said, wherever they stand."""
    text = " ".join((*answer["stdout"], *answer["stderr"]))
    return Counter(re.findall(r"[\w./+-]*\d[\w./+-]*", text))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("record")
    action.add_argument("checkout", type=Path)
    action.add_argument("out", type=Path)
    action.add_argument("--only", nargs="*", default=[], metavar="PART")
    action = actions.add_parser("compare")
    action.add_argument("a", type=Path)
    action.add_argument("b", type=Path)
    action.add_argument("--strict", action="store_true")
    given = parser.parse_args()
    if given.action == "record":
        record(given.checkout.resolve(), given.out.resolve(), given.only)
    else:
        sys.exit(compare(given.a, given.b, given.strict))


if __name__ == "__main__":
    main()
