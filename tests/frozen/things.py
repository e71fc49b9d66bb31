"""What command lines work on, made here and not by the checkout; and gradients of its networks."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any


def digest(arrays: dict[str, Any]) -> str:
    """SHA-256 of named tensors or arrays: names, types, shapes and bytes."""
    import torch

    total = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        if torch.is_tensor(array):  # numpy has no bfloat16
            array = array.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        total.update(array.tobytes())
    return total.hexdigest()


def write_things(work: Path) -> None:
    """Class folders, arrays, a VAE and Inception with random weights; the same every time."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from PIL import Image

    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from random_inception import write_random_weights

    things, noise = work / "things", np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for number, name in enumerate(("dark", "light", "mixed")):
            folder = things / "pictures" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(60 * number, 110 + 60 * number, (36, 40, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    images = np.stack([noise.integers(0, 256 - 6 * n, (16, 16, 3), np.uint8) for n in range(24)])
    np.savez(things / "a.npz", images[:12])
    np.savez(things / "b.npz", images[12:])
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "block_out_channels": (8,) * 4}
    vae = AutoencoderKL(**blocks, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4)
    with torch.no_grad():
        vae.quant_conv.weight *= 4  # deviations that differ, as those of trained weights do
    vae.save_pretrained(things / "vae")
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
    write_random_weights(work / "inception.pth", pictures)


def gradients() -> dict[str, Any]:
    """SHA-256 of outputs and of all gradients, of both networks with many kinds of RoPE."""
    import torch

    from spiralrope_cli import GaussianDiffusion, RopeConfig, create_model

    ropes = [{"rotate": number} for number in (0, 1, 2, 4)]
    ropes += [{"freqs_for": "pixel"}, {"same_theta": True}, {"truncate_percentage": 0.25}]
    ropes += [{"projection": "exact"}, {"min_freq_lang": 0.1}, {"scaling": "extrapolate"}]
    deit = {"arch": "deit-64x2x4", "image_size": (32, 24), "patch_size": 4, "drop_path": 0.2}
    dit = {"arch": "dit-64x2x4-2", "input_size": (8, 12), "in_chans": 3, "label_dropout": 0.3}
    models = [{**base, "rope": rope} for base in (deit, dit) for rope in ropes]
    models += [{**deit, "rope": {}, "pretrain_grid": (4, 6)}, {**dit, "rope": {}, "qk_norm": True}]
    found: dict[str, Any] = {}
    for options in models:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            wanted = {**options, "rope": RopeConfig(**options["rope"]), "num_classes": 10}
            model = create_model(wanted.pop("arch"), **wanted)
            with torch.no_grad():
                for _, parameter in sorted(model.named_parameters()):  # a new DiT gives zeros
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
            labels = torch.arange(6)
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                if "input_size" in options:
                    x, t = torch.randn(6, 3, 8, 12), torch.arange(0, 960, 160)
                    losses = GaussianDiffusion().training_losses(model, x, t, y=labels)
                    loss, inputs = losses["loss"].mean(), (x, t, labels)
                else:
                    inputs = (torch.randn(6, 3, 32, 24),)
                    loss = torch.nn.functional.cross_entropy(model(*inputs), labels)
                loss.backward()
                with torch.inference_mode():
                    out = model.eval()(*inputs)
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            name = " ".join(f"{key}={value}" for key, value in options.items()) + f" {dtype}"
            numbers = {"loss": loss.item(), "outputs": digest({"": out}), "all": digest(grads)}
            found[name] = numbers
    return found
