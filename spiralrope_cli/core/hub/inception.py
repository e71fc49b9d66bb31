"""The weights of Inception, on this disk."""

from __future__ import annotations

from pathlib import Path

from spiralrope_cli.core.errors import CheckpointError, ConfigError, FetchError
from spiralrope_cli.core.hub.catalog import find
from spiralrope_cli.core.hub.files import digest_like
from spiralrope_cli.core.hub.plain import target_of


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
    _, digest = digest_like(path, "")
    if not given and not digest.startswith(row.sha256):
        raise CheckpointError(
            f"{path} is damaged: its sha256 begins with {digest[:8]} and not {row.sha256}",
            "spiralrope fetch inception brings it again",
        )
    return path, digest
