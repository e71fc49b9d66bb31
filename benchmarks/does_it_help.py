"""Do more directions help? Five position embeddings, one recipe, several seeds, other sizes.

    python benchmarks/does_it_help.py --out FOLDER --fashion IDX     # Fashion-MNIST, then lines
    python benchmarks/does_it_help.py --out FOLDER                   # only lines, made by formula
    python benchmarks/does_it_help.py --out FOLDER --page docs       # table and figure of the page

IDX is a folder with the four .gz files of Fashion-MNIST, such as /usr/share/datasets/fashion-mnist
of the Debian package dataset-fashion-mnist. Each network is one file in FOLDER: run the same
command again, and it goes on with the next one. All kinds of a seed come before the next seed.

The recipe was fixed before the first result, and nothing was tuned. With a seed all kinds have the
same data order, and the same initial weights but for the frequencies of mixed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import statistics
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spiralrope_cli import RopeConfig, create_model
from spiralrope_cli.core.models.deit import DeiT, resize_pos_embed
from spiralrope_cli.core.runtime.seeds import generator_for, seed_everything
from spiralrope_cli.core.storage import atomic_write
from spiralrope_cli.core.training.step import parameter_groups

PAGE, RESULTS, FIGURE = "does-it-help.md", "does-it-help.json", "images/does-it-help.png"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"

KINDS = {
    "none": RopeConfig(enabled=False),
    "axial": RopeConfig(rope_kind="axial"),
    "mixed": RopeConfig(rope_kind="mixed"),
    "rotate 2": RopeConfig(rotate=2),
    "rotate 4": RopeConfig(rotate=4),
}
TITLES = {"fashion": "Fashion-MNIST", "lines": "lines (made by formula)"}
PATCH, SIDE = 2, 28
ANGLES = 8
OTHER_SIDES = (20, 40)


@dataclass(frozen=True)
class Recipe:
    """All that the kinds share."""

    arch: str = "deit-64x2x1"  # width x depth x heads: one head of 64 channels
    num_train: int = 12_000
    num_val: int = 1_000
    steps: int = 450
    batch_size: int = 16
    lr: float = 2e-3
    warmup: int = 40
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    precision: str = "bf16"


TINY = Recipe(num_train=64, num_val=16, steps=3, batch_size=8, warmup=1, arch="deit-16x1x1")


def lines(count: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two dots on noise; the class is the direction of the line through them, of eight.

    Dots are 10 to 20 pixels apart, the angle is within 5 degrees of the class's multiple of 22.5.

    Returns:
        [count, 1, side, side] uint8, and [count] int64.
    """
    random = np.random.default_rng([seed, 17])
    label = random.integers(ANGLES, size=count)
    angle = np.pi * (label / ANGLES + random.uniform(-5, 5, count) / 180)
    half = random.uniform(5, 10, count)
    step = half[:, None] * np.stack((np.cos(angle), -np.sin(angle)), 1)
    room = (side - 1) / 2 - np.abs(step) - 1.5  # both dots are inside
    middle = (side - 1) / 2 + room * random.uniform(-1, 1, (count, 2))
    y, x = np.mgrid[:side, :side]
    image = random.normal(0.15, 0.1, (count, side, side))
    for x0, y0 in (*(middle + step).T[None], *(middle - step).T[None]):
        away = (x - x0[:, None, None]) ** 2 + (y - y0[:, None, None]) ** 2
        image += 0.8 * np.exp(-away / 2)
    pixels = (255 * image.clip(0, 1)).astype(np.uint8)
    return torch.from_numpy(pixels)[:, None], torch.from_numpy(label)


