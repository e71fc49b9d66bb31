"""`spiralrope fid`: random weights, real digits, a handful of images each time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from typer.testing import CliRunner

from spiralrope_cli import main as cli
from spiralrope_cli.core.errors import SpiralRopeError

FEW = ["--kid-subset-size", "4", "--kid-subsets", "5"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fid(cache, inception_weights):
    """Runs the command here; gives its JSON, or the error that it would print."""

    def call(*words, weights=True):
        words = ["fid", *map(str, words), "--json", "--device", "cpu"]
        words += ["--weights", str(inception_weights)] if weights else []
        result = CliRunner().invoke(cli.app, words)
        if result.exit_code:
            if not isinstance(result.exception, SpiralRopeError):
                raise result.exception
            assert len(str(result.exception).splitlines()) <= 2
            return result.exception
        return json.loads(result.stdout) | {"stderr": result.stderr}

    return call


@pytest.fixture(scope="session")
def sets(tmp_path_factory, digit_pictures):
    """8 and 7 digits, the latter also as a folder of images."""
    root = tmp_path_factory.mktemp("sets")
    first, second = digit_pictures[:8], digit_pictures[20:27]
    np.savez(root / "a.npz", first)
    np.savez_compressed(root / "b.npz", second)
    (root / "folder" / "deep").mkdir(parents=True)
    for number, pixels in enumerate(second):
        where = root / "folder" / ("deep" if number > 3 else "")
        Image.fromarray(pixels).save(where / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def features(inception_weights, digit_pictures):
    """Pool features and logits of both sets by torch-fidelity's own network."""
    network = FeatureExtractorInceptionV3(
        "original", ["2048", "logits_unbiased"], str(inception_weights)
    )
    images = torch.from_numpy(np.concatenate((digit_pictures[:8], digit_pictures[20:27])))
    with torch.inference_mode():
        pool, logits = network(images.permute(0, 3, 1, 2))
    return pool[:8], pool[8:], logits[:8]


def test_all_metrics_are_those_of_torch_fidelity(fid, sets, features):
    found = fid(sets / "a.npz", sets / "folder", *FEW)
    x, y, logits = features
    cx, cy = ((each - each.mean(0)).double() / (len(each) - 1) ** 0.5 for each in (x, y))
    fid_of_few = (
        (x.double().mean(0) - y.double().mean(0)).square().sum()
        + cx.square().sum()
        + cy.square().sum()
        - 2 * torch.linalg.svdvals(cx @ cy.T).sum()
    )
    kid = kid_features_to_metric(x, y, kid_subsets=5, kid_subset_size=4, verbose=False)
    precision, recall = calculate_precision_recall_full(x, y)
    assert found["fid"] == pytest.approx(fid_of_few.item(), rel=1e-4)
    score = isc_features_to_metric(logits, 1)["inception_score_mean"]
    assert score > 1.05
    assert found["is"] == pytest.approx(score, rel=1e-4)
    assert found["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    assert found["kid_std"] == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-3)
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall))
    assert found["sfid"] > 0
    assert found["left_out"] == {}
    assert (found["samples"]["count"], found["reference"]["count"]) == (8, 7)
    for name in ("samples", "reference"):
        assert len(found[name]["sha256"]) == 64
    assert found["protocol"]["precision"] == "fp32"
    assert len(found["protocol"]["weights_sha256"]) == 64
    warned = " ".join(found["warnings"])
    assert "8 samples are fewer than the 50,000" in warned
    assert "7 images of REFERENCE are not more than the 2048 features" in warned
    assert "not the published ones" in warned


def test_swapped_sides_are_seen(fid, sets):
    words = ("--select", "precision,recall")
    one = fid(sets / "a.npz", sets / "b.npz", *words)
    other = fid(sets / "b.npz", sets / "a.npz", *words)
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])
    assert one["samples"]["path"] == other["reference"]["path"]
    assert (one["samples"]["count"], other["samples"]["count"]) == (8, 7)
    assert one["samples"]["sha256"] == other["reference"]["sha256"]
    assert one["fid"] is None


def test_batches_and_processes_change_nothing(fid, sets, spiralrope, inception_weights, cache):
    words = [*FEW, "--select", "fid,sfid,is,kid,recall"]
    one = fid(sets / "a.npz", sets / "folder", *words)
    many = json.loads(
        spiralrope(
            *("fid", sets / "a.npz", sets / "b.npz", *words),
            *("--batch-size", 3, "--nproc", 2, "--device", "cpu", "--json"),
            *("--weights", inception_weights),
        ).stdout
    )
    for name in ("fid", "sfid", "is", "kid", "kid_std", "recall"):
        assert many[name] == pytest.approx(one[name], rel=1e-6), name


