"""What command lines answer: the values that they reach, or the refusal that names the option.

All in one process, up to where workers would start. A refactor of options changes none of it.
"""

from __future__ import annotations

import functools
import shlex

import pytest
import torch
from conftest import call_launch_instead, options_of
from packaging.version import Version
from typer.testing import CliRunner

from spiralrope_cli import main
from spiralrope_cli.core.config.option import to_nested
from spiralrope_cli.core.errors import SpiralRopeError

FILES = {
    "a.yaml": "optim: {lr: 0.002, epochs: 7}\nrope: {rotate: 4}\nseed: 5",
    "c.yaml": "optim: {lr: fast}",
    "d.yaml": "optim: {lr: 1e-3}",
    "g.yaml": "[1, 2]",
    "h.yaml": "optim: {lr: 0.1",
    "i.yaml": "command: dit-train\narch: dit-32x2x2-2\noptim: {max_steps: 9}\nimages: {hflip: 0.5}",
    "of-an-earlier-version.yaml": "model: {label_dropout: 0.2}\noptim: {steps: 9}\n"
    "pictures: {hflip: 0.5}",
    "j.yaml": "rope: {rotate: 2.5, same_theta: 'yes'}",
    "k.yaml": "model: {image_size: 16}\nmachine: {workers: 2, compile: true}",
    "l.yaml": "model: {image_size: [16, 8], drop_path: true}",
    "m.yaml": "optim: {batch_size: '64', max_steps: '500'}",
}

