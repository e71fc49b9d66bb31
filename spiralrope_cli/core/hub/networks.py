"""Networks of others that are used as they are: where VAE and Inception lie on this disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiralrope_cli.core.config.latents import LATENT_CHANNELS, LATENT_SCALE, VAE_FACTOR, VAE_NAMES
from spiralrope_cli.core.errors import CheckpointError, ConfigError, FetchError
from spiralrope_cli.core.hub.catalog import find
from spiralrope_cli.core.hub.download import fetch, local_path
from spiralrope_cli.core.hub.files import sha256_of
from spiralrope_cli.core.hub.plain import target_of

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class VaeFiles:
    """A VAE in the layout of diffusers, on this machine.

    Attributes:
        given: as the user named it.
        folder: with its config and its weights.
    """

    given: str
    folder: Path

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.folder / WEIGHTS_FILE

    @property
    def scale(self) -> float:
        """What DiT's latents are multiplied by."""
        config = json.loads((self.folder / CONFIG_FILE).read_text())
        return float(config.get("scaling_factor", LATENT_SCALE))

    def sha256(self) -> str:
        """Which VAE it is, whatever its folder is called."""
        return sha256_of(self.weights)


def find_vae(given: str) -> VaeFiles:
    """The VAE that `--vae` names; `ema` and `mse` are fetched unless they are here.

    Args:
        given: `ema`, `mse`, or a folder with config.json and safetensors.

    Raises:
        ConfigError: neither a name nor a folder.
        CheckpointError: no VAE in it, or one that DiT cannot work with.
        FetchError: it cannot be had.
    """
    files = local_vae(given)
    if files is None:
        files = VaeFiles(given, fetch(find(f"vae-{given}")))
        _check(files)
    return files


def local_vae(given: str) -> VaeFiles | None:
    """The same without asking anyone; None for a published VAE that is not here yet."""
    if given in VAE_NAMES:
        folder = local_path(find(f"vae-{given}"))
        if folder is None:
            return None
    else:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"--vae {given} is neither {' nor '.join(VAE_NAMES)} nor a folder")
    files = VaeFiles(given, folder)
    _check(files)
    return files


def _check(files: VaeFiles) -> None:
    folder = files.folder
    layout = f"a VAE's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}, as diffusers saves it"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"--vae {files.given}: {folder} has no {name}", layout)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        kind, channels, factor = _shape(config)
        float(config.get("scaling_factor", LATENT_SCALE))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"--vae {files.given}: {folder / CONFIG_FILE} is no config of a VAE", layout
        ) from error
    if kind != "AutoencoderKL":
        raise CheckpointError(f"--vae {files.given} is of the kind {kind}, not AutoencoderKL")
    if channels != (3, 3, LATENT_CHANNELS):
        pixels, back, latents = channels
        raise CheckpointError(
            f"--vae {files.given} makes {latents} channels of {pixels} and gives {back} back; DiT "
            f"takes one that makes {LATENT_CHANNELS} of 3"
        )
    if factor != VAE_FACTOR:
        raise CheckpointError(
            f"--vae {files.given} shrinks images {factor} times; DiT takes one that does so "
            f"{VAE_FACTOR} times"
        )


def _shape(config: dict[str, Any]) -> tuple[str, tuple[int, int, int], int]:
    """Class, channels of image, image back and latents, and factor; as diffusers defaults them."""
    channels = (
        config.get("in_channels", 3),
        config.get("out_channels", 3),
        config.get("latent_channels", 4),
    )
    levels = len(config.get("block_out_channels", (64,)))
    return config.get("_class_name", "AutoencoderKL"), channels, 2 ** (levels - 1)


def find_inception(given: str) -> tuple[Path, str]:
    """The weights' file and its SHA-256.

    Args:
        given: `--weights`, empty for those that `fetch inception` brings.

    Raises:
        ConfigError: no such file.
        FetchError: nothing was fetched yet.
        CheckpointError: what was fetched is damaged.
    """
    row = find("inception")
    path = Path(given).expanduser() if given else target_of(row)
    if given and not path.is_file():
        raise ConfigError(f"--weights {path} is no file", "spiralrope fetch inception brings one")
    if not path.is_file():
        raise FetchError(
            f"the weights of Inception are not here: there is no {path}",
            "spiralrope fetch inception stores them there (95 MB); --weights FILE takes another",
        )
    digest = sha256_of(path)
    if not given and not digest.startswith(row.sha256):
        raise CheckpointError(
            f"{path} is damaged: its sha256 begins with {digest[:8]} and not {row.sha256}",
            "spiralrope fetch inception brings it again",
        )
    return path, digest