def fashion(folder: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of Fashion-MNIST, whose order is random: [count, 1, 28, 28], [count]."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{split}-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    images = read("images-idx3", 16).reshape(-1, 1, 28, 28)[:count]
    labels = read("labels-idx1", 8)[:count]
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def load(data: str, recipe: Recipe, folder: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Training and validation images, normalised, and labels."""
    if data == "lines":
        sets = [lines(recipe.num_train, SIDE, 0), lines(recipe.num_val, SIDE, 1)]
    else:
        sets = [
            fashion(Path(folder), split, count)
            for split, count in (("train", recipe.num_train), ("t10k", recipe.num_val))
        ]
    mean, std = sets[0][0].float().mean(), sets[0][0].float().std()
    return tuple(((images.float() - mean) / std, labels) for images, labels in sets)


def autocast(recipe: Recipe) -> torch.autocast:
    """bf16 in the matmuls; everything else in fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16")


def trained(kind: str, seed: int, recipe: Recipe, images: Tensor, labels: Tensor) -> DeiT:
    """A network after `recipe.steps` steps of AdamW, warm-up and half a cosine."""
    seed_everything(seed, "init")
    model = create_model(recipe.arch, rope=KINDS[kind], **sizes(SIDE, labels))
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=0, betas=recipe.betas, fused=True
    )
    per_epoch, order = len(images) // recipe.batch_size, torch.empty(0)
    for step in range(recipe.steps):
        epoch, number = divmod(step, per_epoch)
        if number == 0:
            order = torch.randperm(len(images), generator=generator_for(seed, "order", epoch))
        batch = order[number * recipe.batch_size :][: recipe.batch_size]
        over = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
        scale = (step + 1) / recipe.warmup if over < 0 else (1 + math.cos(math.pi * over)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * scale
        with autocast(recipe):
            loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert isinstance(model, DeiT)
    return model.eval()


def sizes(side: int, labels: Tensor) -> dict[str, int]:
    """Arguments of `create_model`."""
    classes = int(labels.max()) + 1
    return {"image_size": side, "patch_size": PATCH, "in_chans": 1, "num_classes": classes}


@torch.no_grad()
def accuracy(model: DeiT, recipe: Recipe, images: Tensor, labels: Tensor) -> float:
    """acc@1 in percent."""
    right = 0
    for part, expected in zip(images.split(250), labels.split(250), strict=True):
        with autocast(recipe):
            right += int((model(part).argmax(1) == expected).sum())
    return 100 * right / len(images)


def at_side(
    model: DeiT, kind: str, side: int, scaling: str, recipe: Recipe, labels: Tensor
) -> DeiT:
    """The network on another grid: positions scaled or continued, learned ones resampled."""
    rope = replace(KINDS[kind], scaling=scaling)
    made = create_model(recipe.arch, rope=rope, pretrain_grid=model.grid, **sizes(side, labels))
    assert isinstance(made, DeiT)
    state = model.state_dict()
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], model.grid, made.grid)
    made.load_state_dict(state)
    return made.eval()


