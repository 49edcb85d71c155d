"""The docstrings render as pages, without a warning and with their formulas as they were written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_spectral

pytest.importorskip("pdoc", reason="the pages need pdoc: pip install lightning-spectral[docs]")
ROOT = Path(__file__).parents[2]


def test_pages_hold_every_public_name_and_whole_formulas(tmp_path):
    recipe = re.search(r"^DOCUMENTED := (.*?)\ndocs:", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL)
    parts = re.search(r"addprefix lightning_spectral\.,(.*)\)", recipe.group(1), re.DOTALL).group(1)
    modules = ["lightning_spectral", *(f"lightning_spectral.{part}" for part in parts.replace("\\", " ").split())]
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::RuntimeWarning", "-m", "pdoc", "-d", "google"]
    command.append("--no-show-source")
    done = subprocess.run([*command, "-o", tmp_path, *modules], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for module in modules:
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text()
        # A formula with two stars or underscores that Markdown took for its own.
        assert "<em>" not in page
    front = (tmp_path / "lightning_spectral.html").read_text()
    for name in lightning_spectral.__all__:
        assert f'id="{name}"' in front, name
