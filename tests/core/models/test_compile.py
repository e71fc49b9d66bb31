"""Compiled blocks: one graph for all of them, no recompilation, the numbers of eager ones."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from spiralrope_cli import GaussianDiffusion, RopeConfig, create_model
from spiralrope_cli.core.models.factory import compile_blocks


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs; they run as they were traced, without Inductor. A break is an error."""
    counter, compile_module = CompileCounter(), torch.nn.Module.compile

    def traced(module):
        compile_module(module, backend=counter, fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    return counter


def deit(rotate=2, **options):
    torch.manual_seed(0)
    options = {"num_classes": 5, "image_size": 16, "patch_size": 4, **options}
    model = create_model("deit-32x3x2", rope=RopeConfig(rotate=rotate), **options)
    for block in model.blocks:  # the initial 1e-4 would hide what a block computes
        torch.nn.init.ones_(block.gamma_1)
        torch.nn.init.ones_(block.gamma_2)
    return model


def dit(rotate=2, **options):
    torch.manual_seed(0)
    model = create_model(
        "dit-32x3x2-2", rope=RopeConfig(rotate=rotate), num_classes=5, input_size=8, **options
    )
    for parameter in model.parameters():  # adaLN-Zero starts with gates of 0
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def deit_loss(model, images, step):
    mask = model.drop_path_mask(len(images), torch.Generator().manual_seed(step))
    return model(images, drop_path_mask=mask).square().mean()


def dit_loss(model, images, step):
    t, y = torch.arange(len(images)) + step, torch.arange(len(images))
    torch.manual_seed(step)
    noise = torch.randn_like(images)
    return GaussianDiffusion().training_losses(model, images, t, noise, y=y)["loss"].mean()


IMAGES = {deit: (4, 3, 16, 16), dit: (4, 4, 8, 8)}
LOSSES = {deit: deit_loss, dit: dit_loss}


def trained(network, *, compiled, **options):
    """Losses and gradients of three steps of two micro-batches, with an evaluation after each."""
    checkpointing = options.pop("grad_checkpointing", False)
    model, ema = network(**options), network(**options).eval()
    model.grad_checkpointing = checkpointing
    if compiled:
        compile_blocks(model)
        compile_blocks(ema)
    images = torch.randn(IMAGES[network], generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(3):
        for micro in images.split(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = LOSSES[network](model, micro, step)
            loss.backward()
            losses.append(loss.detach())
        with torch.no_grad():
            losses.append(LOSSES[network](ema, images, step))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses), grads


@pytest.mark.parametrize("network", [deit, dit])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_blocks_compile_once_and_compute_the_same(graphs, network, checkpointing):
    options = {"grad_checkpointing": checkpointing}
    if network is deit:
        options["drop_path"] = 0.5
    plain_losses, plain_grads = trained(network, compiled=False, **options)
    losses, grads = trained(network, compiled=True, **options)
    assert graphs.frame_count == 2, "one for training, one for evaluation"
    torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        assert (grad - plain_grads[name]).norm() <= 1e-5 * plain_grads[name].norm(), name


@pytest.mark.parametrize("network", [deit, dit])
def test_two_models_that_share_a_graph_rotate_each_in_its_own_way(graphs, network):
    images = torch.randn(IMAGES[network], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for rotate in (1, 2, 4):
            plain, compiled = network(rotate).eval(), network(rotate).eval()
            compile_blocks(compiled)
            expected = LOSSES[network](plain, images, 0)
            torch.testing.assert_close(LOSSES[network](compiled, images, 0), expected)
    assert graphs.frame_count == 1


def test_names_of_parameters_stay():
    model = deit()
    before = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == before
