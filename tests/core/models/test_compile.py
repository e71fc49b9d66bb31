"""Compiled blocks: one graph for all of them, no recompilation, the numbers of eager ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from spiralrope_cli import GaussianDiffusion, RopeConfig, create_model
from spiralrope_cli.core.models.factory import compile_blocks, pays_to_compile


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


def no_failure(line):
    assert "failed" not in line


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
    model.diffusion = GaussianDiffusion()
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
        compile_blocks(model, ema, say=no_failure)
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
            compile_blocks(compiled, say=no_failure)
            expected = LOSSES[network](plain, images, 0)
            torch.testing.assert_close(LOSSES[network](compiled, images, 0), expected)
    assert graphs.frame_count == 1


def classifier_inputs(model, number, generator):
    """Images, soft labels as mixup makes them, and a drop path mask."""
    images = torch.randn(number, *IMAGES[deit][1:], generator=generator)
    labels = torch.eye(5)[torch.randint(5, (number,), generator=generator)]
    return images, labels.lerp(labels.flip(0), 0.3), model.drop_path_mask(number, generator)


def classifier_loss(model, images, labels, mask):
    return F.cross_entropy(model(images, mask).float(), labels)


def diffusion_inputs(model, number, generator):
    """Latents, noise, timesteps with 0 among them, labels, and which labels are dropped."""
    x0, noise = torch.randn(2, number, *IMAGES[dit][1:], generator=generator)
    t = torch.randint(1000, (number,), generator=generator)
    t[0] = 0
    return x0, noise, t, t % 5, model.label_drop_mask(number, generator)


def diffusion_loss(model, x0, noise, t, y, mask):
    losses = model.diffusion.training_losses(model, x0, t, noise, y=y, label_drop_mask=mask)
    return losses["loss"].mean() + losses["vb"].detach().mean()


@pytest.mark.parametrize(
    ("network", "inputs", "loss", "checkpointing", "first"),
    [
        (deit, classifier_inputs, classifier_loss, False, "compiled"),
        (deit, classifier_inputs, classifier_loss, True, "eager"),
        (dit, diffusion_inputs, diffusion_loss, False, "eager"),
        (dit, diffusion_inputs, diffusion_loss, True, "compiled"),
    ],
)
def test_model_and_loss_are_one_graph(network, inputs, loss, checkpointing, first):
    """Without a break, and compiled again only for evaluation and for a second batch size."""
    options = {"drop_path": 0.5} if network is deit else {"label_dropout": 0.5}
    plain, model, ema = network(**options), network(**options), network(**options).eval()
    model.grad_checkpointing = checkpointing
    graphs = CompileCounter()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    generator = torch.Generator().manual_seed(0)

    def step(micro_batches, size):
        for _ in range(micro_batches):
            given = inputs(model, size, generator)
            with torch.autocast("cpu", torch.bfloat16):
                value = compiled(model, *given)
                torch.testing.assert_close(value, loss(plain, *given), rtol=1e-2, atol=0)
            value.backward()
        with torch.no_grad():
            compiled(ema, *inputs(ema, size, generator))

    if first == "eager":
        loss(model, *inputs(model, 2, generator))
        loss(ema, *inputs(ema, 2, generator))
    for _ in range(3):
        step(micro_batches=2, size=4)
    assert graphs.frame_count == 2, "training and evaluation"
    step(micro_batches=1, size=2)
    assert graphs.frame_count == 4, "of another size"
    for size in (4, 2):
        step(micro_batches=2, size=size)
    assert graphs.frame_count == 4, "sizes seen before"


def test_names_of_parameters_stay():
    model = deit()
    before = list(model.state_dict())
    compile_blocks(model, say=no_failure)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("network", [deit, dit])
@pytest.mark.parametrize("at", ["compile", "first call"])
def test_where_compilation_fails_one_line_says_why_and_all_is_eager(monkeypatch, network, at):
    def broken(module):
        if at == "compile":
            raise RuntimeError("torch.compile is not supported on Python 9")
        module._compiled_call_impl = fails

    def fails(*_):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    plain, model, lines = network(), network(), []
    compile_blocks(model, say=lines.append)
    images = torch.randn(IMAGES[network], generator=torch.Generator().manual_seed(1))
    assert torch.equal(LOSSES[network](model, images, 0), LOSSES[network](plain, images, 0))
    assert len(lines) == 2
    assert "the first steps take longer" in lines[0]
    assert lines[1].startswith("note: torch.compile failed, so the run is eager: ")
    assert lines[1].endswith("Python 9" if at == "compile" else "no C++ compiler")


def test_memory_that_is_full_is_no_failure_of_the_compiler(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: setattr(module, "_compiled_call_impl", full)
    )
    model = deit()
    compile_blocks(model, say=no_failure)
    with pytest.raises(torch.OutOfMemoryError):
        deit_loss(model, torch.randn(IMAGES[deit]), 0)


@pytest.mark.parametrize(
    ("setting", "device", "images", "compiled"),
    [
        *[("on", device, 1, True) for device in ("cpu", "cuda")],
        *[("off", device, 1e30, False) for device in ("cpu", "cuda")],
        ("auto", "cpu", 1e30, False),
        ("auto", "cuda", 1e30, True),
        ("auto", "cuda", 3 * 50 * 1437, False),  # the digits
    ],
)
def test_blocks_are_compiled_where_a_long_run_wins_the_wait_back(setting, device, images, compiled):
    model = create_model("deit-ti", num_classes=10, image_size=8, patch_size=2)
    assert pays_to_compile(setting, model, torch.device(device), images) is compiled
