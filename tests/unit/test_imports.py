"""The import rule: arrows point one way, and measuring needs neither Lightning nor W&B."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_spectral

ROOT = Path(lightning_spectral.__file__).parent

# From the ground up; a package or module imports from floors below its own, and from itself.
FLOORS = [
    {"_version", "_validation", "_messages", "_serialization", "_torch_private", "_autograd", "errors"},
    {"numerics", "layers", "distributed"},
    {"options", "optim", "metrics"},
    {"isolation", "curvature", "records"},
    {"measurement", "analysis"},
    {"measure", "functional", "summary"},
    {"plan"},
    {"report"},
    {"callbacks"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__", "lightning_cli"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
LIGHTNING = {"callbacks", "cli", "demo"}


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
        if top == "lightning_spectral" and (below := rest.partition(".")[0]) != name:
            assert FLOOR[below] < FLOOR[name], f"{name} may not import {imported}"
        if top in ("pytorch_lightning", "lightning"):
            assert name in LIGHTNING, f"{name} may not import {imported}"
        assert top != "wandb" or name == "report", f"{name} may not import wandb"


def test_modules_loaded_by_name_are_those_of_two_tables():
    """The public names, and what a record shows of itself, beside torch's own: nothing else goes around the rule."""
    by_name = {
        path.relative_to(ROOT).as_posix()
        for name, path in modules()
        if name not in LIGHTNING and "importlib" in path.read_text() and "import_module(" in path.read_text()
    }
    assert by_name == {"__init__.py", "records/report.py", "_torch_private.py"}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_public_names_are_there_and_lazy():
    for name in lightning_spectral.__all__:
        assert getattr(lightning_spectral, name).__doc__
    assert set(lightning_spectral.__all__) <= set(dir(lightning_spectral))
    assert len(set(dir(lightning_spectral))) == len(dir(lightning_spectral))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lightning_spectral.nothing  # noqa: B018
    done = run_python("import sys, lightning_spectral; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False"