def test_statistics_of_a_reference_are_computed_once(fid, sets, cache):
    words = (sets / "a.npz", sets / "b.npz", "--select", "sfid,recall")
    first = fid(*words)
    assert "REFERENCE  7/7" in first["stderr"]
    assert first["reference"]["from_cache"] == []
    again = fid(*words)
    assert "REFERENCE  7/7" not in again["stderr"]
    assert again["reference"]["from_cache"] == ["sfid", "features"]
    for name in ("sfid", "recall"):
        assert again[name] == pytest.approx(first[name], rel=1e-6)
    (kept,) = (cache / "statistics").glob("*-sfid.npz")
    assert fid(*words, "--precision", "bf16")["reference"]["from_cache"] == []
    kept.write_bytes(kept.read_bytes()[:1000])
    (cache / "statistics" / kept.name.replace("sfid", "features")).unlink()
    repaired = fid(sets / "a.npz", sets / "folder", "--select", "sfid")
    assert repaired["reference"]["from_cache"] == []
    assert repaired["sfid"] == pytest.approx(first["sfid"], rel=1e-6)


def test_a_cache_that_cannot_be_written_costs_no_result(fid, sets, cache):
    cache.mkdir()
    (cache / "statistics").write_text("in the way")
    found = fid(sets / "a.npz", sets / "b.npz", "--select", "recall")
    assert 0 <= found["recall"] <= 1
    assert "warning: statistics of REFERENCE cannot be cached" in found["stderr"]


def test_saved_statistics_are_a_reference(fid, sets, tmp_path):
    direct = fid(sets / "a.npz", sets / "b.npz", "--select", "fid")
    saved = fid(sets / "b.npz", "--save-stats", tmp_path / "b.npz")
    assert "statistics of SAMPLES (7 images) are in" in saved["stderr"]
    with np.load(tmp_path / "b.npz") as arrays:  # as pytorch-fid does
        assert arrays["mu"][:].shape == (2048,)
        assert arrays["sigma"][:].shape == (2048, 2048)
        assert arrays["sigma_s"].shape == (2023, 2023)
    found = fid(sets / "a.npz", tmp_path / "b.npz", "--select", "fid,precision")
    assert found["fid"] == pytest.approx(direct["fid"], rel=1e-9)
    assert found["precision"] is None
    assert found["left_out"] == {"precision": "REFERENCE holds no images"}
    assert found["reference"]["count"] == 7
    assert "exists" in fid(sets / "a.npz", "--save-stats", tmp_path / "b.npz").message
    # Statistics alone need neither images nor weights.
    none = fid(tmp_path / "b.npz", tmp_path / "b.npz", "--select", "fid", weights=False)
    assert none["fid"] == pytest.approx(0, abs=1e-6)


def test_statistics_by_other_weights_are_refused(fid, sets, tmp_path, inception_weights):
    fid(sets / "b.npz", "--save-stats", tmp_path / "b.npz", "--select", "fid")
    other = tmp_path / "other.pth"
    weights = torch.load(inception_weights)
    torch.save({**weights, "fc.bias": weights["fc.bias"] + 1}, other)
    error = fid(sets / "a.npz", tmp_path / "b.npz", "--weights", other, weights=False)
    assert "statistics with different protocols" in error.message
    assert error.hint.startswith("REFERENCE: inception-v3-compat 2015-12-05, weights sha256 ")
    # They do not matter to what is measured without them.
    words = (sets / "a.npz", tmp_path / "b.npz", "--select", "is", "--precision", "bf16")
    assert fid(*words)["is"] > 1


def test_images_and_statistics_in_one_file_are_both_used(fid, sets, tmp_path):
    """As ADM's reference batches: stored statistics for FID, images for the others."""
    with np.load(sets / "b.npz") as arrays:
        np.savez(tmp_path / "both.npz", arrays["arr_0"], mu=np.zeros(2048), sigma=np.eye(2048))
    found = fid(sets / "a.npz", tmp_path / "both.npz", "--select", "fid,precision")
    other = fid(sets / "a.npz", sets / "b.npz", "--select", "precision")
    assert found["precision"] == other["precision"]
    assert found["fid"] > 1000
    assert found["reference"]["stored_statistics"] == ["fid"]
    # Nobody knows of how many images the stored ones are: surely not of these seven.
    assert "8 images of SAMPLES" in " ".join(found["warnings"])
    assert "of REFERENCE" not in " ".join(found["warnings"])


