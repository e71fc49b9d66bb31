"""The real command on real pictures, with a VAE of random weights."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from spiralrope_cli import GaussianDiffusion, create_model
from spiralrope_cli import main as cli
from spiralrope_cli.core.config.samples import EncodeRun
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.data import latents as cached_latents
from spiralrope_cli.core.data.augment import cropped_array
from spiralrope_cli.core.data.latents import LatentCache
from spiralrope_cli.core.data.splits import train_split
from spiralrope_cli.core.diffusion.vae import load_vae, sample_posterior
from spiralrope_cli.core.errors import DataError
from spiralrope_cli.core.jobs import encode
from spiralrope_cli.core.jobs.encode import data_folder
from spiralrope_cli.core.runtime.distributed import StopRequest

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 pictures of three classes in all shapes: three shards of 16, 16 and 8."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(1)
    for number in range(40):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        height, width = noise.integers(16, 80, 2)
        coarse = noise.integers(0, 256, (4, 5, 3)).astype(np.uint8)
        picture = Image.fromarray(coarse).resize((int(width), int(height)))
        picture.save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Pictures this small gain nothing by threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(before)


def work(run):
    encode.work(run, encode.settle(run))


def config_of(photos, vae, out, **changes):
    values = {
        "data": str(photos),
        "out": str(out),
        "vae": str(vae),
        "image_size": (32, 24),
        "batch_size": 5,
        "machine": MachineConfig(nproc=1, device="cpu", precision="fp32", workers=0, skip_bad=True),
    }
    return EncodeRun(**{**values, **changes})


@pytest.fixture
def make(photos, tiny_vae, tmp_path):
    """Runs of the job in this process."""
    return partial(config_of, photos, tiny_vae, out=tmp_path / "latents")


@pytest.fixture(scope="module")
def made(photos, tiny_vae, tmp_path_factory):
    """A finished cache, not to be changed."""
    out = tmp_path_factory.mktemp("made") / "latents"
    work(config_of(photos, tiny_vae, out))
    return out


def same_caches(one, other):
    one, other = LatentCache(Path(one)), LatentCache(Path(other))
    assert torch.equal(one.labels, other.labels)
    for mirrored in (False, True):
        chosen = torch.arange(len(one)), torch.full((len(one),), mirrored)
        for ours, theirs in zip(one.mean_std(*chosen), other.mean_std(*chosen), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_training_from_the_cache_is_training_with_the_vae(made, photos, tiny_vae):
    cache, vae = LatentCache(made), load_vae(tiny_vae, CPU)
    files = sorted(photos.glob("*/*.png"))
    assert len(cache) == len(files) == 40
    assert cache.labels.tolist() == [int(path.parent.name[-1]) for path in files]
    assert cache.metadata.plan.class_names == ("class0", "class1", "class2")

    numbers = torch.tensor([3, 39, 17, 16, 0, 25])
    mirrored = torch.tensor([True, False, True, False, False, True])
    pictures = []
    for number, flip in zip(numbers, mirrored, strict=True):
        pixels = torch.tensor(cropped_array(Image.open(files[number]).convert("RGB"), (32, 24)))
        pictures.append(pixels.flip(-1) if flip else pixels)
    images = torch.stack(pictures).float() / 127.5 - 1
    noise, more = torch.randn(2, 6, 4, 4, 3)
    in_the_loop = sample_posterior(*vae.encode(images), noise, vae.scale)
    cached = sample_posterior(*cache.mean_std(numbers, mirrored), noise, cache.scale)
    torch.testing.assert_close(cached, in_the_loop, rtol=0, atol=1e-5)

    losses = []
    for latents in (in_the_loop, cached):
        torch.manual_seed(0)
        model = create_model("dit-64x2x2-1", num_classes=3, input_size=(4, 3))
        model.final_layer.linear.weight.data.normal_(std=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for t in (torch.arange(6) * 99, torch.arange(6) * 150):
            loss = (
                GaussianDiffusion()
                .training_losses(model, latents, t, more, y=cache.labels[numbers])["loss"]
                .mean()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[1] != losses[0]
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)


def test_two_processes_write_what_one_does(made, spiralrope, photos, tiny_vae, tmp_path):
    both = tmp_path / "both"
    done = spiralrope(
        *("dit-encode", "--data", photos, "--vae", tiny_vae, "--image-size", "32x24"),
        *("--out", both, "--batch-size", 16, "--nproc", 2, "--device", "cpu", "--workers", 0),
    )
    assert "40 images, 3 classes" in done.stderr
    assert "encoded  40/40" in done.stderr
    assert "images/s" in done.stderr
    assert done.stdout.startswith(f"{both}: 40 images of 3 classes")
    assert "in 3 shards" in done.stdout
    same_caches(made, both)


def test_an_interrupted_run_goes_on(make, made, monkeypatch, capfd):
    config = make()
    write, written = cached_latents.write_shard, []

    def write_and_stop(folder, plan, number, *rest):
        written.append(number)
        if number == 1:  # the signal comes while the second shard is made
            signal.raise_signal(signal.SIGTERM)
        return write(folder, plan, number, *rest)

    monkeypatch.setattr(cached_latents, "write_shard", write_and_stop)
    with pytest.raises(SystemExit) as left:
        work(config)
    assert left.value.code == 143
    assert "the same command resumes" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"00002\.safetensors is missing"):
        LatentCache(Path(config.out))
    assert written == [0, 1]
    work(config)
    assert written == [0, 1, 2]
    same_caches(config.out, made)


def test_a_signal_within_a_shard_ends_it_at_once(make, monkeypatch, tmp_path):
    config = make()
    monkeypatch.setattr(StopRequest, "listen", lambda self: setattr(self, "signal_number", 2))
    with pytest.raises(SystemExit) as left:
        work(config)
    assert left.value.code == 130
    assert not list(tmp_path.glob("latents/*.safetensors"))


def test_a_kill_leaves_whole_shards_alone(make, started, photos, tiny_vae, tmp_path):
    out = tmp_path / "killed"
    words = ("dit-encode", "--data", photos, "--vae", tiny_vae, "--image-size", "64")
    child = started(*words, "--out", out, "--batch-size", 1, "--device", "cpu", "--workers", 0)
    until = time.monotonic() + 120
    while not (out / "00000.safetensors").exists() and time.monotonic() < until:
        time.sleep(0.005)
    child.kill()
    child.wait()
    config = make(out=str(out), image_size=(64, 64))
    there = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert 1 <= len(there) < 3
    work(config)
    LatentCache(out).verify()
    assert there["00000.safetensors"] == (out / "00000.safetensors").read_bytes()


def test_what_is_damaged_is_encoded_again_and_only_that(make, made, capfd):
    config = make()
    shutil.copytree(made, config.out)
    cache = LatentCache(Path(config.out))
    before = cache.mean_std(torch.arange(40), torch.arange(40) % 2 == 0)
    before = [each.clone() for each in before]
    out = cache.metadata.folder
    untouched = (out / "00000.safetensors").stat().st_mtime_ns
    content = bytearray((out / "00001.safetensors").read_bytes())
    content[-5] ^= 1
    (out / "00001.safetensors").write_bytes(content)
    (out / "00002.safetensors").unlink()
    capfd.readouterr()
    work(config)
    told = capfd.readouterr().err
    assert "00001.safetensors is damaged" in told
    assert "00002.safetensors is missing" in told
    assert (out / "00000.safetensors").stat().st_mtime_ns == untouched
    cache = LatentCache(out)
    cache.verify()
    after = cache.mean_std(torch.arange(40), torch.arange(40) % 2 == 0)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-5)

    work(config)
    assert "is finished: all 3 shards are correct" in capfd.readouterr().err


@pytest.fixture
def with_bad(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "bad")
    for number in (0, 33):
        (root / f"class{number % 3}" / f"{number:02d}.png").write_bytes(b"no picture")
    return root


def test_unreadable_images_are_left_out_and_told(make, with_bad, capfd):
    config = make(data=str(with_bad))
    work(config)
    assert "2 image(s) could not be read" in capfd.readouterr().err
    cache = LatentCache(Path(config.out))
    assert len(cache) == 38
    paths = [path for shard in cache.metadata.shards for path in shard.unreadable]
    assert [path[-6:] for path in paths] == ["00.png", "33.png"]
    left = [n for n in range(40) if n not in (0, 33)]
    assert sorted(cache.labels.tolist()) == sorted(n % 3 for n in left)


STRICT = MachineConfig(nproc=1, device="cpu", precision="fp32", workers=0)


def test_an_unreadable_image_ends_the_run_otherwise(make, with_bad):
    with pytest.raises(DataError, match=r"00\.png cannot be read"):
        work(make(data=str(with_bad), machine=STRICT))


def test_images_that_can_be_read_by_now_are_encoded(make, with_bad, photos, capfd):
    config = make(data=str(with_bad))
    work(config)
    work(config)
    assert "is finished: all 3 shards" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"00\.png cannot be read"):
        work(make(data=str(with_bad), machine=STRICT))
    shutil.copy(photos / "class0" / "33.png", with_bad / "class0")
    work(config)
    assert len(LatentCache(Path(config.out))) == 39
    shutil.copy(photos / "class0" / "00.png", with_bad / "class0")
    work(make(data=str(with_bad), machine=STRICT))
    assert len(LatentCache(Path(config.out))) == 40


def test_a_set_of_unreadable_images_is_told(make, with_bad, capfd):
    for path in with_bad.glob("*/*.png"):
        path.write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match="none of the 40 images"):
            work(make(data=str(with_bad)))


def test_a_shard_of_something_else_is_encoded_again(make, made, capfd):
    config = make()
    shutil.copytree(made, config.out)
    save_file({"labels": torch.zeros(1)}, Path(config.out, "00001.safetensors"))
    work(config)
    assert "00001.safetensors is damaged: " in capfd.readouterr().err
    same_caches(config.out, made)


def test_a_cache_is_kept_from_classes_and_runs(call, photos, runs):
    (runs / "run" / "checkpoints").mkdir(parents=True)
    (runs / "run" / "config.yaml").touch()
    words = ("--data", photos, "--vae", "ema")  # nothing is downloaded first
    for out, told in ((photos / "cache", "a class folder"), ("run", "--out run is a training run")):
        result, _ = call(*words, "--out", out)
        assert told in result.exception.message


def test_a_vae_without_a_scale_is_told(call, photos, tiny_vae, tmp_path):
    vae = shutil.copytree(tiny_vae, tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": None}))
    result, _ = call("--data", photos, "--vae", vae)
    assert "is not the config of a VAE" in result.exception.message


@pytest.fixture
def call(runs, monkeypatch):
    """The command with its workers replaced by a list."""
    launched = []
    monkeypatch.setattr(encode, "launch", lambda job, run, plan: launched.append(plan))

    def invoke(*words):
        return CliRunner().invoke(cli.app, ["dit-encode", *map(str, words)]), launched

    return invoke


def test_options_reach_the_run(call, photos, tiny_vae):
    words = ("--data", photos, "--vae", tiny_vae, "--image-size", "16x24", "--device", "cpu")
    result, launched = call(*words, "--batch-size", 3, "--out", "o", "--skip-bad", "--nproc", 3)
    assert result.exit_code == 0, result.output
    (plan,) = launched
    run = plan.run
    assert (run.image_size, run.batch_size, run.out) == ((16, 24), 3, "o")
    assert (run.machine.skip_bad, run.machine.nproc) == (True, 3)
    assert run.machine.precision == "fp32"


def test_a_dry_run_prints_the_plan_and_writes_nothing(call, runs, photos, tiny_vae):
    words = ("--data", photos, "--vae", tiny_vae, "--image-size", 64, "--nproc", 1)
    result, launched = call(*words, "--dry-run")
    assert result.exit_code == 0
    assert not launched
    assert "40 images, 3 classes" in result.stderr
    # 40 x (plain, mirrored) x (mean, deviation) x 4x8x8 x 4 bytes, and the labels
    assert "164 kB in 3 shards" in result.stderr
    assert list(runs.iterdir()) == []


@pytest.fixture
def no_download(monkeypatch, tmp_path):
    """An empty cache, and a download that fails the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "spiralrope_cli.core.hub.download.fetch_published", lambda row: pytest.fail("fetched")
    )


