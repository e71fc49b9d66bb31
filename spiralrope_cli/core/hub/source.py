"""What SOURCE, `--vae` and `--weights` name: where the weights lie on this disk.

Without torch. What downloads is imported inside the functions: the shell's completion of SOURCE
waits for this file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from spiralrope_cli.core.config.dit_runs import LATENT_CHANNELS, LATENT_SCALE, VAE_FACTOR, VAE_NAMES
from spiralrope_cli.core.config.hub import FILE_SUFFIXES, HUB, HUB_FORM
from spiralrope_cli.core.config.option import one_of
from spiralrope_cli.core.config.training import RUNS_FOLDER
from spiralrope_cli.core.errors import CheckpointError, ConfigError, FetchError
from spiralrope_cli.core.hub.catalog import (
    DIFFUSERS_FILE,
    DIFFUSERS_INDEX,
    HUB_CONFIG,
    TRANSFORMER_FOLDER,
    Row,
    find_row,
    hub_row,
)
from spiralrope_cli.core.runtime.run_folder import (
    inner_runs,
    read_config,
    read_json,
    run_configs,
    step_folder,
    steps_on_disk,
)
from spiralrope_cli.core.storage import (
    CHECKPOINTS,
    EMA_FILE,
    MODEL_FILE,
    own_folder,
    parse,
    sha256_of,
)

CLASSIFIERS = ("pretrain", "finetune")


# --- SOURCE


@dataclass(frozen=True)
class Source:
    """Weights by SOURCE."""

    given: str  # as the user named them
    place: Path | None  # file, or folder of a checkpoint; None before the download
    run: Path | None = None  # run folder; None for a file
    published: Row | None = None  # its row of the catalogue, or one made for hf:OWNER/NAME

    def file(self, ema: bool) -> Path:
        """File of the raw or EMA weights; a published file may hold both."""
        if self.place is None:
            raise CheckpointError(
                f"{self.given} is not downloaded", f"spiralrope fetch {self.given} downloads it"
            )
        if self.place.is_file():
            return self.place
        averaged = self.place / EMA_FILE
        return averaged if ema and averaged.is_file() else self.place / MODEL_FILE


def find_source(given: str, *, best: bool = False) -> Source:
    """Finds the weights of a run or checkpoint folder, a file or a name, without reading them."""
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        return _in_folder(given, path, best)
    if path.is_file():
        return Source(given, path)
    if given.startswith(HUB):
        return Source(given, None, published=find_row(given))
    if path.suffix in FILE_SUFFIXES or len(path.parts) > 1:
        raise CheckpointError(
            f"{given} does not exist",
            f"check the path; weights on the Hugging Face Hub are {HUB_FORM}",
        )
    try:
        return Source(given, None, published=find_row(given))
    except ConfigError as unknown:
        raise ConfigError(
            f"{given} is not a file, a run folder or a published name", unknown.hint
        ) from unknown


def _in_folder(given: str, folder: Path, best: bool) -> Source:
    if (folder / MODEL_FILE).is_file() and not (folder / CHECKPOINTS).is_dir():
        real = folder.resolve()
        of_run = real.parent.name == CHECKPOINTS and real.name.isdigit()
        return Source(given, real, run=real.parent.parent if of_run else None)
    if (folder / DIFFUSERS_INDEX).is_file():
        return Source(given, folder / TRANSFORMER_FOLDER / DIFFUSERS_FILE)
    steps = steps_on_disk(folder)
    if not steps:
        kind, takes = own_folder(folder)
        raise CheckpointError(
            f"{folder} holds no checkpoint" + (f": it is {kind}" if kind else ""),
            inner_runs(folder) or takes or f"a run folder has numbered folders in {CHECKPOINTS}/",
        )
    step = best_step(folder) if best else steps[-1]
    return Source(given, step_folder(folder, step), run=folder)


def best_step(run: Path) -> int:
    step = read_json(run / CHECKPOINTS / "best.json").get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{run} has no best checkpoint yet", "leave --best out")
    if step not in steps_on_disk(run):
        raise CheckpointError(f"the best checkpoint of {run}, step {step}, does not exist")
    return step


def newest_run() -> Path:
    """The run of a classifier with the newest checkpoint."""
    saved: list[tuple[float, Path]] = []
    for config in run_configs(Path(RUNS_FOLDER)):
        if not (steps := steps_on_disk(config.parent)):
            continue
        try:
            command = read_config(config).get("command")
        except ConfigError:
            continue  # another kind of run, or of another version
        if command in CLASSIFIERS:
            when = step_folder(config.parent, steps[-1]).stat().st_mtime
            saved.append((when, config.parent))
    if not saved:
        raise CheckpointError(
            f"SOURCE is missing, and {RUNS_FOLDER}/ holds no {one_of(CLASSIFIERS)} run",
            "name a run folder, a checkpoint file or published weights",
        )
    return max(saved)[1]


# --- Networks of others, used unchanged: VAE and Inception


@dataclass(frozen=True)
class VaeFiles:
    """A VAE in the layout of diffusers, on this machine."""

    given: str  # as the user named it
    folder: Path  # with its config and its weights

    @property
    def weights(self) -> Path:
        return self.folder / DIFFUSERS_FILE

    @property
    def scale(self) -> float:
        """Factor of the latents for a DiT."""
        config = parse((self.folder / HUB_CONFIG).read_text())
        return float(config.get("scaling_factor", LATENT_SCALE))

    def sha256(self) -> str:
        return sha256_of(self.weights)


def find_vae(given: str) -> VaeFiles:
    """The VAE of `--vae`; `ema`, `mse` and those of the Hub are downloaded if needed."""
    from spiralrope_cli.core.hub.download import fetch_published

    return local_vae(given) or _checked(VaeFiles(given, fetch_published(_vae_row(given))))


def _vae_row(given: str) -> Row:
    return hub_row(given, "vae") if given.startswith(HUB) else find_row(f"vae-{given}")


def local_vae(given: str) -> VaeFiles | None:
    """`find_vae` without a download; None if a published VAE is not cached."""
    from spiralrope_cli.core.hub.download import local_path

    if given in VAE_NAMES or given.startswith(HUB):
        folder = local_path(_vae_row(given))
        return _checked(VaeFiles(given, folder)) if folder else None
    folder = Path(os.path.expanduser(given))
    if not folder.is_dir():
        raise ConfigError(
            f"--vae {given} is neither {' nor '.join(VAE_NAMES)} nor a folder",
            f"on the Hugging Face Hub it is {HUB}OWNER/NAME[/FOLDER][@REVISION]",
        )
    return _checked(VaeFiles(given, folder))


def _checked(files: VaeFiles) -> VaeFiles:
    """Raises if the folder holds no VAE, or one that does not fit a DiT."""
    path = files.folder / HUB_CONFIG
    layout = (
        f"the folder of a VAE must hold {HUB_CONFIG} and {DIFFUSERS_FILE}, as diffusers saves it"
    )
    for name in (HUB_CONFIG, DIFFUSERS_FILE):
        if not (files.folder / name).is_file():
            raise CheckpointError(f"--vae {files.given}: {files.folder} has no {name}", layout)
    try:
        config = parse(path.read_text())
        # Missing keys have the defaults of diffusers.
        kind = config.get("_class_name", "AutoencoderKL")
        pixels, back = config.get("in_channels", 3), config.get("out_channels", 3)
        latents = config.get("latent_channels", 4)
        factor = 2 ** (len(config.get("block_out_channels", (64,))) - 1)
        float(config.get("scaling_factor", LATENT_SCALE))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"--vae {files.given}: {path} is not the config of a VAE", layout
        ) from error
    if kind != "AutoencoderKL":
        raise CheckpointError(f"--vae {files.given} is a {kind}, not an AutoencoderKL")
    if (pixels, back, latents) != (3, 3, LATENT_CHANNELS):
        raise CheckpointError(
            f"--vae {files.given} has {pixels} input, {latents} latent and {back} output channels; "
            f"a DiT needs 3, {LATENT_CHANNELS} and 3"
        )
    if factor != VAE_FACTOR:
        raise CheckpointError(
            f"--vae {files.given} downsamples by {factor}; a DiT needs a factor of {VAE_FACTOR}"
        )
    return files


def find_inception(given: str, option: str = "--weights") -> tuple[Path, str]:
    """File and SHA-256 of the Inception weights: `given`, or those of `fetch inception`."""
    from spiralrope_cli.core.hub.files import target_of

    row = find_row("inception")
    path = Path(os.path.expanduser(given)) if given else target_of(row)
    if given and not path.is_file():
        raise ConfigError(
            f"{option} {path} does not exist", "spiralrope fetch inception downloads the weights"
        )
    if not path.is_file():
        raise FetchError(
            f"the Inception weights are not downloaded: {path} does not exist",
            f"use spiralrope fetch inception (95 MB), or {option} FILE",
        )
    digest = sha256_of(path)
    if not given and not digest.startswith(row.sha256):
        raise CheckpointError(
            f"{path} is damaged: its sha256 begins with {digest[:8]}, not with {row.sha256}",
            "spiralrope fetch inception downloads it again",
        )
    return path, digest
