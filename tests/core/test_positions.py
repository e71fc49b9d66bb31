"""Which positions a network of another size than its weights' has."""

from __future__ import annotations

import pytest

from spiralrope_cli.core.config.models import RopeConfig
from spiralrope_cli.core.config.runs import ModelConfig
from spiralrope_cli.core.resolve import StartingPoint, positions_at


@pytest.mark.parametrize(
    ("size", "chosen", "pretrain_grid", "expected"),
    [
        ((32, 32), None, None, ("extrapolate", None)),
        ((32, 32), "interpolate", None, ("interpolate", None)),
        ((32, 32), None, (2, 2), ("extrapolate", (2, 2))),
        ((64, 32), None, None, ("interpolate", (4, 4))),
        ((64, 32), "extrapolate", None, ("extrapolate", (4, 4))),
        ((64, 32), None, (2, 2), ("interpolate", (2, 2))),
    ],
)
def test_another_size_keeps_the_trained_grid_and_squeezes_into_it(
    size, chosen, pretrain_grid, expected
):
    model = ModelConfig(
        image_size=(32, 32),
        patch_size=8,
        in_chans=3,
        num_classes=10,
        drop_path=0.0,
        pretrain_grid=pretrain_grid,
    )
    rope = RopeConfig(scaling="extrapolate")
    start = StartingPoint(source="x", arch="deit-s", rope=rope, model=model)
    assert positions_at(start, size, chosen) == expected