def test_a_dry_run_fetches_no_vae(call, photos, no_download):
    words = ("--data", photos, "--image-size", "32x24", "--device", "cpu")
    result, launched = call(*words, "--vae", "mse", "--dry-run")
    assert result.exit_code == 0
    assert not launched
    assert "VAE    mse: to be downloaded, float32" in result.stderr
    assert "in 3 shards; 4x4x3 latents" in result.stderr


def test_a_dry_run_without_the_vae_knows_a_cache_again(call, made, photos, no_download):
    words = ("--data", photos, "--out", made, "--device", "cpu", "--dry-run")
    result, _ = call(*words, "--image-size", "32x24")
    assert "3 are finished" in result.stderr
    result, _ = call(*words, "--image-size", "32")
    assert "image_size was (32, 24), now (32, 32)" in result.exception.message
    assert "vae" not in result.exception.message


def test_a_folder_with_train_is_taken_by_its_train(image_folder):
    for given, folder in ((image_folder, "train"), (image_folder / "val", "")):
        assert train_split(data_folder(str(given))).path == (given / folder).resolve()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data is missing"),
        (["--data", "digits"], "--data digits is too small for a VAE"),
        (["--data", "nowhere"], "--data nowhere is not a folder"),
        (["--data", "."], "has no class folders"),
        (
            ["--data", "PHOTOS", "--image-size", "20"],
            "--image-size 20: the sides must be multiples of 8",
        ),
        (["--data", "PHOTOS", "--batch-size", "0"], "--batch-size is 0"),
        (["--data", "PHOTOS", "--vae", "nowhere"], "--vae nowhere is neither ema nor mse nor"),
        (["--data", "PHOTOS", "--vae", "PHOTOS"], "has no config.json"),
        (["--data", "PHOTOS", "--precision", "fp16"], "--precision is fp16"),
    ],
)
def test_bad_input_is_one_line(call, photos, words, message):
    words = [str(photos) if word == "PHOTOS" else word for word in words]
    result, launched = call(*words)
    assert not launched
    assert isinstance(result.exception, cli.SpiralRopeError)
    assert message in result.exception.message
    assert "\n" not in result.exception.message


