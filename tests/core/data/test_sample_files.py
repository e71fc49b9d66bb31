"""The archive of samples, written around the images."""

from __future__ import annotations

import numpy as np
import torch

from spiralrope_cli.core.data.sample_files import SampleFiles, npz_metadata


def test_the_archive_holds_metadata_of_any_length(tmp_path):
    files = SampleFiles(tmp_path, 1, (2, 2))
    metadata = {"seed": 3, "classes": list(range(20_000))}
    files.begin(metadata)
    files.put([0], torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    files.finish(metadata)
    assert npz_metadata(files.npz) == {"seed": 3, "classes": "20000 classes"}


def test_images_that_were_put_in_any_order_lie_in_order_in_the_archive(tmp_path):
    files = SampleFiles(tmp_path, 3, (2, 5))
    images = torch.arange(3 * 3 * 2 * 5, dtype=torch.uint8).reshape(3, 3, 2, 5)
    files.begin({})
    for index in (2, 0, 1):
        files.put([index], images[index : index + 1])
    files.finish({})
    with np.load(files.npz) as arrays:
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
