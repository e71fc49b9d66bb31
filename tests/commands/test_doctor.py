"""What the check-up finds in a healthy place, and in places with one thing broken each."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections import namedtuple

import pytest
from hub_server import HubServer
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.hub import catalog, download
from spiralrope_cli.core.jobs import doctor
from spiralrope_cli.core.runtime import device

TINY = ("--arch", "deit-64x2x2")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "RATE_SECONDS", 0.0)
    monkeypatch.setitem(device.RATE_SIDE, "cpu", 64)
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def check(runs):
    """`spiralrope doctor --json`; gives what it says."""

    def call(*words, expect=0, offline=True):
        words = ["doctor", "--json", *map(str, words), *(["--offline"] if offline else [])]
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == expect, result.output + repr(result.exception)
        return json.loads(result.stdout)

    return call


@pytest.fixture
def pictures(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "pictures")


def the_finding(facts):
    assert not facts["ok"]
    [finding] = facts["findings"]
    return finding


def test_a_healthy_machine(check):
    facts = check(*TINY)
    assert facts["ok"]
    assert facts["findings"] == []
    assert facts["versions"]["torch"]["installed"]
    assert facts["machine"]["flops_per_second"]["float32"] > 0
    assert facts["data"] == {
        **{"data": "digits", "chosen_by": "default", "classes": 10, "train": 1437, "val": 360},
        **{"decoded": 1797, "unreadable": []},
    }
    assert facts["hub"]["words"] == "not checked: --offline"


def test_the_table_fits_80_columns(runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(cli.app, ["doctor", "--offline", *TINY, "--runs", "runs[/x]"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "no problems found"
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "runs[/x]" in "".join(line[10:].strip() for line in result.stdout.splitlines())


def test_valid_values_are_those_that_training_takes(check, tiny):
    advice = check(*TINY, "--batch-size", 48, "--micro-batch-size", 8)["run"]
    assert advice["valid_nproc"] == [1, 2, 3, 6, 8]
    assert 48 in advice["valid_batch_sizes"]
    run = tiny(arch="deit-64x2x2", micro_batch_size=8)
    for size in advice["valid_batch_sizes"]:
        run.optim.__class__(**{**vars(run.optim), "batch_size": size}).split_batch(1, 1437)
    assert advice["valid_rotate"] == [0, 1, 2, 3, 4]  # heads of 32 channels have 4 chunks per half
    assert advice["valid_rotate_same_theta"] == [2, 4]


def test_memory_grows_with_images_and_is_about_right(check):
    """The estimate against what autograd really keeps for one image."""
    import torch

    from spiralrope_cli import create_model

    few, many = (
        check(*TINY, "--micro-batch-size", n, "--precision", "fp32")["run"]["memory"]
        for n in (8, 16)
    )
    assert many["total"] - few["total"] == 8 * few["per_image"]
    model = create_model("deit-64x2x2", num_classes=10, image_size=8, patch_size=2, in_chans=1)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randn(8, 1, 8, 8))
    really = sum(storage.nbytes() for storage in kept.values()) / 8
    assert few["per_image"] == pytest.approx(really, rel=0.25)


def test_too_little_memory_is_a_note(check, monkeypatch):
    needs = check(*TINY)["run"]["memory"]
    there = needs["fixed"] + 3 * needs["per_image"] + 10
    monkeypatch.setattr(doctor.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, there))
    facts = check(*TINY)
    assert facts["ok"]
    assert "--micro-batch-size 3 or less" in facts["notes"][0]


def test_a_dit_counts_the_samples_it_would_leave(check):
    facts = check("--arch", "dit-64x2x2-2", "--num-samples", 1000)
    assert facts["disk"]["needs"]["samples"] == 1000 * 3 * 8 * 8
    assert facts["data"]["val"] == 360


def test_a_damaged_picture(check, pictures):
    bad = pictures / "train" / "dark" / "3.png"
    bad.write_bytes(bad.read_bytes()[:60])
    facts = check(*TINY, "--data", pictures, "--batch-size", 8, "--micro-batch-size", 8, expect=1)
    finding = the_finding(facts)
    assert finding["subject"] == "data"
    assert str(bad) in finding["problem"]
    assert facts["data"]["decoded"] == 25


def test_samples_are_those_of_a_dit(runs):
    result = CliRunner().invoke(cli.app, ["doctor", *TINY, "--num-samples", "10"])
    assert "--num-samples 10 has no effect" in str(result.exception)


@pytest.mark.parametrize(
    ("breaks", "word"),
    [
        (lambda root: [path.unlink() for path in (root / "train/dark").iterdir()], "no images"),
        (lambda root: shutil.rmtree(root / "val/dark"), "1 class folder(s) only in"),
        (lambda root: shutil.rmtree(root / "val"), "has no val/"),
        (shutil.rmtree, "is neither a folder nor"),
    ],
)
def test_a_broken_data_folder(check, pictures, breaks, word):
    breaks(pictures)
    facts = check(*TINY, "--data", pictures, expect=1)
    assert word in the_finding(facts)["problem"]
    assert facts["run"] is None


def test_a_batch_that_does_not_split(check):
    facts = check(*TINY, "--nproc", 3, "--device", "cpu", expect=1)
    assert "--batch-size 32 does not split" in the_finding(facts)["problem"]


def test_an_unwritable_runs_folder(check, runs):
    (runs / "file").write_text("")
    finding = the_finding(check(*TINY, "--runs", "file/runs", expect=1))
    assert finding["subject"] == "disk"
    assert "file cannot be written" in finding["problem"]


def test_a_disk_that_is_too_small(check, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    finding = the_finding(check(*TINY, expect=1))
    assert finding["subject"] == "disk"
    assert "1 kB free" in finding["problem"]


def test_a_damaged_weights_file(check, tmp_path):
    row = catalog.find_row("inception")
    path = tmp_path / "cache" / "weights" / row.file_name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other bytes")
    facts = check(*TINY, expect=1)
    assert str(path) in the_finding(facts)["problem"]
    assert facts["cache"]["files"] == [{"name": "inception", "size": 11, "whole": False}]


def test_files_of_the_hub_are_compared_with_their_names(tmp_path, monkeypatch):
    blob = tmp_path / ("a" * 64)
    blob.write_bytes(b"other bytes")
    link = tmp_path / "0400000.pt"
    link.symlink_to(blob)
    monkeypatch.setattr(download, "cached", lambda *_: link)
    assert download.damaged_files(catalog.find_row("dit-s2")) == [link]
    blob.rename(good := tmp_path / download.digest_like(blob, "")[1])
    link.unlink()
    link.symlink_to(good)
    assert download.damaged_files(catalog.find_row("dit-s2")) == []


@pytest.mark.parametrize(
    ("installed", "word"), [(None, "is not installed"), ("0.0.1", "timm is 0.0.1; >=")]
)
def test_a_package_that_is_missing_or_old(check, monkeypatch, installed, word):
    version_of = device.version_of
    monkeypatch.setattr(
        device, "version_of", lambda name: installed if name == "timm" else version_of(name)
    )
    monkeypatch.setattr(
        device, "requires", lambda _: ["timm>=1.0.15", 'no-such-package>=9; extra == "x"']
    )
    facts = check(*TINY, expect=1)
    assert word in the_finding(facts)["problem"]
    assert "no-such-package" not in facts["versions"]


def test_version_of_a_package_that_is_not_there():
    assert device.version_of("no-such-package-here") is None
    assert device.version_of("torch") == importlib.metadata.version("torch")


def test_a_hub_that_does_not_answer_is_told_and_no_failure(check, monkeypatch):
    from huggingface_hub import constants, file_download

    nowhere = "http://127.0.0.1:9"
    template = f"{nowhere}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    for module in (constants, file_download):  # the latter's before version 1
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    facts = check(*TINY, offline=False)
    assert facts["ok"]
    assert not facts["hub"]["answers"]
    assert f"no route to {nowhere}" in facts["hub"]["words"]


def test_a_hub_that_answers(spiralrope, runs):
    server = HubServer()
    server.repos[catalog.WEIGHTS_REPO] = {catalog.find_row("dit-s2").file: b"weights"}
    try:
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(runs / "home"), "HF_TOKEN": ""}
        facts = json.loads(spiralrope("doctor", "--json", *TINY, env=env).stdout)
    finally:
        server.close()
    assert facts["hub"] == {
        **{"endpoint": server.url, "asked": True, "answers": True, "words": "answers"}
    }
    assert not server.bodies()


def test_an_unknown_architecture_is_a_usage_error(runs):
    result = CliRunner().invoke(cli.app, ["doctor", "--arch", "deit-x"])
    assert result.exception.exit_code == 2
