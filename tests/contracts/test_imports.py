"""Who may import whom, and what the command line may not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "spiralrope_cli"
ALWAYS = {"errors", "config", "storage"}
# Package -> the packages it may import; jobs may import all of them.
MAY_IMPORT = {
    "errors": set(),
    "storage": {"errors"},
    "config": {"errors", "storage"},
    "runtime": ALWAYS,
    "kernels": {"triton_kernels"},
    "triton_kernels": set(),
    "rope": ALWAYS | {"kernels"},
    "models": ALWAYS | {"rope", "kernels"},
    "data": ALWAYS | {"runtime"},
    "resolve": ALWAYS | {"runtime", "data"},
    "diffusion": ALWAYS,
    "training": ALWAYS | {"runtime", "rope", "models", "data", "diffusion", "metrics"},
    "metrics": ALWAYS | {"runtime", "data"},
    "hub": ALWAYS | {"runtime", "rope"},
    "infer": ALWAYS | {"hub"},
    "weights": ALWAYS | {"hub", "infer"},
    "load": ALWAYS | {"hub", "models", "infer", "weights", "resolve"},
    "plots": ALWAYS | {"runtime", "rope", "data"},
    "report": ALWAYS | {"runtime", "data", "plots"},
    "jobs": ALWAYS
    | {"runtime", "rope", "models", "data", "diffusion", "training", "metrics", "plots", "report"}
    | {"hub", "infer", "weights", "load", "resolve", "kernels", "jobs"},
    "commands": ALWAYS | {"runtime", "commands"},
}
LIGHT = {"commands", "config"}
LIGHT_FILES = {
    "errors.py",
    "storage.py",
    "catalog.py",
    "source.py",
    "launch.py",
    "run_folder.py",
    "progress.py",
    "resolve.py",
    *("listing.py", "named.py", "stored.py", "splits.py", "shards.py"),
    *("streams.py", "fetched.py", "val_labels.py"),
}
STANDARD_AND = set(sys.stdlib_module_names) | {"typer", "rich", "spiralrope_cli"}
HEAVY = [
    *("torch", "torchvision", "timm", "diffusers", "torch_fidelity", "scipy", "matplotlib"),
    *("huggingface_hub", "jinja2"),
]


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[2] if parts[1] == "core" else parts[1]


def imports(path: Path, everywhere: bool) -> list[str]:
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found += (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module in ("spiralrope_cli.core", "spiralrope_cli.commands")
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


FILES = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE and path.stat().st_size]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_import_only_what_they_may(path):
    relative = path.relative_to(PACKAGE)
    package = relative.parts[1 if relative.parts[0] == "core" else 0].removesuffix(".py")
    # A command enters its job inside the function body, all else at the top of the file.
    names = imports(path, everywhere=package != "commands")
    ours = {package_of(name) for name in names if name.startswith("spiralrope_cli.c")}
    assert ours - {package} <= MAY_IMPORT[package]


def test_a_command_knows_its_config_and_its_job_alone():
    for path in (PACKAGE / "commands").glob("*.py"):
        if path.name != "completion.py":  # it lists published names and runs
            names = imports(path, everywhere=True)
            ours = {package_of(name) for name in names if name.startswith("spiralrope_cli.c")}
            assert ours <= MAY_IMPORT["commands"] | {"jobs"}


def test_a_job_begins_without_heavy_imports():
    wanted = ", ".join(path.stem for path in (PACKAGE / "core" / "jobs").glob("[a-z]*.py"))
    code = (
        f"import sys\nfrom spiralrope_cli.core.jobs import {wanted}\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_job_imports_another():
    for path in (PACKAGE / "core" / "jobs").glob("*.py"):
        names = imports(path, everywhere=True)
        packages = {package_of(name) for name in names if name.startswith("spiralrope_cli.core.")}
        assert "jobs" not in packages or path.name in ("pipeline.py", "sweep.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_light_files_load_the_standard_library_alone(path):
    package = path.relative_to(PACKAGE).parts
    if not (LIGHT & set(package) or path.name in LIGHT_FILES):
        return
    top = {name.split(".")[0] for name in imports(path, everywhere=False)}
    assert top <= STANDARD_AND


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["pretrain", "--help"],
        ["pretrain", "--arch", "deit-x"],
        ["eval", "--help"],
        ["eval"],
        ["eval", "nowhere/x.pth"],
        ["eval", "--crop-ratio", "1.5"],
        ["eval", "x", "--json", "--csv"],
        ["eval", "--scaling", "x"],
        ["eval", "deit-s", "--data", "nowhere"],
        ["predict", "--help"],
        ["predict", "gone.pth", "photo.jpg"],
        ["dit-train", "--help"],
        ["dit-train", "--arch", "dit-x"],
        ["dit-train", "--init-from", "nowhere/at-all"],
        ["dit-encode", "--help"],
        ["dit-encode"],
        ["dit-encode", "--data", "nowhere"],
        ["dit-encode", "--data", "/", "--vae", "nowhere"],
        ["fetch", "--help"],
        ["fetch", "deit-x"],
        ["export", "--help"],
        ["export", "deit-x", "--layout", "published"],
        ["export", "deit-s", "--layout", "onnx"],
        ["export", "deit-s", "--layout", "safetensors", "--out", "x.pth"],
        ["export", "deit-s", "--layout", "safetensors", "--best"],
        ["fid", "--help"],
        ["fid", "samples.npz", "reference.npz", "--select", "fdi"],
        ["fid", "samples.npz"],
        ["fid", "samples.npz", "reference.npz"],
        ["doctor", "--help"],
        ["doctor", "--arch", "deit-x"],
        ["doctor", "--precision", "fp8"],
        ["finetune", "--help"],
        ["finetune"],
        ["finetune", "deit-x"],
        ["finetune", "gone.pth"],
        ["finetune", "deit-s", "--rotate", "-1"],
        ["dit-train", "--init-from", "dit-s2", "--projection", "x"],
        ["dit-sample", "--help"],
        ["dit-sample", "gone.pt"],
        ["dit-sample", "dit-s2", "--cfg-scale", "0.5"],
        ["dit-sample", "dit-s2", "--sampler", "euler"],
        ["dit-sample", "dit-s2", "--num-sampling-steps", "1"],
        ["dit-sample", "dit-s2", "--name", "x", "--out", "y"],
        ["export", "deit-s", "--layout", "published", "--theta", "0"],
        ["plot", "--help"],
        ["plot", "run", "--help"],
        ["plot", "run", "nowhere"],
        ["plot", "rope", "--help"],
        ["plot", "rope", "--rotate", "-1"],
        ["plot", "attention", "--help"],
        ["plot", "attention", "gone.pth", "gone.png"],
        ["plot", "samples", "--help"],
        ["plot", "samples", "gone.npz", "--format", "bmp"],
        ["run", "--help"],
        ["run", "deit", "--help"],
        ["run", "deit", "--eval-only"],
        ["run", "deit", "--from-legacy", "4 - - - - 8"],
        ["run", "deit", "--sweep", "rotate=1,x"],
        ["run", "deit", "--finetune-epochs", "1", "--finetune-warmup-epochs", "1"],
        ["run", "dit", "--help"],
        ["run", "dit", "--sampler", "euler"],
        ["run", "dit", "--reference", "nowhere", "--nproc", "1"],
    ],
)
def test_the_command_line_answers_without_heavy_imports(words, tmp_path):
    code = (
        "import sys\nfrom spiralrope_cli.main import main\n"
        f"sys.argv = ['spiralrope', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


LONGER: dict[str, str] = {}
"""Files over 350 lines, each with its reason; none over 500."""


def test_no_file_outgrows_a_screenful_of_thought():
    counts = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name for name, count in counts.items() if count > 350} <= LONGER.keys()
    assert max(counts.values()) <= 500


def test_inits_below_the_top_stay_empty():
    assert not [path for path in PACKAGE.rglob("*/__init__.py") if path.stat().st_size]


def test_public_names_are_documented_and_lazy():
    code = (
        "import sys, spiralrope_cli as s; assert 'torch' not in sys.modules; "
        "s.RopeConfig(); assert 'torch' not in sys.modules; "
        "print(all(getattr(s, name).__doc__ for name in s.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
