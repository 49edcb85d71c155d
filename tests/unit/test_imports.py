"""The import rule: arrows point one way, and measuring needs neither Lightning nor W&B."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_spectral

ROOT = Path(lightning_spectral.__file__).parent

# module -> what of this package it may import. A package stands for its modules.
ALLOWED = {
    "errors": set(),
    "fits": {"encoding"},
    "intervals": {"encoding", "fits"},
    "fraction": {"encoding"},
    "metrics": {"errors", "fits"},
    "encoding": set(),
    "kinds": set(),
    "layers": {"kinds"},
    "lanczos": set(),
    "patches": set(),
    "moments": {"svd"},
    "alignment": {"encoding", "fits"},
    "svd": {"errors", "lanczos"},
    "weights": {"encoding", "errors", "fits", "svd"},
    "batch": {"errors", "shadow"},
    "shadow": {"errors", "sharding"},
    "precision": set(),
    "interrupts": set(),
    "quiet": {"batch", "errors", "interrupts", "precision", "shadow", "sharding"},
    "loss": {"errors", "shadow"},
    "curvature": {"curvature", "errors", "fits", "layers", "loss", "svd"},
    "options": {"curvature", "fits", "kinds", "layers", "quiet"},
    "processes": {"errors"},
    "sharding": {"processes"},
    "rounds": {"errors", "processes"},
    "summing": {"processes", "rounds"},
    "gathering": {"interrupts", "processes", "rounds", "sharding", "summing"},
    "pieces": {"batch", "curvature", "errors", "layers", "quiet", "summing", "svd"},
    "factors": {
        "alignment", "curvature", "errors", "fits", "layers", "moments", "patches", "pieces", "processes", "svd",
    },
    "memory": {"curvature", "errors", "factors", "fits", "layers", "options", "pieces", "processes", "quiet", "svd"},
    "spectrum": {"alignment", "encoding", "fits", "fraction", "intervals", "weights"},
    "record": {"encoding", "errors", "fits", "spectrum"},
    "loaders": {"batch", "quiet"},
    "prepared": {"batch", "gathering", "layers", "loss", "options", "pieces", "processes", "quiet"},
    "fitted": {
        "curvature", "errors", "fraction", "memory", "options", "pieces", "processes", "spectrum", "weights",
    },
    "measure": {
        "curvature", "errors", "fitted", "gathering", "kinds", "layers", "loaders", "loss", "memory", "options",
        "prepared", "processes", "quiet", "record", "svd",
    },
    "dry": {"batch", "curvature", "errors", "layers", "loss", "quiet", "shadow"},
    "costs": {"curvature", "layers", "memory", "moments", "svd"},
    "estimate": {"costs", "curvature", "dry", "gathering", "layers", "options", "quiet"},
    "plan": {"costs", "curvature", "dry", "estimate", "kinds", "layers", "loss", "options", "prepared", "quiet"},
    "functional": {"errors", "loss"},
    "sources": {"errors", "functional", "loaders", "loss"},
    "posthoc": {"batch", "dry", "errors", "measure", "options", "plan", "record", "report", "sources"},
    "names": set(),
    "command": set(),
    "analysis": {"names", "record", "spectrum"},
    "summary": {"analysis", "errors", "record"},
    "optim": {"errors", "kinds", "layers", "optim", "precision", "processes", "sharding"},
    "report": {
        "", "alignment", "analysis", "costs", "encoding", "errors", "estimate", "fits", "kinds", "names", "optim",
        "plan", "record", "report", "spectrum", "summary",
    },
    "callbacks": {
        "batch", "callbacks", "curvature", "encoding", "errors", "interrupts", "kinds", "layers", "loaders", "loss",
        "measure", "optim", "options", "processes", "quiet", "record", "report", "spectrum",
    },
    "demo": {"callbacks", "demo", "record", "report"},
    "lightning_cli": {"callbacks", "optim", "sources"},
    "__main__": {"cli"},
    "cli": {"", "callbacks", "command", "demo", "errors", "lightning_cli", "options", "posthoc", "report", "sources"},
    "__init__": {
        "alignment", "callbacks", "errors", "fits", "measure", "metrics", "optim", "record", "spectrum", "svd",
    },
}  # fmt: skip
LIGHTNING = {"callbacks", "demo", "lightning_cli"}


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        yield path.relative_to(ROOT).parts[0].removesuffix(".py"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize(
    ("name", "path"), list(modules()), ids=lambda value: str(value).rpartition("lightning_spectral/")[2]
)
def test_imports_point_one_way(name, path):
    for imported in imports(path):
        top, _, rest = imported.partition(".")
        if top == "lightning_spectral":
            assert rest.partition(".")[0] in ALLOWED[name], f"{name} may not import {imported}"
        if top in ("pytorch_lightning", "lightning"):
            assert name in LIGHTNING, f"{name} may not import {imported}"
        assert top != "wandb" or name == "report", f"{name} may not import wandb"


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_measuring_works_without_lightning_and_wandb():
    done = run_python(
        "import sys\n"
        "for name in ('pytorch_lightning', 'lightning', 'wandb', 'torchmetrics', 'sklearn', 'pandas', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "from lightning_spectral import measure_spectra\n"
        "model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))\n"
        "import lightning_spectral.report.figures\n"
        "print(measure_spectra(model, torch.randn(64, 6), lambda m, x: m(x).square().mean()))\n"
        "try:\n    from lightning_spectral import SpectralProbe\nexcept ImportError as error:\n    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "SpectralReport(2 layers" in done.stdout
    assert "SpectralProbe needs Lightning: pip install pytorch-lightning" in done.stdout


def test_public_names_are_there_and_lazy():
    for name in lightning_spectral.__all__:
        assert getattr(lightning_spectral, name).__doc__
    assert set(lightning_spectral.__all__) <= set(dir(lightning_spectral))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lightning_spectral.nothing  # noqa: B018
    done = run_python("import sys, lightning_spectral; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"
