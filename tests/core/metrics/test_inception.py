"""The faster network against torch-fidelity's own, on the same weights and real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.metrics.inception import build_extractor, resize


@pytest.fixture(scope="module")
def images(digit_pictures):
    return torch.from_numpy(digit_pictures[:5]).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def features(inception_weights, images):
    with torch.inference_mode():
        return load_extractor(inception_weights)([images])


def load_extractor(path):
    return build_extractor(torch.load(path), path)


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_features_are_those_of_torch_fidelity(inception_weights, images, features):
    wanted = ["2048", "logits_unbiased"]
    original = FeatureExtractorInceptionV3("original", wanted, str(inception_weights))
    seen = []
    original.Mixed_6d.branch1x1.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.inference_mode():
        pool, logits = original(images)
    assert pool.std(0).mean() > 0.05, "random weights must not let the features vanish"
    assert relative(features["pool"], pool) < 2e-5
    assert relative(features["logits"], logits.double()) < 2e-5
    # ADM's order: height, width, channel.
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).reshape(5, 2023)
    assert relative(features["spatial"], spatial) < 2e-5
    assert spatial.std() > 0.05


def test_an_image_has_its_features_in_any_company(inception_weights, images, features):
    extractor = load_extractor(inception_weights)
    with torch.inference_mode():
        apart = extractor([images[3:4], images[:1].repeat(1, 1, 2, 2)])
    assert relative(apart["pool"][:1], features["pool"][3:4]) < 1e-6
    assert relative(apart["spatial"][:1], features["spatial"][3:4]) < 1e-6


def test_spatial_features_alone_need_no_deeper_layers(inception_weights, images, features):
    extractor = load_extractor(inception_weights)
    extractor.stages["Mixed_6e"] = None
    with torch.inference_mode():
        found = extractor([images], {"spatial"})
    assert found.keys() == {"spatial"}
    assert relative(found["spatial"], features["spatial"]) < 1e-6


@pytest.mark.parametrize("size", [(8, 8), (37, 64), (299, 299), (400, 320)])
def test_images_are_resized_as_tensorflow_did(size):
    images = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0))
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(resize(images.to(torch.uint8)), expected, rtol=0, atol=1e-4)


def test_files_with_something_else_are_refused(inception_weights):
    wrong = {**torch.load(inception_weights), "fc.weight": torch.zeros(2, 2)}
    for weights, message in (
        ({"fc.weight": torch.zeros(2)}, "does not hold"),
        ([1], "does not hold"),
        (wrong, "another network"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            build_extractor(weights, Path("a.pth"))
        assert len(str(caught.value).splitlines()) == 2
