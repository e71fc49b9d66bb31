"""Published file layouts: read without running code in pickles, and written without optimizer.

DeiT, `checkpoint.pth`: model, model_ema, epoch, args; `blocks.N.attn.rope.freqs` in each block.
DiT, `0400000.pt`: model, ema, args; `rope_embedder.freqs` once.
"""

from __future__ import annotations

import argparse
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from spiralrope_cli.core.config.dit_runs import VAE_FACTOR
from spiralrope_cli.core.config.models import RopeConfig, is_dit, size_of
from spiralrope_cli.core.config.option import one_of
from spiralrope_cli.core.errors import CheckpointError
from spiralrope_cli.core.hub.catalog import ROWS
from spiralrope_cli.core.rope import frequencies
from spiralrope_cli.core.storage import DamagedError, check_zip

StateDict = dict[str, Tensor]
RAW_KEYS = ("model", "state_dict")  # of DeiT, DiT, SiT, LightningDiT; of timm and Lightning
EMA_KEYS = ("model_ema", "ema", "state_dict_ema")  # of DeiT; of DiT and those after it; of timm
# What torch.compile, DDP, FSDP and checkpointing put into names, wherever they wrap a module.
WRAPPERS = re.compile(r"\b(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
OF_OURS = "pretrain_grid"  # `args` of our exports only
FREQS_TOLERANCE = 1e-3  # relative; in EMA weights the frequencies drifted by up to 2e-4


@dataclass(frozen=True)
class PublishedFile:
    """The content of a file; with a single set of weights `raw` and `ema` are the same."""

    raw: StateDict  # memory-mapped if the format of the file allows it
    ema: StateDict
    has_both: bool
    args: dict[str, Any]  # options of its run; empty for a plain state dict
    progress: str = ""  # such as `epoch 299` or `step 400000`


def read_published(path: Path, *, verify: bool = True) -> PublishedFile:
    """Reads a `.pth` or `.pt` file, without the state of the optimizer."""
    content = load_safely(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no weights")
    raw, ema = _state_dict_in(content, RAW_KEYS), _state_dict_in(content, EMA_KEYS)
    if not raw and not ema:
        if not content or not all(isinstance(value, Tensor) for value in content.values()):
            named = ", ".join(map(str, list(content)[:4])) or "nothing"
            raise CheckpointError(
                f"{path} is not a checkpoint in a published layout: it holds {named}",
                f"it must hold a state dict under {one_of(map(repr, RAW_KEYS + EMA_KEYS))}, "
                "or only tensors, as torch.save(network.state_dict(), FILE) writes them",
            )
        state = plain_names(content)
        return PublishedFile(state, state, False, {})
    # If raw and EMA weights share their memory, they are one set.
    one = all(name in ema and ema[name].data_ptr() == raw[name].data_ptr() for name in raw)
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    args = _with_model_kwargs(path, args) if isinstance(args, dict) else {}
    if verify and OF_OURS in args:  # others can be ten times as large, for their optimizer
        try:
            check_zip(path)
        except DamagedError as error:
            raise CheckpointError(f"{path} is damaged: {error}", "export it again") from error
    return PublishedFile(
        raw=raw or ema,
        ema=ema or raw,
        has_both=bool(raw and ema) and not one,
        args=args,
        progress=progress_in(content),
    )


def progress_in(content: dict[str, Any]) -> str:
    """`step N` or `epoch N` of a file; empty if it has neither."""
    known = [f"{unit} {content[unit]}" for unit in ("step", "epoch") if unit in content]
    return known[0] if known else ""


def _state_dict_in(content: dict[str, Any], keys: tuple[str, ...]) -> StateDict:
    """The state dict under the first of the keys that has one, empty where there is none."""
    for value in map(content.get, keys):
        named = isinstance(value, dict) and value
        if named and all(isinstance(item, Tensor) for item in named.values()):
            return plain_names(named)
    return {}


def plain_names(state: StateDict) -> StateDict:
    """The tensors by their names in the network itself, without those of what was around it."""
    found = {WRAPPERS.sub("", n): value for n, value in state.items() if n != "n_averaged"}
    # Lightning and others hold the network as `model`, `net`, ...
    outer = {name.partition(".")[0] for name in found}
    if len(outer) == 1 and all("." in name for name in found):
        return plain_names({name.partition(".")[2]: value for name, value in found.items()})
    return found


def _with_model_kwargs(path: Path, args: dict[str, Any]) -> dict[str, Any]:
    """Options of a run; those of `timm_models` in timm's script are in `model_kwargs`.

    Raises for a network of the same names that computes something else.
    """
    if "path_type" in args:
        raise CheckpointError(
            f"{path} holds a SiT: it predicts a velocity, where a DiT predicts noise",
            "its own script draws with it",
        )
    if not str(args.get("model", "")).startswith("spiralrope_"):
        return args
    given = args.get("model_kwargs") or {}
    if (pool := given.get("global_pool") or args.get("gp") or "token") != "token":
        raise CheckpointError(
            f"{path} was trained with the pooling {pool}, and here the class token is read",
            "timm's own validate.py measures it",
        )
    return {**asdict(RopeConfig()), **given, **args}


def head_of(path: Path) -> bytes:
    """The first bytes of a file of weights; what a failed download left there is refused."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path} is empty", "download it again")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint",
            "a message of the server was saved; download it again, or use spiralrope fetch",
        )
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself", "run git lfs pull there"
        )
    return head


def load_safely(path: Path) -> Any:
    """`torch.load` with weights_only, for both formats of torch; errors say what is wrong."""
    head = head_of(path)
    is_zip = head.startswith(ZIP_MAGIC)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Memory-mapped: unused tensors are not read. The old format does not allow it.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted and (is_zip or head.startswith(PICKLE_MAGIC)):  # else it is a text
            raise CheckpointError(
                f"{path} is refused: reading it would run {wanted[1]}",
                "checkpoints are read without running code: only tensors, plain values and "
                "argparse.Namespace are allowed",
            ) from error
        raise CheckpointError(f"{path} is not a checkpoint of torch, or is damaged") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        cut = is_zip or "EOF" in str(error)
        what = "is truncated or damaged" if cut else "is not a checkpoint of torch"
        size = path.stat().st_size
        raise CheckpointError(f"{path} {what} ({size} bytes)", "download it again") from error
    except Exception as error:  # arbitrary bytes make the unpickler fail in any way
        raise CheckpointError(f"{path} is not a checkpoint of torch") from error


def split_freqs(state: StateDict) -> tuple[StateDict, list[Tensor]]:
    """The state dict without RoPE frequencies, and the frequencies; learned ones are weights."""
    freqs = {n: v for n, v in state.items() if n.endswith((".rope.freqs", "rope_embedder.freqs"))}
    return {n: v for n, v in state.items() if n not in freqs}, list(freqs.values())


def freqs_note(stored: list[Tensor], rope: RopeConfig, head_dim: int) -> str | None:
    """A warning if the frequencies in a file differ from those of the RoPE options."""
    if not stored or not rope.enabled:
        return None
    ours = frequencies(rope, head_dim)
    for theirs in {id(value): value for value in stored}.values():  # often one for all blocks
        near = theirs.shape == ours.shape and torch.allclose(
            theirs.double(), ours, rtol=FREQS_TOLERANCE, atol=1e-12
        )
        if not near:
            return (
                "the frequencies in the file differ from those of the RoPE options: check "
                "--rotate, --theta, --freqs-for, --max-freq-lang, --min-freq-lang, "
                "--truncate-percentage and --same-theta"
            )
    return None


@dataclass(frozen=True)
class NetworkSpec:
    """The network of weights, as published files describe it."""

    arch: str
    rope: RopeConfig
    num_classes: int  # of a DiT without the null class
    size: tuple[int, int]  # (height, width) in pixels, or of the latent
    grid: tuple[int, int]  # patches as (rows, columns)
    pretrain_grid: tuple[int, int]  # patches in training
    qk_norm: bool = False
    class_dropout_prob: float | None = None  # of its training, where known
    class_names: tuple[str, ...] = ()  # by class number, where known


def published_content(
    network: NetworkSpec,
    raw: StateDict,
    averaged: StateDict,
    *,
    progress: dict[str, int],
    ema: bool = False,
) -> dict[str, Any]:
    """The dict for `torch.save`, of state dicts without frequencies.

    A single set of weights is given as both, and stored once, under both names; `ema` says which
    it is.
    """
    first = _with_freqs(raw, network)
    second = first if averaged is raw else _with_freqs(averaged, network)
    ema_key = "ema" if is_dit(network.arch) else "model_ema"
    args = _published_args(network)
    if averaged is raw:
        args["weights"] = "ema" if ema else "model"
    return {"model": first, ema_key: second, **progress, "args": args}


def _with_freqs(state: StateDict, network: NetworkSpec) -> StateDict:
    """The state dict with RoPE frequencies, at the positions of the published files."""
    if not network.rope.enabled:
        return dict(state)
    freqs = frequencies(network.rope, size_of(network.arch).head_dim).to(torch.float32)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        found[name] = value
        if name == "y_embedder.embedding_table.weight":
            found["rope_embedder.freqs"] = freqs
        elif name.endswith(".attn.proj.bias") and not is_dit(network.arch):
            # A copy for each block: some loaders refuse tensors that share memory.
            found[name.replace("proj.bias", "rope.freqs")] = freqs.clone()
    return found


def _published_args(network: NetworkSpec) -> dict[str, Any]:
    """`args`: options with their published names, and what the published ones lack."""
    ours = ("enabled", "rope_kind")
    rope = {name: value for name, value in asdict(network.rope).items() if name not in ours}
    height, width = network.size
    model, side, classes = network.arch, "image_size", "num_classes"
    if is_dit(network.arch):
        height, width = VAE_FACTOR * height, VAE_FACTOR * width
        rope = {f"rope_{name}": value for name, value in rope.items()}
    else:
        folders = (PurePosixPath(row.file).parent for row in ROWS if row.arch == network.arch)
        model, side, classes = str(next(folders, network.arch)), "input_size", "nb_classes"
    if network.class_dropout_prob is not None:
        rope["class_dropout_prob"] = network.class_dropout_prob
    return {
        "model": model,
        side: height if height == width else [height, width],
        classes: network.num_classes,
        "use_rope": network.rope.enabled,
        **rope,
        "num_heads": size_of(network.arch).heads,
        "grid": list(network.grid),
        OF_OURS: list(network.pretrain_grid),
        **({"class_names": list(network.class_names)} if network.class_names else {}),
    }


def incompatibilities(network: NetworkSpec) -> list[str]:
    """What the original code would compute differently with these weights, one line each."""
    rope, (rows, columns) = network.rope, network.grid
    found = []
    if rope.enabled and rope.rotate >= 2 and rope.projection == "exact":
        found.append("clamps positions (--projection clamped, not exact)")
    if rope.enabled and network.pretrain_grid != network.grid and rope.scaling == "interpolate":
        trained = "x".join(map(str, network.pretrain_grid))
        found.append(f"takes {rows}x{columns} patches as the trained grid, not {trained}")
    if rope.enabled and rows != columns:
        found.append(f"supports square grids only, not {rows}x{columns}")
    if network.qk_norm:
        found.append("has no QK norm")
    return [f"the original code {what}: its outputs differ" for what in found]
