from __future__ import annotations

import pytest
from safetensors.torch import load_file

from spiralrope_cli import RopeConfig
from spiralrope_cli.core.models.dit import DiT


@pytest.fixture(scope="session")
def published_dit(request):
    """The network of the published numbers."""
    folder = request.config.rootpath / "tests/golden/dit"
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(folder / "dit_rope_weights.safetensors").items()
    }
    del weights["rope_embedder.freqs"]
    model = DiT(72, 2, 3, rope=RopeConfig(rotate=2), input_size=8, num_classes=10)
    model.load_state_dict(weights)
    return model.eval()