def test_a_disk_that_is_too_small_is_told_first(call, photos, tiny_vae, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    result, launched = call("--data", photos, "--vae", tiny_vae, "--image-size", 64)
    assert not launched
    assert "has 100 kB free, and 164 kB are needed for the latents" in result.exception.message


def test_a_folder_of_other_latents_is_refused(made, call, photos, tiny_vae):
    words = ("--data", photos, "--vae", tiny_vae, "--out", made, "--device", "cpu")
    result, launched = call(*words, "--image-size", 32)
    assert not launched
    assert "image_size was (32, 24), now (32, 32)" in result.exception.message
    result, launched = call(*words, "--image-size", "32x24")
    assert launched
    assert "3 are finished" in result.stderr


def test_the_cache_names_the_vae_and_the_data(made, photos, tiny_vae):
    plan = LatentCache(made).metadata.plan
    assert plan.vae == str(tiny_vae)
    assert plan.data == str(photos.resolve())
    assert len(plan.vae_sha256) == 64


@pytest.mark.parametrize("workers", [0, 1])
def test_a_size_limit_ends_it_and_it_goes_on_without(spiralrope, photos, tiny_vae, runs, workers):
    words = ["dit-encode", "--data", photos, "--vae", tiny_vae, "--image-size", "32x24"]
    words += ["--out", "latents", "--device", "cpu", "--workers", workers]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))

    done = spiralrope(*words, expect=1, preexec_fn=limit)
    assert "Traceback" not in done.stderr
    assert "error: a file reached the size limit (ulimit -f)" in done.stderr
    assert [path.name for path in (runs / "latents").iterdir()] == [".lock"]
    if not workers:
        spiralrope(*words)
        LatentCache(runs / "latents").verify()


def test_a_loop_of_links_is_one_line(spiralrope, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "looped")
    (folder / "class3").symlink_to("class3")
    done = spiralrope("dit-encode", "--data", folder, "--vae", "ema", expect=1)
    assert done.stderr == f"error: {folder}/class3: Too many levels of symbolic links\n"