def test_statistics_that_a_file_had_stored_are_saved_without_claims(fid, sets, tmp_path):
    both, saved = tmp_path / "both.npz", tmp_path / "saved.npz"
    with np.load(sets / "b.npz") as arrays:
        np.savez(both, arrays["arr_0"], mu=np.zeros(2048), sigma=np.eye(2048))
    said = fid(both, "--save-stats", saved, "--select", "is,fid")["stderr"]
    assert "an unknown number of images" in said
    with np.load(saved) as arrays:
        assert (arrays["num_images"], arrays["protocol"]) == (0, "")
        assert arrays["mu"].sum() == 0


def test_an_error_bar(fid, sets):
    found = fid(sets / "a.npz", sets / "b.npz", "--select", "fid", "--bootstrap", "2")
    assert 0 < found["fid_std"] < found["fid"]
    assert found["protocol"]["bootstrap"] == 2


def test_the_inception_score_needs_no_reference(fid, sets):
    found = fid(sets / "a.npz", "--select", "is", "--num-samples", "6")
    assert found["is"] > 1
    assert found["samples"]["count"] == 6
    assert found["reference"] is None


def test_the_table_shows_both_sides_and_why_a_metric_is_missing(
    cache, sets, inception_weights, monkeypatch
):
    words = ["fid", sets / "a.npz", sets / "b.npz", "--weights", inception_weights]
    words += ["--select", "is,kid", "--device", "cpu"]
    shown = CliRunner().invoke(cli.app, list(map(str, words))).stdout
    assert shown.index("a.npz") < shown.index("8 images of 8x8") < shown.index("b.npz")
    assert "7 images of 8x8" in shown
    assert "SAMPLES has 8 images, but 1000 are" in shown
    assert max(map(len, shown[shown.index("metric") :].splitlines())) <= 80


def test_damaged_images_are_named_or_left_out(fid, sets, tmp_path, digit_pictures):
    for number in range(3):
        Image.fromarray(digit_pictures[number]).save(tmp_path / f"{number}.png")
    (tmp_path / "1b.png").write_text("a text")
    error = fid(tmp_path, "--select", "is")
    assert "1b.png cannot be read" in error.message
    assert "--skip-bad" in error.hint
    found = fid(tmp_path, "--select", "is", "--skip-bad")
    assert (found["samples"]["count"], found["samples"]["unreadable"]) == (3, 1)
    assert "1 image(s) could not be read" in found["stderr"]
    error = fid(tmp_path, "--select", "is", "--skip-bad", "--num-samples", "4")
    assert "--num-samples 4: only 3 image(s)" in error.message


