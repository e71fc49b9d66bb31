"""What is refused before an upload, and what an upload leaves on the Hub."""

from __future__ import annotations

import pytest
from hub_server import pushes_a_card

from spiralrope_cli.core.errors import FetchError, NoRouteError
from spiralrope_cli.core.hub.upload import check_rights, push_folder

CARD = "---\nlicense: {}\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "README.md").write_text(CARD.format("mit"))
    (folder / "model.safetensors").write_bytes(b"weights" * 999)
    return folder


@pushes_a_card
@pytest.mark.parametrize("repo", ["me/vit", "lab/vit"])
def test_a_folder_arrives_in_one_commit(hub, folder, repo):
    check_rights(repo)
    assert push_folder(folder, repo, private=False) == f"{hub.url}/{repo}"
    assert hub.repos[repo] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(hub.commits[repo]) == 1
    assert repo not in hub.private


@pushes_a_card
def test_the_second_upload_replaces_what_changed(hub, folder):
    push_folder(folder, "me/vit", private=False)
    (folder / "model.safetensors").write_bytes(b"better" * 999)
    push_folder(folder, "me/vit", private=False)
    assert hub.repos["me/vit"]["model.safetensors"] == b"better" * 999
    push_folder(folder, "me/vit", private=False)
    assert len(hub.commits["me/vit"]) == 2, "nothing changed, so there is no third commit"


@pushes_a_card
def test_private_is_private_or_nothing_goes_there(hub, folder):
    push_folder(folder, "me/secret", private=True)
    assert hub.private == {"me/secret"}
    push_folder(folder, "me/secret", private=True)
    push_folder(folder, "me/open", private=False)
    before = dict(hub.repos["me/open"])
    (folder / "model.safetensors").write_bytes(b"secret")
    with pytest.raises(FetchError, match="me/open exists and is public; nothing was uploaded"):
        push_folder(folder, "me/open", private=True)
    assert hub.repos["me/open"] == before


@pytest.mark.parametrize(
    ("token", "repo", "told"),
    [
        ("", "me/vit", "needs a token of the Hub, and there is none"),
        ("hf_wrong", "me/vit", r"the Hub does not accept the token \(401\)"),
        ("hf_you", "me/vit", "the token is of you, who is no member of me"),
        ("hf_reader", "me/vit", "the token of me may only read"),
    ],
)
def test_a_token_without_the_right_is_one_error_before_all_work(
    hub, tmp_path, monkeypatch, token, repo, told
):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(FetchError, match=told) as refused:
        check_rights(repo)
    assert len(str(refused.value).splitlines()) == 2
    assert not hub.repos


@pushes_a_card
def test_a_right_that_the_token_only_seems_to_have_is_one_error(hub, folder, monkeypatch):
    """Fine-grained tokens do not tell their rights; only the upload does."""
    push_folder(folder, "me/vit", private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    with pytest.raises(FetchError, match=r"no right to write there \(403\)"):
        push_folder(folder, "me/vit", private=False)


@pushes_a_card
def test_what_the_hub_says_of_the_card_is_told(hub, folder):
    (folder / "README.md").write_text(CARD.format("do-what-you-want"))
    with pytest.raises(FetchError, match=r'refuses it: "license" must be one of mit,'):
        push_folder(folder, "me/vit", private=False)
    assert not hub.repos, "no empty repository is left behind"


@pushes_a_card
def test_offline_and_no_route(hub, folder, monkeypatch):
    hub.close()
    with pytest.raises(NoRouteError, match=f"me/vit: no route to {hub.url}"):
        check_rights("me/vit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="needs the network, and HF_HUB_OFFLINE is set"):
        check_rights("me/vit")
