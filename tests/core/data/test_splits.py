"""ImageNet as it is downloaded: a folder, its `train/`, and a flat `val/` with its labels."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from spiralrope_cli.core.data.splits import (
    DEVKIT,
    find_data_set,
    find_val_set,
    val_split,
)
from spiralrope_cli.core.data.val_labels import KIT_FILES
from spiralrope_cli.core.errors import DataError

SYNSETS = ("n01440764", "n01443537", "n01484850")
OF_VAL = (1, 0, 2, 2, 0)  # class numbers, in the order of the file names
ID_OF = (3, 1, 2)  # the kit's number of each class, which is not its place among the names


@pytest.fixture
def imagenet(tmp_path):
    """Three classes, and a flat val/ that lacks its labels."""
    for name in SYNSETS:
        for number in range(2):
            path = tmp_path / "train" / name / f"{name}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 14)).save(path)
    (tmp_path / "val").mkdir()
    for number in range(1, len(OF_VAL) + 1):
        Image.new("RGB", (20, 14)).save(tmp_path / f"val/ILSVRC2012_val_{number:08d}.JPEG")
    return tmp_path


def kit(folder):
    """The development kit, with a synset that is no class, as the real one has 860."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*zip(ID_OF, SYNSETS, (0, 0, 0), strict=True), (4, "n00001740", 2)]
    fields = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    savemat(folder / KIT_FILES[1], {"synsets": np.array(rows, dtype=fields)[:, None]})
    (folder / KIT_FILES[0]).write_text("".join(f"{ID_OF[number]}\n" for number in OF_VAL))


def named(root, form):
    """Writes the labels of val/ in one of the forms that go round."""
    files = [f"ILSVRC2012_val_{number:08d}" for number in range(1, len(OF_VAL) + 1)]
    if "kit" in form:
        kit(root / form["kit"])
        if form.get("packed"):
            with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as tar:
                tar.add(root / DEVKIT, DEVKIT)
            shutil.rmtree(root / DEVKIT)
        return
    lines = [
        form["line"].format(file, number=number, name=SYNSETS[number])
        for file, number in zip(files, OF_VAL, strict=True)
    ]
    (root / form["file"]).write_text("\n".join(lines))


FORMS = {
    "kit unpacked": {"kit": f"{DEVKIT}/data"},
    "kit as downloaded": {"kit": f"{DEVKIT}/data", "packed": True},
    "kit beside": {"kit": ""},
    "numbers": {"file": "val.txt", "line": "{}.JPEG {number}"},
    "names, in val": {"file": "val/val.txt", "line": "{}.JPEG\t{name}"},
    "names, with a path": {"file": "val.txt", "line": "val/{}.JPEG {name}"},
    "kaggle": {"file": "LOC_val_solution.csv", "line": "{},{name} 85 1 499 272 {name} 1 2 3 4"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_flat_val_has_the_classes_that_its_list_says(imagenet, form):
    named(imagenet, form)
    data_set = find_data_set(str(imagenet))
    assert (data_set.num_train, data_set.num_val) == (6, len(OF_VAL))
    assert data_set.class_names == SYNSETS
    images = val_split(imagenet).images
    assert {int(path[-13:-5]): number for path, number in images} == dict(enumerate(OF_VAL, 1))
    assert [number for _, number in images] == sorted(OF_VAL)  # in the order of class folders
    assert f"{imagenet}/val: classes by {imagenet}/" in data_set.notes[0]
    assert find_data_set(str(imagenet / "train")) == data_set
    assert find_val_set(str(imagenet / "train")).num_val == len(OF_VAL)


def test_a_flat_val_needs_no_train_to_be_evaluated(imagenet):
    shutil.rmtree(imagenet / "train")
    named(imagenet, FORMS["kit unpacked"])
    assert find_val_set(str(imagenet)).class_names == SYNSETS
    named(imagenet, FORMS["numbers"])
    assert find_val_set(str(imagenet)).class_names == ("0", "1", "2")


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"names, in val"}))
def test_both_tar_files_of_the_download_take_each_list(imagenet, form, monkeypatch):
    monkeypatch.setenv("SPIRALROPE_CACHE", str(imagenet / "cache"))
    named(imagenet, FORMS[form])
    expected = val_split(imagenet)
    for split in ("train", "val"):
        with tarfile.open(imagenet / f"ILSVRC2012_img_{split}.tar", "w") as tar:
            tar.add(imagenet / split, "")
        shutil.rmtree(imagenet / split)
    found = val_split(imagenet)
    assert found.class_names == expected.class_names
    assert [number for _, number in found.images] == [number for _, number in expected.images]