def test_metrics_that_damaged_images_make_impossible_are_left_out(fid, sets, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes((sets / "folder" / f"{number}.png").read_bytes())
    (tmp_path / "4.png").write_text("a text")
    words = (tmp_path, sets / "a.npz", "--skip-bad", "--kid-subset-size", "5")
    found = fid(*words, "--select", "kid,precision")
    assert found["kid"] is None
    assert found["left_out"]["kid"].startswith("SAMPLES has 4 images, but 5 are needed")
    assert 0 <= found["precision"] <= 1
    assert "no metric of --select can be computed" in fid(*words, "--select", "kid").message
    (tmp_path / "3.png").write_text("a text")
    found = fid(*words, "--select", "is,precision")
    assert found["precision"] is None


def ones(*shape):
    return np.ones(shape, np.uint8)


WRONG = {
    "no images": ({"pictures": ones(4, 8, 8, 3)}, "has no arr_0 and no mu: it holds pictures"),
    "floats": ({"arr_0": np.zeros((4, 8, 8, 3))}, "arr_0 is float64; images must be uint8"),
    "channels first": ({"arr_0": ones(4, 3, 8, 8)}, r"shape (4, 3, 8, 8); images must be N x H"),
    "pickled": ({"arr_0": np.array([{}], dtype=object)}, "holds pickled objects"),
    "one image": ({"arr_0": ones(1, 8, 8, 3)}, "has 1 image(s)"),
    "no image": ({"arr_0": ones(0, 8, 8, 3)}, "has 0 image(s)"),
    "other features": ({"mu": np.zeros(64), "sigma": np.eye(64)}, "it must be (2048,)"),
    "no covariance": ({"mu": np.zeros(2048)}, "has mu but no sigma"),
    "not symmetric": (
        {"mu": np.zeros(2048), "sigma": np.eye(2048) + np.eye(2048, k=1)},
        "is not a covariance",
    ),
    "not a number": (
        {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)},
        "mu holds 2048 values that are NaN",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_one_line(fid, sets, tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    for words in (
        (tmp_path / "wrong.npz", sets / "b.npz"),
        (sets / "b.npz", tmp_path / "wrong.npz"),
    ):
        error = fid(*words)
        assert message in error.message
        assert error.exit_code == 1


def test_other_wrong_inputs(fid, sets, tmp_path):
    (tmp_path / "cut.npz").write_bytes((sets / "a.npz").read_bytes()[:300])
    (tmp_path / "words.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("cut.npz", "is damaged"),
        ("words.txt", "is neither a folder of images nor an .npz"),
        ("empty", "holds no images"),
        ("missing", "REFERENCE " + str(tmp_path / "missing") + " does not exist"),
    ):
        assert message in fid(sets / "a.npz", tmp_path / name).message
    assert (
        "holds only 8 images" in fid(sets / "a.npz", sets / "b.npz", "--num-samples", "9").message
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--select", "fid,fod"], "unknown metric 'fod'"),
        (["--bootstrap", "1"], "needs 2 or more"),
        (["--bootstrap", "5", "--select", "kid"], "--bootstrap needs fid in --select"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--precision", "auto"], "fp32, tf32 or bf16"),
        (["--save-stats", "stats"], "must end in .npz"),
        (["--weights", "none.pth"], "--weights none.pth does not exist"),
    ],
)
def test_wrong_options_are_usage_errors(fid, sets, words, message):
    error = fid(sets / "a.npz", sets / "b.npz", *words, weights="--weights" not in words)
    assert message in str(error)
    assert error.exit_code == 2


def test_options_that_change_nothing_are_told(fid, sets):
    found = fid(
        sets / "a.npz", "--select", "is", "--num-samples", "2", "--seed", "3", "--kid-subsets", "4"
    )
    assert "note: --seed has no effect" in found["stderr"]
    assert "note: --kid-subsets has no effect: --select lacks kid" in found["stderr"]


def test_options_of_features_are_told_where_none_are_made(fid, sets, tmp_path):
    kept = tmp_path / "kept.npz"
    fid(sets / "a.npz", "--select", "fid", "--save-stats", kept, sets / "b.npz")
    words = ("--select", "FID,fid", "--weights", "none.pth", "--batch-size", 3)
    found = fid(kept, kept, *words, weights=False)
    assert "note: --weights has no effect: no image is read" in found["stderr"]
    assert "note: --batch-size has no effect" in found["stderr"]
    assert abs(found["fid"]) < 1e-6


def test_a_missing_reference_is_a_usage_error(fid, sets):
    error = fid(sets / "a.npz")
    assert "REFERENCE is missing" in error.message
    assert error.exit_code == 2


def test_without_weights_it_says_what_to_fetch(fid, sets, cache):
    error = fid(sets / "a.npz", sets / "b.npz", weights=False)
    assert str(cache / "weights") in error.message
    assert "spiralrope fetch inception" in error.hint
    assert "--weights" in error.hint
    where = cache / "weights" / "weights-inception-2015-12-05-6726825d.pth"
    where.parent.mkdir(parents=True)
    where.write_bytes(b"wrong")
    error = fid(sets / "a.npz", sets / "b.npz", weights=False)
    assert "is damaged: its sha256 begins with" in error.message


def test_weights_are_read_in_either_format_of_torch_and_never_run(
    fid, sets, tmp_path, inception_weights
):
    """Torch 1.6 changed the format in 2020, the year of the published file."""
    words = (sets / "a.npz", "--select", "is", "--num-samples", "2")
    old, trap, text = (tmp_path / name for name in ("old.pth", "trap.pth", "text.pth"))
    torch.save(torch.load(inception_weights), old, _use_new_zipfile_serialization=False)
    found = fid(*words, "--weights", old, weights=False)
    assert found["is"] == fid(*words)["is"]
    torch.save({"Mixed_7c.branch_pool.conv.weight": Trap(tmp_path / "ran")}, trap)
    text.write_text("no weights")
    for path, message in ((trap, "reading it would run"), (text, "is not a checkpoint of torch")):
        error = fid(*words, "--weights", path, weights=False)
        assert message in error.message
        assert error.exit_code == 1
    assert not (tmp_path / "ran").exists()


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_tf32_is_fp32_where_the_device_has_none(fid, sets):
    found = fid(sets / "a.npz", "--select", "is", "--precision", "tf32", "--device", "cpu")
    assert found["protocol"]["precision"] == "fp32"


def test_half_precision_says_that_it_is_another_protocol(fid, sets):
    found = fid(sets / "a.npz", "--select", "is", "--precision", "bf16")
    assert found["protocol"]["precision"] == "bf16"
    assert any("papers use fp32" in line for line in found["warnings"])
