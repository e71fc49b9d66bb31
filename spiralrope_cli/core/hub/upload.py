"""Folders of weights to the Hugging Face Hub, by the token and the rules of `huggingface_hub`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from spiralrope_cli import __version__
from spiralrope_cli.core.errors import FetchError, NoRouteError, first_line


def check_rights(repo: str) -> None:
    """Raises where an upload to OWNER/NAME cannot succeed, before there is anything to upload."""
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise FetchError(f"--push {repo} needs the network, and HF_HUB_OFFLINE is set")
    if not (token := get_token()):
        raise FetchError(
            f"--push {repo} needs a token of the Hub, and there is none",
            "hf auth login stores one, or set HF_TOKEN",
        )
    with _asking(repo):
        user = HfApi(token=token).whoami()
    owner = repo.partition("/")[0]
    if owner not in (user["name"], *(each["name"] for each in user.get("orgs", ()))):
        raise FetchError(
            f"--push {repo}: the token is of {user['name']}, who is no member of {owner}",
            "push to a name of your own, or set another HF_TOKEN",
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise FetchError(
            f"--push {repo}: the token of {user['name']} may only read",
            f"make one that writes on {constants.ENDPOINT}/settings/tokens",
        )


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Uploads all files of a folder in one commit, and returns the URL of the repository.

    A new repository is made if there is none, after the Hub has accepted the model card; `private`
    never makes an existing one private.
    """
    from huggingface_hub import HfApi, ModelCard, constants, get_token

    api = HfApi(token=get_token())
    with _asking(repo):
        ModelCard.load(folder / "README.md").validate()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise FetchError(
                f"--private: {repo} exists and is public; nothing was uploaded",
                f"change that on {constants.ENDPOINT}/{repo}/settings, or leave --private out",
            )
        message = f"Upload weights with spiralrope {__version__}"
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return f"{constants.ENDPOINT}/{repo}"


@contextlib.contextmanager
def _asking(repo: str) -> Iterator[None]:
    """Errors of requests that write, as ours."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    try:
        yield
    # Older versions of huggingface_hub raise that of the HTTP library for a status, too.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        code = getattr(getattr(error, "response", None), "status_code", 0)
        if code == 401:
            raise FetchError(
                f"--push {repo}: the Hub does not accept the token (401)",
                "hf auth login stores another one, or set HF_TOKEN",
            ) from error
        if code == 403:
            raise FetchError(
                f"--push {repo}: the token has no right to write there (403)",
                f"make one that writes on {constants.ENDPOINT}/settings/tokens",
            ) from error
        if isinstance(error, ValueError):  # of the metadata of the card
            answer = " ".join(str(error).split())
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the Hub's own JSON
                answer = "; ".join(each["message"] for each in json.loads(answer)["errors"])
            raise FetchError(f"--push {repo}: the Hub refuses it: {answer}") from error
        if code:
            answer = f"{constants.ENDPOINT} answered {code}: {first_line(error)}"
            raise FetchError(f"--push {repo}: {answer}", "try again later") from error
        raise NoRouteError(
            f"--push {repo}: no route to {constants.ENDPOINT}: {first_line(error)}",
            "check network, proxy and HF_ENDPOINT; the same command goes on",
        ) from error