@pytest.mark.parametrize("form", ["kit unpacked", "kit as downloaded"])
@pytest.mark.parametrize("name", KIT_FILES)
def test_a_damaged_kit_is_told_by_its_path(imagenet, form, name):
    kit(imagenet / DEVKIT / "data")
    path = imagenet / DEVKIT / "data" / name
    path.write_bytes(path.read_bytes()[:150] if name.endswith("mat") else b"1 2 nine")
    if "downloaded" in form:
        with tarfile.open(imagenet / f"{DEVKIT}.tar.gz", "w:gz") as tar:
            tar.add(imagenet / DEVKIT, DEVKIT)
        shutil.rmtree(imagenet / DEVKIT)
    with pytest.raises(DataError, match="is not ImageNet's development kit: ") as refused:
        find_data_set(str(imagenet))
    assert DEVKIT in refused.value.message


def test_an_archive_of_another_thing_is_not_the_kit(imagenet):
    with tarfile.open(imagenet / f"{DEVKIT}.tar.gz", "w:gz") as tar:
        tar.add(imagenet / "train")
    with pytest.raises(DataError, match="is not ImageNet's development kit: KeyError"):
        find_data_set(str(imagenet))
    (imagenet / f"{DEVKIT}.tar.gz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(DataError, match="is not ImageNet's development kit: "):
        find_data_set(str(imagenet))


def test_a_flat_val_without_labels_says_what_to_do(imagenet):
    with pytest.raises(DataError) as refused:
        find_data_set(str(imagenet))
    assert refused.value.message == (
        f"{imagenet}/val has no class folders, and no list with the classes of its 5 images"
    )
    assert "val.txt with lines FILE CLASS" in refused.value.hint
    assert DEVKIT in refused.value.hint


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{0}1.JPEG 0\n{0}2.JPEG 1\n", "lacks 3 image(s) of {1}/val: {0}3"),
        (
            "{0}1.JPEG n9\n" + "".join(f"{{0}}{n}.JPEG n01443537\n" for n in range(2, 6)),
            "class n9 is none",
        ),
        ("".join(f"{{0}}{n}.JPEG {n - 1}\n" for n in range(1, 6)), "class 3 is none of the 3 in"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(imagenet, lines, message):
    stem = "ILSVRC2012_val_0000000"
    (imagenet / "val.txt").write_text(lines.format(stem))
    with pytest.raises(DataError) as refused:
        find_data_set(str(imagenet))
    assert f"{imagenet}/val.txt" in refused.value.message
    assert message.format(stem, imagenet) in refused.value.message


def inat(root, year, split, names=("Abies", "Bufo")):
    """As in the download: numbers of categories are no places, and images are in no order."""
    categories = [{"id": 10 * n, "name": name} for n, name in reversed(list(enumerate(names)))]
    images, annotations = [], []
    for number in range(4):
        file = f"train_val{year}/Kind/{number % 2}/{split}{number}.jpg"
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 14)).save(root / file)
        images.append({"id": 7 - number, "file_name": file})
        annotations.append({"image_id": 7 - number, "category_id": 10 * (number % 2)})
    content = {"images": images, "annotations": annotations[::-1], "categories": categories}
    (root / f"{split}{year}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("year", [2018, 2019])
def test_inaturalist_has_its_own_splits(tmp_path, year):
    for split in ("train", "val"):
        inat(tmp_path, year, split)
    data_set = find_data_set(str(tmp_path))
    assert (data_set.num_train, data_set.num_val) == (4, 4)
    assert data_set.class_names == ("Abies", "Bufo")
    for path, number in val_split(tmp_path).images:
        assert path.startswith(f"{tmp_path}/train_val{year}/Kind/{number}/val")
    assert f"classes by train{year}.json" in data_set.notes[0]
    for split in ("train", "val"):  # as downloaded
        path = tmp_path / f"{split}{year}.json"
        with tarfile.open(f"{path}.tar.gz", "w:gz") as tar:
            tar.add(path, path.name)
        path.unlink()
    (tmp_path / f"train_val{year}").rename(tmp_path / str(year))  # as torchvision does
    images = val_split(tmp_path).images
    assert [number for _, number in images] == [0, 1, 0, 1]
    assert all(Path(path).is_file() for path, _ in images)
    (tmp_path / str(year)).rename(tmp_path / "other")
    with pytest.raises(DataError, match=f"no train_val{year}/") as refused:
        find_data_set(str(tmp_path))
    assert f"tar -xf train_val{year}.tar.gz" in refused.value.hint


def test_lists_of_inaturalist_that_are_not_clear_are_refused(tmp_path):
    inat(tmp_path, 2018, "val")
    inat(tmp_path, 2019, "val")
    with pytest.raises(DataError, match=r"has val2018\.json, val2019\.json") as refused:
        find_val_set(str(tmp_path))
    assert "a folder of its own" in refused.value.hint
    (tmp_path / "val2019.json").unlink()
    for text in ("{", "[]", "{}"):
        (tmp_path / "val2018.json").write_text(text)
        with pytest.raises(DataError, match=r"val2018\.json is not a list of iNaturalist"):
            find_val_set(str(tmp_path))
