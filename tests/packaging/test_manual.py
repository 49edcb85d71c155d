"""The manual builds without a warning, and its pages hold what they should."""

import html
import importlib
import re
import subprocess
import sys

import pytest
from manual import ROOT

import lightning_spectral
from lightning_spectral.records.log_keys import (
    ALPHA_KEY,
    LAYER_KEYS,
    PROBE_KEYS,
    REPORT_KEYS,
    STEP_CURVATURE,
    STEP_KEYS,
)
from lightning_spectral.report import figures

for package in ("furo", "myst_parser", "sphinx_copybutton"):
    pytest.importorskip(package, reason="the manual needs lightning-spectral[docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the pages, built as `make docs` does."""
    recipe = re.search(r"^docs: .*\n\t\$\(BIN\)/sphinx-build (.*) site$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", *recipe[1].split(), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def pages_of_api(site):
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((site / "api").glob("*.html")))


def test_the_api_holds_every_public_name(site):
    pages = pages_of_api(site)
    for name in lightning_spectral.__all__:
        assert f'id="lightning_spectral.{name}"' in pages, name
    for module in ("report", "report.figures", "plan"):
        for name in importlib.import_module(f"lightning_spectral.{module}").__all__:
            assert f'id="lightning_spectral.{module}.{name}"' in pages, name
    assert all(f'id="lightning_spectral.report.figures.{name}"' in pages for name in figures.__all__)


def test_formulas_of_docstrings_are_as_they_were_written(site):
    pages = pages_of_api(site)
    types = (
        r'<em class="(?:sig-param|property|xref)[^>]*>.*?</em>',
        r"</strong> \((?:</?em>|</?a\b[^>]*>|[^()<])*\)",
        r"Return type<.*?</dd>",
    )
    prose = re.sub("|".join(types), "", pages, flags=re.DOTALL)
    # Stars and underscores that markup took for its own.
    assert "<em>" not in prose
    assert "problematic" not in pages
    for placeholder in ("&lt;prefix&gt;/&lt;quantity&gt;/&lt;layer&gt;", "u_k v_k^T", "sigma_k ~ k^-gamma"):
        assert placeholder in re.sub(r"</?span[^>]*>", "", pages), placeholder


def test_the_table_of_keys_holds_every_logged_key(site):
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "keys.html").read_text(encoding="utf-8")))
    for key in (*LAYER_KEYS, STEP_CURVATURE):
        assert f"spectral/{key.name}/<layer>\n" in page, key.name
        assert key.meaning in page
    for key in (*REPORT_KEYS, *PROBE_KEYS, *STEP_KEYS):
        assert f"spectral/{key}\n" in page, key
    assert ALPHA_KEY in page


def test_formulas_of_the_manual_are_set_as_mathematics(site):
    page = (site / "quantities.html").read_text(encoding="utf-8")
    assert page.count('class="math notranslate nohighlight"') > 50
    assert "$" not in re.sub(r"<(script|style|pre).*?</\1>", "", page, flags=re.DOTALL)


def test_links_to_other_files_lead_to_the_repository(site):
    page = (site / "methods.html").read_text(encoding="utf-8")
    assert (
        'href="https://github.com/lightning-spectral/lightning-spectral/blob/main/examples/benchmarks/results/' in page
    )
    assert "_downloads" not in page
