"""ImageNet as it is downloaded: a folder, its `train/`, and a flat `val/` with its labels."""

from __future__ import annotations

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from spiralrope_cli.core.config.datasets import find_data_set, find_val_set
from spiralrope_cli.core.config.splits import DEVKIT, KIT_FILES, val_split
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
