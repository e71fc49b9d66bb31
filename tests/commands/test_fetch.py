"""The real command in a process of its own, against a server that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import random
import resource
from pathlib import Path

import pytest
from hub_server import COMMIT, OLD_COMMIT, OLD_HUB, HubServer, goes_on_within_the_call
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.hub.catalog import ROWS, WEIGHTS_REPO

SMALL = "dit_s2/0400000.pt"
BEST = "dit_xl2/0700000.pth"
VAE = "stabilityai/sd-vae-ft-mse"
VAE_FILE = "diffusion_pytorch_model.safetensors"
LARGE = random.Random(1).randbytes(24 << 20)
MIB = 1 << 20


@pytest.fixture
def hub():
    server = HubServer()
    server.repos[WEIGHTS_REPO] = {
        SMALL: b"small weights" * 5000,
        BEST: LARGE,
        "dit_b2/0400000.pt": b"other weights" * 5000,
    }
    server.repos[VAE] = {"config.json": b'{"a": 1}', VAE_FILE: b"vae" * 9999}
    yield server
    server.close()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def fetch(spiralrope, hub, home):
    """`spiralrope fetch ...` with the local server as the Hub."""

    def call(*words, expect=0, **variables):
        limits = {"preexec_fn": variables.pop("preexec_fn", None)}
        env = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "",
            "SPIRALROPE_CACHE": str(home / "ours"),
            **variables,
        }
        done = spiralrope("fetch", *words, expect=expect, env=env, **limits)
        assert "Traceback" not in done.stderr
        return done

    return call


def error_of(done):
    """The error, which must be one or two lines."""
    lines = done.stderr.splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("error: "))
    assert len(lines) - first <= 2
    assert not done.stdout
    return "\n".join(lines[first:])


def weights_in(home):
    """Everything in the Hub's cache that could be taken for a file of a repository."""
    return [
        path
        for name in ("blobs", "snapshots")
        for folder in (home / "hub").glob(f"models--*/{name}")
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    ]


def test_weights_come_once_and_their_path_is_the_result(fetch, hub, home):
    done = fetch("dit-s2")
    path = Path(done.stdout.strip())
    content = hub.repos[WEIGHTS_REPO][SMALL]
    assert path.read_bytes() == content
    assert path.name == "0400000.pt"
    assert f"sha256 {hashlib.sha256(content).hexdigest()}, same as the Hub" in done.stderr
    assert "dit-s2: 65 kB from" in done.stderr
    again = fetch("dit-s2")
    assert again.stdout == done.stdout
    assert "dit-s2 is here" in again.stderr
    assert len(hub.bodies()) == 1
    assert {each.name for each in weights_in(home)} == {path.name, path.resolve().name}


@goes_on_within_the_call
def test_a_connection_broken_in_the_middle_goes_on(fetch, hub):
    hub.cut[BEST] = [13 * MIB]
    path = Path(fetch("dit-xl2").stdout.strip())
    assert path.read_bytes() == LARGE
    first, second = hub.bodies(BEST)
    assert first.range == ""
    assert second.range == f"bytes={10 * MIB}-", "the whole pieces of 10 MiB are not sent again"


def test_a_connection_that_stays_broken_leaves_nothing(fetch, hub, home):
    hub.cut[SMALL] = [10] * 9
    error = error_of(fetch("dit-s2", expect=1))
    assert "the download of dit-s2 failed" in error
    kept = ".incomplete" if OLD_HUB else "nothing"
    assert not [path for path in weights_in(home) if path.suffix != kept]
    hub.cut.clear()
    path = Path(fetch("dit-s2").stdout.strip())
    assert path.read_bytes() == hub.repos[WEIGHTS_REPO][SMALL]


def test_wrong_bytes_of_the_right_size_never_stay(fetch, hub, home):
    hub.wrong.add(SMALL)
    assert "has a wrong digest after the download, not" in error_of(fetch("dit-s2", expect=1))
    assert not weights_in(home)
    assert "is not downloaded" in error_of(fetch("dit-s2", "--offline", expect=1))
    hub.wrong.clear()
    path = Path(fetch("dit-s2").stdout.strip())
    assert path.read_bytes() == hub.repos[WEIGHTS_REPO][SMALL]