def measured(data: str, kind: str, seed: int, recipe: Recipe, sets: tuple) -> dict[str, object]:
    """Trains one network, and evaluates it at all sizes."""
    start, busy = time.time(), time.process_time()
    (images, labels), (val, expected) = sets
    model = trained(kind, seed, recipe, images, labels)
    acc = {str(SIDE): accuracy(model, recipe, val, expected)}
    for side in OTHER_SIDES:
        scaled = F.interpolate(val, (side, side), mode="bilinear", antialias=True)
        for scaling in ("interpolate", "extrapolate"):
            other = at_side(model, kind, side, scaling, recipe, labels)
            acc[f"{side} {scaling}"] = accuracy(other, recipe, scaled, expected)
    return {
        "data": data,
        "kind": kind,
        "seed": seed,
        "acc1": acc,
        "seconds": round(time.time() - start),
        "cpu_seconds": round(time.process_time() - busy),
        "machine": f"{cpu_name()}, one thread, torch {torch.__version__.partition('+')[0]}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def run_all(args: argparse.Namespace, recipe: Recipe) -> None:
    """Measures what FOLDER lacks; a file appears when its network is done."""
    out, settings = Path(args.out), json.loads(json.dumps(asdict(recipe)))
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "recipe.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"error: {kept} is of another recipe\n  choose another --out")
    kept.write_text(json.dumps(settings, indent=1))
    for data in (["fashion"] if args.fashion else []) + ["lines"]:
        sets = None
        for seed in args.seeds:
            for kind in KINDS:
                file = out / f"{data}-{kind.replace(' ', '')}-seed{seed}.json"
                if file.exists():
                    continue
                sets = sets or load(data, recipe, args.fashion)
                row = measured(data, kind, seed, recipe, sets)
                with atomic_write(file) as beside:
                    beside.write_text(json.dumps(row))
                print(f"{data}, {kind}, seed {seed}: {row['acc1']}, {row['seconds']} s", flush=True)


# ---- the page


def collect(out: Path) -> dict[str, object]:
    """All results in FOLDER; of each data set the seeds that all kinds have."""
    rows = [json.loads(file.read_text()) for file in sorted(out.glob("*-seed*.json"))]
    seeds = {
        data: sorted(
            seed
            for seed in {row["seed"] for row in rows if row["data"] == data}
            if {r["kind"] for r in rows if (r["data"], r["seed"]) == (data, seed)} == {*KINDS}
        )
        for data in TITLES
    }
    return {
        "recipe": json.loads((out / "recipe.json").read_text()),
        "rows": [row for row in rows if row["seed"] in seeds[row["data"]]],
    }


def cpu_name() -> str:
    """The model of the CPU, as Linux names it."""
    info = Path("/proc/cpuinfo")
    found = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return found[0].partition(":")[2].strip() if found else platform.processor()


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    more = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{more}"


def columns(rows: list[dict]) -> list[str]:
    """Sizes in the order of the table."""
    return sorted(rows[0]["acc1"], key=lambda name: (int(name.split()[0]), name != str(SIDE), name))


def tables(results: dict) -> str:
    """What stands between the marks of the page."""
    recipe, text = results["recipe"], []
    dates = sorted({row["date"] for row in results["rows"]})
    minutes = sum(row["cpu_seconds"] for row in results["rows"]) / 60
    text += [
        f"{len(results['rows'])} networks `{recipe['arch']}`, {recipe['steps']} steps of "
        f"{recipe['batch_size']} images each; {minutes:.0f} minutes of CPU time in all, on "
        f"{' and '.join(sorted({row['machine'] for row in results['rows']}))}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}. acc@1 in percent, mean ± standard "
        f"deviation over seeds, {recipe['num_val']} validation images.",
        "",
    ]
    for data, title in TITLES.items():
        rows = [row for row in results["rows"] if row["data"] == data]
        if not rows:
            text += [f"**{title}**: not measured.", ""]
            continue
        names = columns(rows)
        grids = [f"{int(n.split()[0]) // PATCH}²{n[2:]}" for n in names]
        seeds = sorted({row["seed"] for row in rows})
        text += [
            f"**{title}**, {len(seeds)} seed(s); grids of patches, trained at {SIDE // PATCH}²:",
            "",
            f"| | {' | '.join(grids)} |",
            "|---" * (1 + len(names)) + "|",
        ]
        for kind in KINDS:
            mine = [row["acc1"] for row in rows if row["kind"] == kind]
            cells = [spread([acc[name] for acc in mine]) for name in names]
            text.append(f"| {kind} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def draw(results: dict, path: Path) -> None:
    """Mean and standard deviation of every kind and size, and a dot per seed."""
    from matplotlib.figure import Figure

    sets = [data for data in TITLES if any(row["data"] == data for row in results["rows"])]
    figure = Figure(figsize=(9, 3.6 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), 1, squeeze=False)[:, 0]
    for axis, data in zip(axes, sets, strict=True):
        rows = [row for row in results["rows"] if row["data"] == data]
        names = columns(rows)
        for place, kind in enumerate(KINDS):
            values = np.array(
                [[row["acc1"][name] for name in names] for row in rows if row["kind"] == kind]
            )
            x = np.arange(len(names)) + 0.15 * (place - 2)
            error = values.std(0, ddof=1) if len(values) > 1 else None
            style = {"fmt": "osDv^"[place], "capsize": 3, "markersize": 5}
            bar = axis.errorbar(x, values.mean(0), error, label=kind, **style)
            dots = {"color": bar[0].get_color(), "alpha": 0.35, "markersize": 3}
            axis.plot(np.tile(x, len(values)), values.flatten(), "o", **dots)
        axis.set_xticks(range(len(names)), [f"{int(n[:2]) // PATCH}²{n[2:]}" for n in names])
        axis.set(ylabel="acc@1, %", xlabel="grid of patches")
        axis.set_title(TITLES[data], loc="left")
        axis.grid(axis="y", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncols=len(KINDS), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.05))
    figure.savefig(path, dpi=110)


def write_page(out: Path, docs: Path) -> None:
    """Writes table and figure of FOLDER into the page, and the results as JSON beside it."""
    results = collect(out)
    if not results["rows"]:
        raise SystemExit(f"error: {out} has no seed that all kinds have")
    page = docs / PAGE
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{tables(results)}{END}{rest.partition(END)[2]}")
    (docs / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    draw(results, docs / FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--fashion", default="", help="folder with the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--page", metavar="DOCS", help="write table and figure of the page there")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to try the script")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.page:
        write_page(Path(args.out), Path(args.page))
    else:
        run_all(args, TINY if args.tiny else Recipe())


if __name__ == "__main__":
    main()