REACHED = {
    "pretrain": [
        ("--arch deit-s", {"arch": "deit-s"}),
        ("--arch deit-64x2x4", {"arch": "deit-64x2x4"}),
        ("--image-size 16", {"image_size": [16, 16]}),
        ("--image-size 16x8", {"image_size": [16, 8]}),
        ("--patch-size 4", {"patch_size": 4}),
        ("--drop-path 0.2", {"drop_path": 0.2}),
        ("--rope", {}),
        ("--no-rope", {"enabled": False}),
        ("--rotate 4", {"rotate": 4}),
        ("--theta 100", {"theta": 100.0}),
        ("--freqs-for pixel", {"freqs_for": "pixel"}),
        ("--max-freq 5", {"max_freq": 5.0}),
        ("--truncate-percentage 0.5", {"truncate_percentage": 0.5}),
        ("--max-freq-lang 2", {"max_freq_lang": 2.0}),
        ("--min-freq-lang 0.1", {"min_freq_lang": 0.1}),
        ("--same-theta", {"same_theta": True}),
        ("--no-same-theta", {}),
        ("--projection exact", {"projection": "exact"}),
        ("--scaling extrapolate", {"scaling": "extrapolate"}),
        ("--data digits", {}),
        ("--crop-ratio 0.875", {"crop_ratio": 0.875}),
        ("--geometry shift", {}),
        ("--crop-scale 0.5", {"crop_scale": 0.5}),
        ("--translate 1", {"translate": 1.0}),
        ("--degrees 5", {"degrees": 5.0}),
        ("--hflip 0.5", {"hflip": 0.5}),
        ("--hflip 1", {"hflip": 1.0}),
        ("--auto-augment none", {}),
        ("--random-erasing 0.3", {"random_erasing": 0.3}),
        ("--repeated-aug 3", {"repeated_aug": 3}),
        ("--mixup 0.8", {"mixup": 0.8}),
        ("--cutmix 1", {"cutmix": 1.0}),
        ("--smoothing 0", {"smoothing": 0.0}),
        ("--skip-bad", {"skip_bad": True}),
        ("--epochs 1", {"epochs": 1, "warmup_epochs": 0}),
        ("--max-steps 500", {"max_steps": 500, "warmup_epochs": 2}),
        ("--lr 1e-3", {"lr": 0.001}),
        ("--lr-rule none", {"lr_rule": "none"}),
        ("--min-lr 0", {"min_lr": 0.0}),
        ("--warmup-epochs 1", {"warmup_epochs": 1}),
        ("--schedule constant", {"schedule": "constant"}),
        ("--schedule published", {"schedule": "published"}),
        ("--weight-decay 0", {"weight_decay": 0.0}),
        ("--clip-grad 1", {"clip_grad": 1.0}),
        ("--ema-decay 0.9", {"ema_decay": 0.9}),
        ("--out o", {"out": "o"}),
        ("--name x", {"out": "runs/pretrain-deit-ti-digits-r2-x"}),
        ("--seed 7", {"seed": 7}),
        ("--batch-size 64", {"batch_size": 64}),
        ("--micro-batch-size 16", {"micro_batch_size": 16}),
        ("--epochs 5", {"epochs": 5}),
        ("--tracker none", {}),
        ("--log-every 5", {"log_every": 5}),
        ("--validate-every 2", {"validate_every": 2}),
        ("--save-every 3", {"save_every": 3}),
        ("--keep-last 1", {"keep_last": 1}),
        ("--keep-every 100", {"keep_every": 100}),
        ("--nproc 2", {"nproc": 2}),
        ("--nnodes 2 --rdzv-endpoint h:1", {"nnodes": 2, "rdzv_endpoint": "h:1"}),
        ("--max-restarts 3", {"max_restarts": 3}),
        ("--nproc 2 --shard", {"nproc": 2, "shard": True}),
        ("--device cpu", {"device": "cpu"}),
        ("--precision bf16", {"precision": "bf16"}),
        ("--compile", {"compile": "on"}),
        ("--no-compile", {"compile": "off"}),
        ("--grad-checkpointing", {"grad_checkpointing": True}),
        ("--workers 3", {"workers": 3}),
        ("--config a.yaml", {"seed": 5, "rotate": 4, "epochs": 7, "lr": 0.002}),
        ("--config d.yaml", {"lr": 0.001}),
        ("--config d.yaml --lr 3e-3", {"lr": 0.003}),
        ("--max-steps 100 --epochs 3", {"epochs": 3, "max_steps": 100, "warmup_epochs": 0}),
        ("--config m.yaml", {"batch_size": 64, "max_steps": 500}),
        ("--config k.yaml", {"image_size": [16, 16], "compile": "on", "workers": 2}),
        ("--config a.yaml --config d.yaml", {"lr": 0.001}),
        ("--lr 1e-3 --lr 2e-3", {"lr": 0.002}),
        ("--rope --no-rope", {"enabled": False}),
        ("--no-rope --rotate 4", {"enabled": False, "rotate": 4}),
        ("--no-rope --theta 50", {"enabled": False, "theta": 50.0}),
        ("--out one --out two", {"out": "two"}),
        ("--name a/b", {"out": "runs/pretrain-deit-ti-digits-r2-a-b"}),
        ("--min-lr 1", {"min_lr": 1.0}),
        ("--no-ema-warmup", {"ema_warmup": False}),
        ("--lr 0", {"lr": 0.0}),
        ("--rotate 1000", {"rotate": 1000}),
        ("--freqs-for pixel --theta 50", {"theta": 50.0, "freqs_for": "pixel"}),
        ("--freqs-for pixel --min-freq-lang 0.1", {"freqs_for": "pixel", "min_freq_lang": 0.1}),
        ("--min-freq-lang 0.1 --theta 50", {"theta": 50.0, "min_freq_lang": 0.1}),
        ("--rotate 0 --truncate-percentage 0.5", {"rotate": 0, "truncate_percentage": 0.5}),
        ("--rotate 1 --projection exact", {"rotate": 1, "projection": "exact"}),
        ("--rotate 1 --same-theta", {"rotate": 1, "same_theta": True}),
        ("--freqs-for pixel --max-freq-lang 2", {"freqs_for": "pixel", "max_freq_lang": 2.0}),
        ("--precision bf16 --device cpu", {"device": "cpu", "precision": "bf16"}),
        ("--repeated-aug 99", {"repeated_aug": 99}),
        ("--schedule published --epochs 20", {"epochs": 20, "schedule": "published"}),
        (
            "--schedule published --epochs 20 --warmup-epochs 2 --lr-rule none",
            {"epochs": 20, "lr_rule": "none", "warmup_epochs": 2, "schedule": "published"},
        ),
        ("--max-steps 0", {}),
        ("--compile --no-compile", {"compile": "off"}),
        ("--resume never", {"resume": "never"}),
        ("--geometry crop", {"geometry": "crop"}),
    ],
    "dit-train": [
        ("--arch dit-s2", {"arch": "dit-s2"}),
        ("--arch DiT-XL/2", {"arch": "dit-xl2"}),
        ("--arch dit-64x2x4-2", {"arch": "dit-64x2x4-2"}),
        ("--image-size 16", {"input_size": [16, 16], "image_size": [16, 16]}),
        ("--image-size 16x8", {"input_size": [16, 8], "image_size": [16, 8]}),
        ("--qk-norm", {"qk_norm": True}),
        ("--rope", {}),
        ("--no-rope", {"enabled": False}),
        ("--no-rope --rotate 2", {"enabled": False, "rotate": 2}),
        ("--rotate 2", {"rotate": 2}),
        ("--truncate-percentage 0.5", {"truncate_percentage": 0.5}),
        ("--projection exact", {"projection": "exact"}),
        ("--scaling extrapolate", {"scaling": "extrapolate"}),
        ("--hflip 0.5", {"hflip": 0.5}),
        ("--skip-bad", {"skip_bad": True}),
        ("--max-steps 100", {"max_steps": 100, "warmup_epochs": 1}),
        ("--max-steps 100 --epochs 3", {"epochs": 3, "max_steps": 100, "warmup_epochs": 1}),
        ("--lr 1e-3", {"lr": 0.001}),
        ("--warmup-epochs 3", {"warmup_epochs": 3}),
        ("--schedule cosine", {}),
        ("--schedule constant --min-lr 1e-5", {"min_lr": 1e-05, "schedule": "constant"}),
        ("--weight-decay 0.1", {"weight_decay": 0.1}),
        ("--clip-grad 1", {"clip_grad": 1.0}),
        ("--ema-decay 0.9", {"ema_decay": 0.9}),
        ("--class-dropout-prob 0.2", {"class_dropout_prob": 0.2}),
        ("--class-dropout-prob 0", {"class_dropout_prob": 0.0}),
        ("--name x", {"out": "runs/dit-train-dit-ti2-digits-r0-x"}),
        ("--batch-size 8", {"batch_size": 8}),
        ("--epochs 5", {"epochs": 5}),
        (
            "--config i.yaml",
            {
                "arch": "dit-32x2x2-2",
                "hflip": 0.5,
                "max_steps": 9,
                "warmup_epochs": 0,
                "ema_warmup": False,
            },
        ),
        (
            "--config of-an-earlier-version.yaml",
            {"class_dropout_prob": 0.2, "max_steps": 9, "hflip": 0.5, "warmup_epochs": 0},
        ),
        ("--config a.yaml", {"seed": 5, "rotate": 4, "epochs": 7}),
        ("--sample-every 10", {"sample_every": 10}),
        ("--save-every 10", {"save_every": 10}),
        ("--nproc 2", {"nproc": 2}),
        ("--precision bf16", {"precision": "bf16"}),
        ("--compile", {"compile": "on"}),
        ("--grad-checkpointing", {"grad_checkpointing": True}),
        ("--theta 100", {"theta": 100.0}),
        ("--freqs-for pixel", {"freqs_for": "pixel"}),
        ("--max-freq 8", {"max_freq": 8.0}),
        ("--max-freq-lang 1", {"max_freq_lang": 1.0}),
        ("--min-freq-lang 0.5", {"min_freq_lang": 0.5}),
        ("--micro-batch-size 16", {"micro_batch_size": 16}),
        ("--resume never", {"resume": "never"}),
        ("--log-every 3", {"log_every": 3}),
        ("--keep-last 4", {"keep_last": 4}),
        ("--keep-every 5", {"keep_every": 5}),
        ("--device cpu", {"device": "cpu"}),
        ("--workers 1", {"workers": 1}),
        ("--same-theta", {"same_theta": True}),
        ("--nnodes 2 --rdzv-endpoint h:1", {"nnodes": 2, "rdzv_endpoint": "h:1"}),
        ("--max-restarts 3", {"max_restarts": 3}),
        ("--nproc 2 --shard", {"nproc": 2, "shard": True}),
    ],
}
"""Command -> words, and the fields that they change."""

