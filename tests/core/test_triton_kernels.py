"""The Triton kernels, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from comparing import (
    MODULATION_SIZES,
    ROTATION_SIZES,
    modulation_formula,
    modulation_inputs,
    rotation_formula,
    rotation_inputs,
    rotation_results,
    same_tensors,
)
from functorch.compile import aot_function, make_boxed_func
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses import FakeTensorMode

from spiralrope_cli import RopeConfig, SpiralRoPE, create_model
from spiralrope_cli.core import kernels
from spiralrope_cli.core.models.factory import compile_blocks

triton = pytest.importorskip("triton")
KERNEL = "spiralrope_cli.core.triton_kernels"
since_triton_3_3 = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3),
    reason="an earlier Triton describes constants in another way, and keeps its interpreter",
)


def fresh_kernel():
    """The module, imported anew."""
    sys.modules.pop(KERNEL, None)
    return importlib.import_module(KERNEL)


@pytest.fixture
def interpreter(monkeypatch):
    """The module with Triton's interpreter, which Triton chooses where a kernel is defined."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield fresh_kernel()
    fresh_kernel()


@pytest.fixture
def interpreted(interpreter):
    """`rotate_qkv` by the interpreter."""
    return interpreter.rotate


@pytest.mark.parametrize("size", ROTATION_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernel_is_the_formula(interpreted, size, dtype):
    qkv, grads, cos_sin = rotation_inputs(size, dtype)
    found = rotation_results(interpreted, qkv, cos_sin.float(), grads)
    plain = rotation_results(rotation_formula, qkv, cos_sin.float(), grads)
    exact = rotation_results(rotation_formula, qkv.double(), cos_sin, grads)
    eps = torch.finfo(dtype).eps
    # Same bits, but for bf16: the interpreter cuts it off, where GPUs round.
    rtol = eps if dtype == torch.bfloat16 else 0
    for ours, theirs, float64 in zip(found, plain, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
        torch.testing.assert_close(ours.double(), float64, rtol=eps, atol=1e-6)


def test_v_is_a_view_and_strides_may_be_any(interpreted):
    qkv, grads, cos_sin = rotation_inputs((2, 5, 2, 8), torch.float32)
    cos_sin = cos_sin.float()
    assert interpreted(qkv, cos_sin)[2].data_ptr() == qkv[:, :, 2].data_ptr()
    alike = grads.transpose(2, 3).contiguous().transpose(2, 3)
    mixed = (alike[0], grads[1], torch.ones(()).expand(2, 5, 2, 8))
    for each in (alike, mixed):
        found = rotation_results(interpreted, qkv, cos_sin, each)
        assert same_tensors(found, rotation_results(rotation_formula, qkv, cos_sin, each))
    padded = torch.cat((qkv, qkv), dim=-1)[..., :8]
    turned = qkv.transpose(3, 4).contiguous().transpose(3, 4)
    for each in (padded, turned):
        assert same_tensors(interpreted(each, cos_sin), interpreted(qkv, cos_sin))


def test_the_operators_keep_what_torch_asks_of_operators(interpreted):
    qkv, grads, cos_sin = rotation_inputs((2, 5, 2, 8), torch.float32)
    cos_sin = cos_sin.float()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.spiralrope.rotate_qk, (qkv, cos_sin), test_utils=checks)
    given = (*grads, cos_sin)
    torch.library.opcheck(torch.ops.spiralrope.rotate_back, given, test_utils=checks)


@pytest.mark.parametrize("size", MODULATION_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_adaptive_layer_norm_is_the_formula(interpreter, size, dtype):
    given = modulation_inputs(size)
    found = interpreter.modulate(*given, 1e-6, dtype)
    exact = modulation_formula(*(each.double() for each in given), 1e-6)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=eps, atol=2e-6)
    x, shift, scale = given
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(found, interpreter.modulate(turned, shift, scale.clone(), 1e-6, dtype))
    checks, operator = ("test_schema", "test_faketensor"), torch.ops.spiralrope.modulate
    torch.library.opcheck(operator, (*given, 1e-6, dtype), test_utils=checks)


@since_triton_3_3
@pytest.mark.parametrize(
    ("number_type", "head_dim", "name"), [("bf16", 72, "_forward"), ("fp32", 64, "_backward")]
)
def test_it_compiles_for_a_gpu_to_accesses_of_16_bytes(
    monkeypatch, tmp_path, number_type, head_dim, name
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = fresh_kernel()
    tile = getattr(kernel, name)
    constants = {"width": 8 * head_dim, "head_dim": head_dim}
    constants |= {"rows": kernel.ROWS, "columns": kernel.COLUMNS}
    signature = dict.fromkeys(tile.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    pointers = [each for each in ("q", "k", "v", "qkv") if each in signature]
    signature |= dict.fromkeys(pointers, f"*{number_type}") | {"table": "*fp32"}
    places = {name: (place,) for place, name in enumerate(tile.arg_names)}
    # What Triton finds out by itself of addresses and strides.
    aligned = [*pointers, "table", *(name for name in signature if name.startswith("of_"))]
    source = triton.compiler.ASTSource(
        tile,
        signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target).asm["ptx"]
    accesses = re.findall(r"(?:ld|st)\.global[.\w]*", ptx)
    assert len(accesses) >= 10
    assert all(".v4.b32" in access for access in accesses)
    assert ".shared" not in ptx


@since_triton_3_3
def test_adaptive_layer_norm_computes_in_float32(monkeypatch, tmp_path):
    """Inductor passes numbers as float64, those apart that are constants of the kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = fresh_kernel()._modulated
    types = dict.fromkeys(("x", "shift", "scale"), "*fp32") | {"out": "*bf16", "eps": "fp64"}
    values = {"eps": 1e-6, "width": 72, "columns": 128}
    constants = {(place,): values[kernel.arg_names[place]] for place in kernel.constexprs}
    signature = dict.fromkeys(kernel.arg_names, "i32") | types
    signature |= {kernel.arg_names[place]: "constexpr" for place in kernel.constexprs}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    assert ".f64" not in triton.compile(source, target=target).asm["ptx"]


@since_triton_3_3
def test_compiled_graphs_call_the_kernels_on_new_tensors(monkeypatch):
    """By fake tensors, as no GPU is needed to trace."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    active = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    rotate, graphs = fresh_kernel().rotate, []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with FakeTensorMode():
        qkv, cos_sin = torch.empty(2, 5, 3, 2, 8, requires_grad=True), torch.empty(5, 4, 2)
        q, k, v = aot_function(rotate, fw_compiler=keep, bw_compiler=keep)(qkv, cos_sin)
        (q * k * v).sum().backward()
    for graph, results in zip(graphs, (["q", "k"], ["qkv"]), strict=True):
        (call,) = (
            node
            for node in graph.graph.nodes
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional
        )
        # What the kernel was found to write, and nothing else; into tensors of its own.
        assert sorted(node.args[1] for node in call.users) == sorted(results)
        assert sorted(call.kwargs["tensors_to_clone"]) == sorted(results)
        for name in results:
            assert call.kwargs["kwargs"][name].target is torch.ops.aten.new_empty.default


@pytest.fixture
def as_on_a_gpu(interpreter, monkeypatch):
    """Networks use the kernel on the CPU."""
    monkeypatch.setattr(kernels, "TRITON_DEVICE", "cpu")
    kernels._try_triton.cache_clear()
    yield
    kernels._try_triton.cache_clear()


def network(arch):
    torch.manual_seed(0)
    options = {"input_size": 8} if arch.startswith("dit") else {"image_size": 16, "patch_size": 4}
    model = create_model(arch, rope=RopeConfig(rotate=2), num_classes=5, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def trained(model, batches):
    """The output and the gradients, of several batches."""
    out = []
    for images in batches:
        given = (torch.arange(len(images)),) * 2 if hasattr(model, "t_embedder") else ()
        out.append(model(images, *given))
        out[-1].square().mean().backward()
    return [*out, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
@pytest.mark.parametrize(
    ("arch", "checkpointing"), [("deit-32x2x2", True), ("dit-32x2x2-2", False)]
)
def test_compiled_blocks_use_it_in_one_graph(request, monkeypatch, arch, checkpointing):
    shape = (4, 8, 8) if arch.startswith("dit") else (3, 16, 16)
    batches = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(1))
    plain = trained(network(arch), batches)
    request.getfixturevalue("as_on_a_gpu")
    torch._dynamo.reset()
    recorded, compile_module = AotEagerAndRecordGraphs(), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda block: compile_module(block, backend=recorded, fullgraph=True),
    )
    eager, model, lines = network(arch), network(arch), []
    model.grad_checkpointing = checkpointing
    compile_blocks(model, say=lines.append)
    for found in (trained(eager, batches), trained(model, batches)):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    assert len(lines) == 1
    (forward,), (backward,) = recorded.fw_graphs, recorded.bw_graphs
    assert "spiralrope.rotate_qk" in forward.print_readable(print_output=False)
    assert "spiralrope.rotate_back" in backward.print_readable(print_output=False)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")
def test_inference_of_a_dit_uses_adaptive_layer_norm(request, monkeypatch):
    images, given = torch.randn(2, 4, 8, 8), (torch.arange(2),) * 2
    plain = network("dit-32x2x2-2")(images, *given)
    one_for_all = network("dit-32x2x2-2")(images, *(each[1:] for each in given))
    request.getfixturevalue("as_on_a_gpu")
    torch._dynamo.reset()
    recorded, model = AotEagerAndRecordGraphs(), network("dit-32x2x2-2")
    with torch.inference_mode():
        eager = model(images, *given)
        for block in model.blocks:
            block.compile(backend=recorded, fullgraph=True)
        for found in (eager, model(images, *given)):
            assert not torch.equal(found, plain)  # by another kernel
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        alone = model(images, *(each[1:] for each in given))  # one condition for all images
        torch.testing.assert_close(alone[1], plain[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone, one_for_all, rtol=1e-4, atol=1e-4)
    graph, _ = recorded.fw_graphs
    assert graph.print_readable(print_output=False).count("ops.spiralrope.modulate") == 2
    torch._dynamo.reset()


# ---- where it is used


def projection(dtype=torch.float32, device="cpu"):
    return torch.empty(1, 5, 3, 2, 8, dtype=dtype, device=device)


def test_it_rotates_by_plain_tables_on_gpus_alone(as_on_a_gpu, monkeypatch):
    cos_sin = SpiralRoPE(8, RopeConfig(), 2).cos_sin(2, 1, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels.has_rotary_kernel(projection(dtype), cos_sin)
    assert not kernels.has_rotary_kernel(projection(torch.float64), cos_sin)
    assert not kernels.has_rotary_kernel(projection(device="meta"), cos_sin)
    of_each_head = cos_sin[:, None].expand(-1, 2, -1, -1)
    for table in (of_each_head, cos_sin[:1], cos_sin.double(), cos_sin.clone().requires_grad_()):
        assert not kernels.has_rotary_kernel(projection(), table)
    monkeypatch.undo()
    assert not kernels.has_rotary_kernel(projection(), cos_sin)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("No module named 'triton'"), []),
        (
            RuntimeError("Failed to find C compiler.\nand more"),
            ["networks are slower here, because Triton does not work: Failed to find C compiler."],
        ),
    ],
)
def test_where_triton_does_not_work_the_formula_is_used(
    as_on_a_gpu, monkeypatch, recwarn, error, told
):
    def broken(*_):
        raise error

    monkeypatch.setattr(kernels, "rotate_qkv", broken)
    model, images = network("deit-32x2x2"), torch.randn(2, 3, 16, 16)
    out = model(images)
    monkeypatch.undo()
    assert torch.equal(out, model(images))
    assert [str(warning.message) for warning in recwarn] == told