def test_what_was_damaged_here_is_found_out(fetch, hub, home):
    path = Path(fetch("dit-s2").stdout.strip())
    content = path.read_bytes()
    path.resolve().write_bytes(content[:-1] + b"?")
    done = fetch("dit-s2")
    assert "0400000.pt was damaged; downloading it again" in done.stderr
    assert path.read_bytes() == content
    path.resolve().write_bytes(content[:-1] + b"?")
    error = error_of(fetch("dit-s2", "--offline", expect=1))
    assert "dit-s2 was damaged, and was deleted" in error
    assert not weights_in(home)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "", "set HF_TOKEN"),
        (401, "RepoNotFound", "set HF_TOKEN"),
        (403, "", "has no access to"),
        (403, "GatedRepo", "accept the terms on"),
        (404, "EntryNotFound", f"has no {WEIGHTS_REPO}/{SMALL} (404)"),
        (503, "", "answered 503"),
    ],
)
def test_refusals_are_one_line(fetch, hub, status, code, words):
    hub.refuse[SMALL] = (status, code)
    assert words in error_of(fetch("dit-s2", expect=1))


def test_revisions(fetch, hub):
    old = Path(fetch("dit-s2", "--revision", "v0").stdout.strip())
    assert OLD_COMMIT in old.parts
    assert COMMIT in Path(fetch("dit-s2", "--revision", COMMIT).stdout.strip()).parts
    assert len(hub.bodies()) == 1, "the same content is not sent twice"
    error = error_of(fetch("dit-s2", "--revision", "nowhere", expect=1))
    assert "has no revision nowhere (404)" in error


def test_nobody_answers(fetch, hub):
    here = fetch("dit-s2").stdout
    hub.close()
    assert f"no route to {hub.url}" in error_of(fetch("dit-b2", expect=1))
    done = fetch("dit-s2")
    assert done.stdout == here, "what is here is taken"
    assert "no route to" in done.stderr
    assert fetch("dit-s2", "--offline").stdout == here
    assert fetch("dit-s2", HF_HUB_OFFLINE="1").stdout == here
    assert "dit-b2 is not downloaded" in error_of(fetch("dit-b2", "--offline", expect=1))
    error = error_of(fetch("inception", expect=1, HF_HUB_OFFLINE="1"))
    assert "inception is not downloaded\n  fetch it once without HF_HUB_OFFLINE" in error


def test_someone_else_answers(fetch, hub):
    hub.hub = False
    assert "does not answer like the Hub" in error_of(fetch("dit-s2", expect=1))


def test_too_little_disk_is_told_before_a_byte_comes(fetch, hub):
    hub.announce[SMALL] = 10**18
    assert "1,000,000 TB are needed" in error_of(fetch("dit-s2", expect=1))
    assert not hub.bodies()


@pytest.mark.skipif(
    OLD_HUB, reason="before 1.20 huggingface_hub keeps the part that it has, for the next call"
)
def test_a_size_limit_in_the_middle_leaves_nothing(fetch, hub, home):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))

    error = error_of(fetch("dit-xl2", expect=1, preexec_fn=small_disk))
    assert "a file reached the size limit (ulimit -f)" in error
    assert not weights_in(home)
    hub.plain["i.pth"] = LARGE
    mirror = {"SPIRALROPE_INCEPTION_URL": f"{hub.url}/plain/i.pth"}
    assert "a file reached the size limit (ulimit -f)" in error_of(
        fetch("inception", expect=1, preexec_fn=small_disk, **mirror)
    )
    kept = {path.suffix for path in (home / "ours").rglob("*") if path.is_file()}
    assert kept == {".lock", ".part"}