UNWRITABLE = "cannot be written: "

REFUSED = {
    "pretrain": [
        ("--arch deit-x", "--arch deit-x is unknown"),
        ("--image-size 31", "--image-size 31 is not a multiple of the patch size"),
        ("--image-size x", "--image-size is x"),
        ("--patch-size 0", "--image-size 8 is not a multiple of the patch size"),
        ("--drop-path 1", "--drop-path is 1.0"),
        ("--rotate -1", "--rotate is -1"),
        ("--theta 1", "--theta is 1.0"),
        ("--theta inf", "--theta is inf"),
        ("--freqs-for x", "--freqs-for is x"),
        ("--max-freq 0", "--max-freq is 0.0"),
        ("--truncate-percentage 1", "--truncate-percentage is 1.0"),
        ("--max-freq-lang nan", "--max-freq-lang is nan"),
        ("--min-freq-lang 9", "--min-freq-lang is 9.0"),
        (
            "--same-theta --freqs-for pixel",
            "--same-theta with --freqs-for pixel and --rotate 2 is not possible",
        ),
        ("--projection x", "--projection is x"),
        ("--data nowhere", "--data nowhere is neither a folder nor a built-in name"),
        ("--crop-ratio 0", "--crop-ratio is 0.0"),
        ("--crop-ratio 1.1", "--crop-ratio is 1.1"),
        ("--geometry x", "--geometry is x"),
        ("--translate -1", "--translate is -1.0"),
        ("--hflip 1.1", "--hflip is 1.1"),
        ("--auto-augment foo", "--auto-augment is foo"),
        ("--repeated-aug 0", "--repeated-aug is 0"),
        ("--mixup -1", "--mixup is -1.0"),
        ("--smoothing 1", "--smoothing is 1.0"),
        ("--max-steps -1", "--max-steps is -1"),
        ("--lr nan", "--lr is nan"),
        ("--lr inf", "--lr is inf"),
        ("--lr-rule x", "--lr-rule is x"),
        ("--warmup-epochs -1", "--warmup-epochs is -1"),
        ("--schedule published --max-steps 100", "--schedule published counts epochs"),
        ("--schedule linear", "--schedule is linear"),
        ("--ema-decay 1", "--ema-decay is 1.0"),
        ("--out=", "--out is empty"),
        ("--name x --out y", "--name x and --out y both name the run folder"),
        ("--seed -1", "--seed is -1"),
        ("--batch-size 0", "--batch-size is 0"),
        (
            "--batch-size 99999",
            "--batch-size 99999 is more than the 1437 training images of digits",
        ),
        ("--micro-batch-size 0", "--micro-batch-size is 0"),
        ("--epochs 0", "--epochs is 0"),
        ("--epochs x", "--epochs is x"),
        ("--epochs 1.5", "--epochs is 1.5"),
        ("--resume must", "--resume must"),
        ("--resume x", "--resume is x"),
        ("--tracker x", "--tracker is x"),
        ("--log-every 0", "--log-every is 0"),
        ("--keep-last 0", "--keep-last is 0"),
        ("--keep-every -1", "--keep-every is -1"),
        ("--nproc -1", "--nproc is -1"),
        ("--nnodes 2", "--nnodes is 2 without --rdzv-endpoint"),
        ("--rdzv-endpoint x", "--rdzv-endpoint is x"),
        ("--max-restarts -1", "--max-restarts is -1"),
        ("--device tpu", "--device is tpu"),
        ("--precision fp8", "--precision is fp8"),
        ("--workers -1", "--workers is -1; it must be auto, or a whole number in [0, 1024]"),
        ("--config c.yaml", "c.yaml: --lr is fast"),
        ("--config nowhere.yaml", "nowhere.yaml cannot be read"),
        ("--config g.yaml", "g.yaml: it is not a config of a run"),
        ("--config h.yaml", "h.yaml is not YAML: line "),
        ("--config i.yaml", "i.yaml: it is of another kind of run"),
        ("--config j.yaml", "j.yaml: --rotate is 2.5"),
        ("--config l.yaml", "--drop-path is True"),
        ("--config=", "--config is empty"),
        ("--arch DeiT-S", "--arch DeiT-S is unknown"),
        ("--arch deit-63x2x2", "--arch deit-63x2x2"),
        ("--arch dit-s2", "--arch dit-s2 is a DiT"),
        ("--arch deit-64x0x4", "--arch deit-64x0x4"),
        ("--arch=", "--arch is empty"),
        ("--color-jitter 0.4", "--color-jitter 0.4 works on photographs"),
        ("--color-jitter -1", "--color-jitter is -1.0"),
        (
            "--auto-augment rand-m9-mstd0.5-inc1",
            "--auto-augment rand-m9-mstd0.5-inc1 works on photographs",
        ),
        ("--auto-augment 3a --geometry crop", "--auto-augment 3a works on photographs"),
        ("--cutmix -0.5", "--cutmix is -0.5"),
        ("--mixup nan", "--mixup is nan"),
        ("--smoothing -0.1", "--smoothing is -0.1"),
        ("--random-erasing 2", "--random-erasing is 2.0"),
        ("--hflip -1", "--hflip is -1.0"),
        ("--crop-scale 0", "--crop-scale is 0.0"),
        ("--crop-scale 2", "--crop-scale is 2.0"),
        ("--degrees -5", "--degrees is -5.0"),
        ("--drop-path -0.1", "--drop-path is -0.1"),
        ("--drop-path nan", "--drop-path is nan"),
        ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--clip-grad -1", "--clip-grad is -1.0"),
        ("--min-lr -1", "--min-lr is -1.0"),
        ("--lr -1", "--lr is -1.0"),
        ("--lr x", "--lr is x"),
        ("--ema-decay -0.1", "--ema-decay is -0.1"),
        ("--ema-decay 2", "--ema-decay is 2.0"),
        ("--rotate 2.5", "--rotate is 2.5"),
        ("--rotate x", "--rotate is x"),
        ("--theta x", "--theta is x"),
        ("--theta -3", "--theta is -3.0"),
        ("--truncate-percentage -0.5", "--truncate-percentage is -0.5"),
        (
            "--same-theta --rotate 3 --arch deit-s",
            "--rotate 3 with --same-theta does not fit heads of 64 channels",
        ),
        ("--max-freq-lang 0.5 --min-freq-lang 0.6", "--min-freq-lang is 0.6"),
        (
            "--batch-size 100 --micro-batch-size 32",
            "--batch-size 100 does not split into 1 process(es) x 32 images",
        ),
        (
            "--batch-size 64 --nproc 3",
            "--batch-size 64 does not split into 3 process(es) x 21 images",
        ),
        ("--nproc x", "--nproc is x"),
        ("--precision fp16 --device cpu", "--precision is fp16"),
        ("--seed x", "--seed is x"),
        ("--seed 1.5", "--seed is 1.5"),
        ("--keep-last -1", "--keep-last is -1"),
        ("--save-every 0", "--save-every is 0"),
        ("--validate-every 0", "--validate-every is 0"),
        ("--log-every x", "--log-every is x"),
        ("--workers x", "--workers is x"),
        ("--patch-size 3", "--image-size 8 is not a multiple of the patch size"),
        ("--image-size 0", "--image-size 0 is not a multiple of the patch size"),
        ("--image-size 16x", "--image-size is 16x"),
        (
            "--warmup-epochs 50",
            "--warmup-epochs 50 is as long as the whole run of 2200 steps",
        ),
        (
            "--max-steps 10 --warmup-epochs 1",
            "--warmup-epochs 1 is as long as the whole run of 10 steps",
        ),
        ("--epochs -1", "--epochs is -1"),
    ],
    "dit-train": [
        ("--arch dit-x", "--arch dit-x is unknown"),
        ("--arch deit-s", "--arch deit-s is a DeiT"),
        ("--arch dit-64x2x4", "or by numbers: dit-WIDTHxDEPTHxHEADS-PATCH"),
        ("--image-size 7", "--image-size 7 does not split into patches of 2 for dit-ti2"),
        ("--rotate -1", "--rotate is -1"),
        (
            "--rotate 2 --same-theta --freqs-for pixel",
            "--same-theta with --freqs-for pixel and --rotate 2 is not possible",
        ),
        ("--rotate 2 --theta 1", "--theta is 1.0"),
        ("--projection x", "--projection is x"),
        ("--data nowhere", "--data nowhere is neither a folder nor a built-in name"),
        (
            "--vae x",
            "--image-size 8 does not split into patches of 2 for dit-ti2 through the VAE",
        ),
        ("--latents nowhere", "--latents nowhere holds no latents"),
        ("--hflip 2", "--hflip is 2.0"),
        ("--max-steps -1", "--max-steps is -1"),
        ("--lr nan", "--lr is nan"),
        ("--min-lr -1", "--min-lr is -1.0"),
        ("--warmup-epochs -1", "--warmup-epochs is -1"),
        (
            "--warmup-epochs 1000",
            "--warmup-epochs 1000 is as long as the whole run of 2200 steps",
        ),
        ("--schedule published", "--schedule is published"),
        ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--clip-grad -1", "--clip-grad is -1.0"),
        ("--ema-decay 1", "--ema-decay is 1.0"),
        ("--class-dropout-prob 1.1", "--class-dropout-prob is 1.1"),
        ("--class-dropout-prob -1", "--class-dropout-prob is -1.0"),
        ("--out=", "--out is empty"),
        ("--seed -1", "--seed is -1"),
        ("--batch-size 0", "--batch-size is 0"),
        (
            "--batch-size 99999",
            "--batch-size 99999 is more than the 1437 training images of digits",
        ),
        ("--micro-batch-size 3", "--batch-size 64 does not split into 1 process(es) x 3 images"),
        ("--epochs x", "--epochs is x"),
        ("--resume must", "--resume must"),
        ("--resume x", "--resume is x"),
        ("--tracker x", "--tracker is x"),
        ("--log-every 0", "--log-every is 0"),
        ("--sample-every -1", "--sample-every is -1"),
        ("--save-every 0", "--save-every is 0"),
        ("--keep-last 0", "--keep-last is 0"),
        ("--keep-every -1", "--keep-every is -1"),
        ("--nproc -1", "--nproc is -1"),
        ("--device tpu", "--device is tpu"),
        ("--precision fp8", "--precision is fp8"),
        ("--workers -2", "--workers is -2"),
    ],
    "finetune": [
        ("run --rotate -1", "--rotate is -1"),
        ("run --freeze x", "--freeze is x"),
        ("run --out a.yaml", f"--out a.yaml {UNWRITABLE}it is a file"),
        ("run --drop-path 1", "--drop-path is 1.0"),
        ("run --epochs 0", "--epochs is 0"),
        ("run --min-lr -1", "--min-lr is -1.0"),
    ],
    "eval": [
        ("run --json --csv", "--json and --csv exclude each other"),
        ("run --crop-ratio 1.5", "--crop-ratio is 1.5"),
        ("run --crop-ratio 0", "--crop-ratio is 0.0"),
        ("run --image-size 0", "--image-size 0 is not a multiple of the patch size"),
        ("run --image-size x", "--image-size is x"),
        ("run --scaling x", "--scaling is x"),
        ("run --rotate -1", "--rotate is -1"),
        ("run --device tpu", "--device is tpu"),
        ("run --precision fp8", "--precision is fp8"),
        ("run --nproc -1", "--nproc is -1"),
        ("run --nnodes 2", "--nnodes is 2 without --rdzv-endpoint"),
        ("run --workers -2", "--workers is -2"),
        ("run --workers x", "--workers is x"),
        ("run --out=", "--out is empty"),
        ("deit-s --data nowhere", "--data nowhere is neither a folder nor a built-in name"),
        ("run --out a.yaml/x", f"--out a.yaml/x {UNWRITABLE}"),
    ],
    "predict": [
        ("run x.png --out a.yaml/x.png", f"--out a.yaml/x.png {UNWRITABLE}"),
    ],
    "fetch": [
        ("deit-s --out a.yaml/x", f"--out a.yaml/x {UNWRITABLE}"),
    ],
    "dit-encode": [
        ("--data pictures --vae vae --image-size 60", "--image-size 60"),
        ("--data pictures --vae vae --image-size 0", "--image-size 0"),
        ("--data pictures --vae vae --out=", "--out is empty"),
        ("--data pictures --vae vae --out a.yaml", "--out a.yaml cannot be written: it is a file"),
        ("--data pictures --vae nowhere", "--data pictures is not a folder"),
        ("--data nowhere --vae vae", "--data nowhere is not a folder"),
        ("--data digits --vae vae", "--data digits is too small for a VAE"),
        ("--data pictures --vae vae --batch-size 0", "--batch-size is 0"),
        ("--data pictures --vae vae --workers -2", "--workers is -2"),
        ("--data pictures --vae vae --precision fp8", "--precision is fp8"),
        ("--data pictures --vae vae --device tpu", "--device is tpu"),
        ("--vae vae", "--data is missing"),
    ],
    "fid": [
        ("a.npz b.npz --select x", "--select x"),
        ("a.npz b.npz --select fid,x", "--select fid"),
        ("a.npz b.npz --select=", "--select"),
        ("a.npz b.npz --batch-size 0", "--batch-size is 0"),
        ("a.npz b.npz --bootstrap -1", "--bootstrap is -1"),
        ("a.npz b.npz --bootstrap 5 --select is", "--bootstrap needs fid in --select"),
        ("a.npz b.npz --kid-subsets 0", "--kid-subsets is 0"),
        ("a.npz b.npz --kid-subset-size 1", "--kid-subset-size is 1"),
        ("a.npz b.npz --seed -1", "--seed is -1"),
        ("a.npz b.npz --precision fp8", "--precision is fp8"),
        ("a.npz b.npz --nproc -1", "--nproc is -1"),
        ("a.npz b.npz --device tpu", "--device is tpu"),
        ("a.npz b.npz --workers -2", "--workers is -2"),
        ("a.npz --save-stats x.txt", "--save-stats x.txt must end in .npz"),
        ("a.npz --save-stats a.yaml/x.npz", f"--save-stats a.yaml/x.npz {UNWRITABLE}"),
    ],
    "export": [
        ("run --layout onnx", "--layout is onnx"),
        ("run --layout published --out x.txt", "--out x.txt must end in .pth or .pt"),
        ("run --layout safetensors --out x.pth", "--out x.pth is the name of a file"),
        ("run --layout published --rotate -1", "--rotate is -1"),
        ("run --layout published --out=", "--out is empty"),
        ("run --layout published --out a.yaml/x.pth", f"--out a.yaml/x.pth {UNWRITABLE}"),
        ("run --out a.yaml/x", f"--out a.yaml/x {UNWRITABLE}"),
    ],
    "plot rope": [
        ("--rotate -1", "--rotate is -1"),
        ("--rotate x", "--rotate is x"),
        ("--theta 1", "--theta is 1.0"),
        ("--freqs-for x", "--freqs-for is x"),
        ("--arch deit-x", "--arch deit-x is unknown"),
        ("--grid 0", "--grid 0x0"),
        ("--grid x", "--grid is x"),
        ("--pretrain-grid 0", "--pretrain-grid 0x0"),
        ("--show x", "--show is x"),
        ("--out x.txt", "--out x.txt must end in .png or .svg"),
        ("--out=", "--out is empty"),
        ("--format x", "--format is x"),
        (
            "--rotate 1 --rotate 4 --projection exact --show directions --out x.png",
            "--show is directions",
        ),
        (
            "--same-theta --rotate 3",
            "--rotate 3 with --same-theta does not fit heads of 64 channels",
        ),
    ],
    "plot run": [
        ("run --over x", "--over is x"),
        ("run --out x.txt", "--out x.txt must end in .png or .svg"),
        ("run --format x", "--format is x"),
        ("run --out a.yaml/x.png", f"--out a.yaml/x.png {UNWRITABLE}"),
    ],
    "plot attention": [
        ("run x.png --patch x", "--patch is x"),
        ("run x.png --layer -1", "--layer is -1"),
        ("run x.png --rotate -1", "--rotate is -1"),
    ],
    "plot samples": [
        ("a.npz --num-samples 0", "--num-samples is 0"),
        ("a.npz --num-samples x", "--num-samples is x"),
        ("a.npz --format x", "--format is x"),
        ("a.npz --out x.txt", "--out x.txt must end in .png or .svg"),
    ],
    "run deit": [
        ("--out p --eval-only", "--eval-only"),
        ("--out p --skip-training", "--skip-training"),
        (
            "--out p --eval-only --skip-training",
            "--eval-only and --skip-training exclude each other",
        ),
        ("--out p --rotate -1", "--rotate is -1"),
        ("--out p --arch deit-x", "--arch deit-x is unknown"),
        ("--out p --data nowhere", "--data nowhere is neither a folder nor a built-in name"),
        ("--out p --max-steps -1", "--max-steps is -1"),
        ("--out p --finetune-max-steps -1", "--finetune-max-steps is -1"),
        ("--out p --finetune-lr nan", "--finetune-lr is nan"),
        ("--out p --finetune-epochs 0", "--finetune-epochs is 0"),
        ("--out p --no-finetune --finetune-lr 1", "--finetune-lr has no effect with --no-finetune"),
        ("--out=", "--out is empty"),
        ("--sweep x", "--sweep x is not NAME=V"),
        ("--sweep foo=1,2", "--sweep foo=1"),
        ("--sweep rotate=", "--sweep rotate= is not NAME=V"),
        ("--sweep rotate=1,1", "--sweep rotate=1"),
        ("--sweep rotate=x", "--sweep rotate=x"),
        ("--sweep rotate=1,2 --rotate 4", "--rotate is given twice, also in --sweep"),
        ("--seeds x", "--seeds is x"),
        ("--seeds 0,0", "--seeds 0"),
        ("--seeds=", "--seeds is empty"),
        ("--seeds 1 --seed 3", "--seed and --seeds exclude each other"),
    ],
    "run dit": [
        ("--out p --num-samples 0", "--num-samples is 0"),
        ("--out a.yaml/x", f"--out a.yaml/x {UNWRITABLE}"),
        ("--out p --sampler x", "--sampler is x"),
        ("--out p --num-sampling-steps x", "--num-sampling-steps"),
        ("--out p --sampling-seed -1", "--sampling-seed is -1"),
        ("--out p --cfg-scale -1", "--cfg-scale is -1.0"),
        ("--out p --rotate -1", "--rotate is -1"),
        ("--out p --arch deit-s", "--arch deit-s is a DeiT"),
        ("--out p --latents nowhere", "--latents nowhere holds no latents"),
        ("--out p --lr nan", "--lr is nan"),
    ],
    "dit-sample": [
        ("nowhere --num-samples 0", "--num-samples is 0"),
        ("nowhere --num-samples x", "--num-samples is x"),
        ("nowhere --num-sampling-steps 2000", "--num-sampling-steps 2000"),
        ("nowhere --num-sampling-steps 0", "--num-sampling-steps 0"),
        ("nowhere --num-sampling-steps ddimx", "--num-sampling-steps ddimx"),
        ("nowhere --sampler dpm++ --num-sampling-steps 10,10", "--num-sampling-steps 10"),
        ("nowhere --sampler x", "--sampler is x"),
        ("nowhere --cfg-scale 0.5", "--cfg-scale is 0.5"),
        ("nowhere --cfg-scale -1", "--cfg-scale is -1.0"),
        ("nowhere --cfg-scale nan", "--cfg-scale is nan"),
        ("nowhere --cfg-channels 4", "--cfg-channels is 4"),
        ("nowhere --cfg-interval 600,100", "--cfg-interval 600"),
        ("nowhere --cfg-interval 0,2000 --cfg-scale 2", "--cfg-interval 0"),
        ("nowhere --cfg-interval x", "--cfg-interval is x"),
        ("nowhere --classes x", "--classes is x"),
        ("nowhere --rotate -1", "--rotate is -1"),
        ("nowhere --projection x", "--projection is x"),
        ("nowhere --out=", "--out is empty"),
        ("nowhere --out a.yaml/x", f"--out a.yaml/x {UNWRITABLE}"),
        ("nowhere --seed -1", "--seed is -1"),
        ("nowhere --batch-size 0", "--batch-size is 0"),
        ("nowhere --nproc -1", "--nproc is -1"),
        ("nowhere --device tpu", "--device is tpu"),
        ("nowhere --precision fp8", "--precision is fp8"),
    ],
}
"""Command -> words, and what their refusal begins with."""


