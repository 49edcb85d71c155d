"""What is published: wheel, source distribution and their metadata, built here as `make dist` builds them."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser

import pytest
from manual import ROOT
from packaging.requirements import Requirement

import lightning_spectral

for package in ("build", "hatchling", "hatch_fancy_pypi_readme", "twine"):
    pytest.importorskip(package, reason="building needs lightning-spectral[build]")

USER_EXTRAS = {"cli", "demo", "pandas", "paper", "plot", "report", "workspace"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Paths of the wheel and of the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(wheel.read(name).decode())


def test_metadata_and_long_description_pass_twine(built):
    command = [sys.executable, "-m", "twine", "check", "--strict", *built]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_is_small_and_holds_the_package_alone(built):
    assert built[0].stat().st_size < 2**19
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lightning_spectral"}
    assert {"lightning_spectral/py.typed", "lightning_spectral/report/page/assets/page.js"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_what_its_tests_need_without_their_figures(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "LICENSE",
        "Makefile",
        ".ci/run",
        "docs/conf.py",
        "tests/conftest.py",
    }
    assert needed <= names
    assert not [name for name in names if re.match(r"tests/.*\.png$", name)]


def test_the_version_is_the_packages_everywhere(metadata):
    assert metadata["Version"] == lightning_spectral.__version__
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert cited == lightning_spectral.__version__
    of_version = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition(f"\n## [{cited}] - ")[2]
    assert 0 < len(of_version.splitlines()) <= 40


def test_all_is_every_extra_of_users(metadata):
    assert {*USER_EXTRAS, "all", "build", "docs", "lint", "test"} == set(metadata.get_all("Provides-Extra"))
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist")]

    def of(extra):
        return {need.name for need in needs if need.marker is not None and need.marker.evaluate({"extra": extra})}

    assert of("all") == set.union(*(of(extra) for extra in USER_EXTRAS))
    assert of("all") <= of("test")


def test_links_of_the_long_description_work_outside_the_repository(metadata):
    text = re.sub(r"^```.*?^```$", "", metadata.get_payload(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r'(?:\]\(|(?:href|src|srcset)=")([^)"\s]+)', text)
    assert targets
    assert all(target.startswith(("https://", "#")) for target in targets), targets
    pictures = re.findall(r'!\[[^]]*\]\(([^)]+)\)|src(?:set)?="([^"]+)"', text)
    host = re.escape("https://raw.githubusercontent.com/lightning-spectral/lightning-spectral/main/")
    for picture in filter(None, sum(pictures, ())):
        inside = re.fullmatch(f"{host}(.*)", picture)
        assert inside is None or (ROOT / inside[1]).exists(), picture