def test_the_token_goes_to_the_hub_and_not_beyond(fetch, hub):
    fetch("dit-s2", HF_TOKEN="hf_secret")
    to_hub = [each for each in hub.asked if "/resolve/" in each.path]
    assert all(each.token == "Bearer hf_secret" for each in to_hub)
    assert hub.bodies()[0].token == ""


def test_a_copy_is_real_and_flat(fetch, hub, tmp_path):
    done = fetch("dit-s2", "--out", "weights")
    copy = tmp_path / "weights" / "0400000.pt"
    assert Path(done.stdout.strip()) == Path("weights/0400000.pt")
    assert not copy.is_symlink()
    assert copy.read_bytes() == hub.repos[WEIGHTS_REPO][SMALL]
    assert [path.name for path in copy.parent.iterdir()] == ["0400000.pt"]
    fetch("dit-s2", "--out", "weights")
    copy.write_text("mine")
    assert "exists and differs" in error_of(fetch("dit-s2", "--out", "weights", expect=1))
    assert copy.read_text() == "mine"
    error = error_of(fetch("dit-s2", "dit-b2", "--out", "both", expect=2))
    assert "dit-s2 and dit-b2 both have a file 0400000.pt" in error
    assert not (tmp_path / "both").exists()


def test_a_vae_is_a_folder_with_its_config(fetch, hub, tmp_path):
    done = fetch("vae-mse", "--json")
    [entry] = json.loads(done.stdout)
    names = {path.name for path in Path(entry["path"]).iterdir()}
    assert names == {"config.json", VAE_FILE}
    assert "git sha1" in done.stderr, "small files are kept in git, under git's digest"
    copy = fetch("vae-mse", "--offline", "--out", "vae").stdout.strip()
    assert {path.name for path in (tmp_path / copy).iterdir()} == names


def test_a_wrong_config_is_found_out_too(fetch, hub, home):
    hub.wrong.add("config.json")
    assert "config.json has a wrong digest" in error_of(fetch("vae-mse", expect=1))
    assert not weights_in(home)


def test_inception_comes_from_its_mirror_and_must_have_its_digest(fetch, hub, home):
    hub.plain["i.pth"] = b"not the true ones" * 999
    mirror = {"SPIRALROPE_INCEPTION_URL": f"{hub.url}/plain/i.pth"}
    error = error_of(fetch("inception", expect=1, **mirror))
    assert "sha256 does not begin with 6726825d" in error
    kept = [path.name for path in (home / "ours").rglob("*") if path.is_file()]
    assert all(name.endswith(".lock") for name in kept)


def test_the_list_shows_true_steps_and_what_is_here(fetch, hub):
    fetch("dit-xl2")
    asked = len(hub.asked)
    shown = fetch("--list", COLUMNS="80")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert all(row.name in shown.stdout and row.file in shown.stdout for row in ROWS)
    best = next(line for line in shown.stdout.splitlines() if line.startswith("dit-xl2@7m"))
    assert best.split()[1:5] == ["7M", "25.2", "MB", "yes"]
    assert "rotate 4, max_freq_lang 1.5, same_theta off" in shown.stdout
    rows = {row["name"]: row for row in json.loads(fetch("--list", "--json").stdout)}
    assert rows["dit-xl2@7m"]["steps"] == 7_000_000
    assert rows["dit-xl2@7m"]["size"] == len(LARGE)
    assert Path(rows["dit-xl2@7m"]["here"]).is_file()
    assert rows["dit-xl2@7m"]["aliases"] == ["dit-xl2"]
    assert rows["dit-s2"]["here"] is None
    assert len(hub.asked) == asked, "the list asks nobody"


def test_usage(fetch):
    assert "did you mean dit-xl2" in error_of(fetch("dit-x2", expect=2))
    assert "--list shows all published names" in error_of(fetch(expect=2))


def test_help_shows_examples():
    said = CliRunner().invoke(cli.app, ["fetch", "--help"], env={"COLUMNS": "80"}).output
    assert "spiralrope fetch dit-xl2" in said
    assert "fetch" in {command.name for command in cli.app.registered_commands}
