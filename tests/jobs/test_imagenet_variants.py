"""Variants of ImageNet's validation set, against a computation by numpy from the logits."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from spiralrope_cli import create_model
from spiralrope_cli.core.config.evals import EvalOptions
from spiralrope_cli.core.config.training import MachineConfig
from spiralrope_cli.core.errors import SpiralRopeError
from spiralrope_cli.core.jobs import evaluate
from spiralrope_cli.core.models.pretrained import arch_of, save_folder

IDS = ImageNetInfo().label_names()
MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
MACHINE = MachineConfig(nproc=1, device="cpu", precision="fp32", workers=0)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Weights of 1000 classes without names, 12 images, and their logits [12, 1000]."""
    root = tmp_path_factory.mktemp("variants")
    torch.manual_seed(0)
    model = create_model(
        "deit-32x1x2", num_classes=1000, image_size=16, patch_size=8, in_chans=3
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "gamma" in name:
                weight.normal_(0, 0.4)  # so that images have different classes
    (root / "weights").mkdir()
    save_folder(model, root / "weights")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    for number, each in enumerate(pixels):
        Image.fromarray(each).save(root / f"{number}.png")
    images = torch.from_numpy((pixels / 255 - MEAN) / STD).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(images).double().numpy()
    assert len({*logits.argmax(1)}) > 6
    return root, model, logits


def put(root, image, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(root / f"{image}.png", target)


def settled(source, data, **options):
    options = EvalOptions(sources=(str(source),), data=str(data), crop_ratios=(1.0,), **options)
    return evaluate.settle(options, MACHINE, set())


@pytest.fixture
def row_of(tmp_path, capsys):
    """Evaluates; gives the row, what was printed, and the notes."""

    def call(source, data, **options):
        run, notes = settled(source, data, out=str(tmp_path / "out"), **options)
        evaluate.plan(run.rows[0])
        evaluate.work(run)
        [*_, row] = json.loads((tmp_path / "out/eval.json").read_text())["rows"]
        printed = capsys.readouterr()
        return row, printed.out + printed.err, notes

    return call


def by_numpy(logits, right):
    """acc@1, acc@5 and loss; `right` are the right columns of each row."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    ranked = np.argsort(-logits, axis=1)
    hits = [[each in of for each in row[:5]] for row, of in zip(ranked, right, strict=True)]
    loss = -np.mean([np.log(each[[*of]].sum()) for each, of in zip(p, right, strict=True)])
    return 100 * np.mean([h[0] for h in hits]), 100 * np.mean([any(h) for h in hits]), loss


def same(row, expected, count):
    assert (row["acc1"], row["acc5"]) == pytest.approx(expected[:2])
    assert row["loss"] == pytest.approx(expected[2], rel=1e-5)
    assert row["count"] == count


def test_folders_of_v2_are_class_numbers_whatever_their_order_as_text(here, row_of, tmp_path):
    root, _, logits = here
    predicted = dict(zip(logits.argmax(1).tolist(), range(12), strict=True))
    data = tmp_path / "imagenetv2-matched-frequency-format-val"
    image = {number: predicted.get(number, number % 12) for number in range(1000)}
    for number, each in image.items():
        put(root, each, data / str(number) / "0.png")
    row, printed, notes = row_of(root / "weights", data)
    same(row, by_numpy(logits[[*image.values()]], [[n] for n in image]), 1000)
    assert row["acc1"] == pytest.approx(len(predicted) / 10)
    assert (row["classes"], row["num_classes"], row["labels"]) == (1000, 1000, None)
    assert notes == [
        f"class folders 0 to 999 of {data} are ImageNet's classes",
        f"{data} has no val/: the 1000 class folders in it are evaluated",
    ]
    assert "of 1000" not in printed


@pytest.mark.parametrize(
    ("name", "few", "named"),
    [
        ("imagenet-a", (3, 50, 333, 600, 998, 999), False),
        ("imagenet-a", (3, 50, 333, 600, 998, 999), True),
        ("sketch", range(1000), True),
    ],
)
def test_predictions_are_among_the_classes_of_a_r_and_sketch(
    here, row_of, tmp_path, name, few, named
):
    root, model, logits = here
    order, source = [*range(1000)], root / "weights"
    if named:  # a run that numbers its classes in another way
        order, source = order[::-1], tmp_path / "named"
        source.mkdir()
        run = {"arch": arch_of(model), "model": dict(model.init_args)}
        run |= {"rope": run["model"].pop("rope"), "class_names": IDS[::-1]}
        save_folder(model, source, metadata={"config": json.dumps(run), "format": "pt"})
    count, columns = len(few), [order.index(number) for number in few]
    images = range(max(12, count))
    for image in images:
        put(root, image % 12, tmp_path / name / IDS[few[image % count]] / f"{image}.png")
    row, printed, notes = row_of(source, tmp_path / name)
    seen = logits[[image % 12 for image in images]][:, columns]
    same(row, by_numpy(seen, [[image % count] for image in images]), len(images))
    assert (row["classes"], row["num_classes"]) == (count, 1000)
    restricted = any(f"are restricted to the {count} classes of" in note for note in notes)
    assert restricted == (f"{count} of 1000 classes" in printed) == (count < 1000)


def test_one_of_the_labels_of_real_is_enough_and_images_without_are_skipped(here, row_of, tmp_path):
    root, _, logits = here
    labels = [[] for _ in range(50_000)]
    labels[:6] = [[1, 2], [], [int(logits[2].argmax()), 7], [5], [int(logits[4].argsort()[-3])], []]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    lines = []
    for image in range(6):
        name = f"ILSVRC2012_val_{image + 1:08d}.JPEG"
        put(root, image, tmp_path / "imagenet/val" / name)
        lines.append(f"{name} {999 - image}")  # labels of the list beside it do not count
    (tmp_path / "imagenet/val.txt").write_text("\n".join(lines))
    options = {"real_labels": str(tmp_path / "real.json")}
    row, printed, _ = row_of(root / "weights", tmp_path / "imagenet", **options)
    kept = [0, 2, 3, 4]
    same(row, by_numpy(logits[kept], [labels[n] for n in kept]), 4)
    assert (row["acc1"], row["acc5"], row["labels"]) == (25, 50, "ReaL")
    assert "4 images of" in printed
    assert "labels of ReaL" in printed
    plain, printed, _ = row_of(root / "weights", tmp_path / "imagenet")
    same(plain, by_numpy(logits[:6], [[999 - n] for n in range(6)]), 6)
    rows = json.loads((tmp_path / "out/eval.json").read_text())["rows"]
    assert [row["labels"] for row in rows] == ["ReaL", None]
    # The copy in timm has labels for all of these images but the first.
    run, _ = settled(root / "weights", tmp_path / "imagenet", real_labels="timm")
    assert run.rows[0].protocol.num_val == 5


def test_what_is_no_variant_is_refused_in_a_line_or_two(here, tmp_path):
    root = here[0]
    for name in (IDS[0], "cat"):
        put(root, 0, tmp_path / "cats" / name / "0.png")
    put(root, 0, tmp_path / "val/val/ILSVRC2012_val_00000001.JPEG")
    (tmp_path / "val/val.txt").write_text("ILSVRC2012_val_00000001.JPEG 999")
    (tmp_path / "other.json").write_text("[[1]]")
    val = tmp_path / "val"
    for data, real, told in (
        (tmp_path / "cats", "", "weights has 1000 classes, {data} has 2"),
        (val, "other.json", "--real-labels other.json is not real.json: 50000 lists"),
        (val, "gone.json", "--real-labels gone.json cannot be read"),
        ("digits", "timm", "has 1000 classes, digits has 10"),
        (val, "timm", "--real-labels timm labels no image of {data}"),
    ):
        real = str(tmp_path / real) if "." in real else real
        with pytest.raises(SpiralRopeError) as refused:
            settled(root / "weights", data, real_labels=real)
        said = str(refused.value).replace(f"{tmp_path}{os.sep}", "")
        assert told.format(data=Path(data).name) in said
        assert len(said.splitlines()) <= 2
