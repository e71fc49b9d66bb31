"""Networks of others that are used unchanged: where VAE and Inception lie on this disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from spiralrope_cli.core.config.latents import LATENT_CHANNELS, LATENT_SCALE, VAE_FACTOR, VAE_NAMES
from spiralrope_cli.core.errors import CheckpointError, ConfigError, FetchError
from spiralrope_cli.core.hub.catalog import find
from spiralrope_cli.core.hub.download import fetch_published, local_path
from spiralrope_cli.core.hub.files import sha256_of
from spiralrope_cli.core.hub.plain import target_of

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class VaeFiles:
    """A VAE in the layout of diffusers, on this machine."""

    given: str  # as the user named it
    folder: Path  # with its config and its weights

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
    """The VAE that `--vae` names; `ema` and `mse` are fetched unless they are here."""
    return local_vae(given) or _checked(VaeFiles(given, fetch_published(find(f"vae-{given}"))))


def local_vae(given: str) -> VaeFiles | None:
    """The same without asking anyone; None for a published VAE that is not here yet."""
    if given in VAE_NAMES:
        folder = local_path(find(f"vae-{given}"))
        return _checked(VaeFiles(given, folder)) if folder else None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--vae {given} is neither {' nor '.join(VAE_NAMES)} nor a folder")
    return _checked(VaeFiles(given, folder))


def _checked(files: VaeFiles) -> VaeFiles:
    """Refuses a folder without a VAE, and a VAE that DiT cannot work with."""
    path = files.folder / CONFIG_FILE
    layout = f"a VAE's folder holds {CONFIG_FILE} and {WEIGHTS_FILE}, as diffusers saves it"
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (files.folder / name).is_file():
            raise CheckpointError(f"--vae {files.given}: {files.folder} has no {name}", layout)
    try:
        config = json.loads(path.read_text())
        # What a config leaves out is as diffusers defaults it.
        kind = config.get("_class_name", "AutoencoderKL")
        pixels, back = config.get("in_channels", 3), config.get("out_channels", 3)
        latents = config.get("latent_channels", 4)
        factor = 2 ** (len(config.get("block_out_channels", (64,))) - 1)
        float(config.get("scaling_factor", LATENT_SCALE))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"--vae {files.given}: {path} is no config of a VAE", layout
        ) from error
    if kind != "AutoencoderKL":
        raise CheckpointError(f"--vae {files.given} is of the kind {kind}, not AutoencoderKL")
    if (pixels, back, latents) != (3, 3, LATENT_CHANNELS):
        raise CheckpointError(
            f"--vae {files.given} makes {latents} channels of {pixels} and gives {back} back; DiT "
            f"takes one that makes {LATENT_CHANNELS} of 3"
        )
    if factor != VAE_FACTOR:
        raise CheckpointError(
            f"--vae {files.given} shrinks images {factor} times; DiT takes one that does so "
            f"{VAE_FACTOR} times"
        )
    return files


def find_inception(given: str) -> tuple[Path, str]:
    """The file of Inception's weights and its SHA-256: `--weights`, or what `fetch` brought."""
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