def of_all(table):
    """(command, words, what is expected) of each line."""
    return [(command, *row) for command, rows in table.items() for row in rows]


@pytest.fixture(autouse=True)
def no_bf16(monkeypatch):
    """`--precision auto` is fp32, as on a CPU without bf16."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.fixture
def launched(runs, monkeypatch):
    """The runs that would be launched, in a folder with the config files."""
    for name, text in FILES.items():
        (runs / name).write_text(text)
    return call_launch_instead(monkeypatch)


def answer(launched, command, words=""):
    """The flat values of the run that would be launched."""
    result = CliRunner().invoke(main.app, [*command.split(), *shlex.split(words)])
    assert result.exit_code == 0, result.output or result.exception
    [(_, run)] = launched
    groups = to_nested(run)
    return {
        name: each
        for key, value in groups.items()
        for name, each in (value.items() if isinstance(value, dict) else [(key, value)])
    }


@functools.cache
def plain(command):
    """Values without options, as `answer` left them; they depend on no folder."""
    with pytest.MonkeyPatch.context() as patched:
        return answer(call_launch_instead(patched), command)


@pytest.mark.parametrize(("command", "words", "changed"), of_all(REACHED))
def test_options_reach_their_fields_and_no_others(launched, command, words, changed):
    if "--shard" in words and Version(torch.__version__) < Version("2.11"):
        pytest.skip("torch before 2.11 cannot shard on a CPU")
    before = plain(command)
    after = answer(launched, command, words)
    assert after.keys() == before.keys()
    found = {name: value for name, value in after.items() if value != before[name]}
    if "out" not in changed:  # it follows from the others
        found.pop("out", None)
    assert found == changed


NOT_ON_DIGITS = {
    "pretrain": {"data", "auto_augment", "augment_on", "color_jitter", "rope_kind", "tracker"},
    "dit-train": {
        *("data", "vae", "latents", "rope_kind", "tracker", "source", "ema"),
        *("fid_every", "fid_num", "fid_reference", "fid_sampling_steps", "fid_weights"),
    },
}
"""What other tests have: what only other data, weights or kinds of RoPE can have, or an extra."""


@pytest.mark.parametrize("command", REACHED)
def test_every_option_is_among_those_that_reach_their_field(command):
    changed = {name for _, fields in REACHED[command] for name in fields}
    options = options_of(command) - {"config", "name", "dry_run", "slurm"}
    assert options - changed == NOT_ON_DIGITS[command]


@pytest.mark.parametrize(("command", "words", "told"), of_all(REFUSED))
def test_what_is_refused_names_its_option(launched, command, words, told):
    result = CliRunner().invoke(main.app, [*command.split(), *shlex.split(words)])
    assert isinstance(result.exception, SpiralRopeError), result.output
    assert told in str(result.exception)
    assert len(str(result.exception).splitlines()) <= 2
    assert not launched


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "Usage"),
        ("--nowhere", "No such option: --nowhere"),
        ("pretrian", "No such command 'pretrian'"),
        ("run x", "No such command 'x'"),
        ("plot x", "No such command 'x'"),
        ("pretrain --rotat 3", "No such option: --rotat"),
        ("pretrain --resume", "Option '--resume' requires an argument"),
        ("pretrain --freeze none", "No such option: --freeze"),
        ("finetune", "Missing argument 'SOURCE'"),
        ("finetune x --patch-size 8", "No such option: --patch-size"),
        ("dit-train --lr-rule none", "No such option: --lr-rule"),
        ("dit-train --mixup 0.5", "No such option: --mixup"),
        ("dit-encode --rotate 2", "No such option: --rotate"),
        ("dit-sample", "Missing argument 'SOURCE'"),
        ("export", "Missing argument 'SOURCE'"),
        ("eval --epochs 3", "No such option: --epochs"),
        ("run deit --sampler ddim", "No such option: --sampler"),
        ("fetch --nowhere", "No such option: --nowhere"),
        ("doctor --nowhere", "No such option: --nowhere"),
    ],
)
def test_what_no_command_knows_is_a_usage_error(runs, words, told):
    result = CliRunner().invoke(main.app, shlex.split(words), env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert told in result.output
