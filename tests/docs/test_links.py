"""Links of the manual and the README lead somewhere, and pictures are there and small."""

import re

import pytest
from manual import MANUAL, PAGES, README, ROOT

from lightning_spectral.report import figures

REPOSITORY = "https://github.com/lightning-spectral/lightning-spectral"
TEXTS = {"README.md": README, **{f"docs/{name}": text for name, text in PAGES.items()}}


def without_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    headings = re.findall("^#+ (.+)", without_fences(text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings_that_there_are(name):
    targets = re.findall(r'(?:\]\(|(?:href|src|srcset)=")([^)"\s]+)', without_fences(TEXTS[name]))
    for target in targets:
        raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com")
        inside = re.sub(rf"^({REPOSITORY}/(blob|tree)|{raw})/main/", "/", target)
        if re.match(r"\w+:", inside):
            assert not target.startswith((f"{REPOSITORY}/blob", raw)), target
            continue
        path, _, anchor = inside.partition("#")
        page = ROOT / path[1:] if path.startswith("/") else (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", TEXTS)
def test_headings_of_a_page_differ(name):
    assert len(anchors(TEXTS[name])) == len(set(anchors(TEXTS[name])))


def test_pictures_are_small_and_described():
    shown = {(name, *found) for name, text in TEXTS.items() for found in re.findall(r"!\[(.*?)\]\((.*?)\)", text)}
    assert {path.rpartition("/")[2] for _, _, path in shown} >= {
        "resnet_power_law.png",
        "gpt_alpha_over_training.png",
        "noise_cpu.png",
    }
    for name, description, path in shown:
        assert description, path
        if not path.startswith("http"):
            assert ((ROOT / name).parent / path).stat().st_size < 80_000, path


def test_every_function_that_draws_is_named():
    for name in figures.__all__:
        assert f"`{name}`" in MANUAL, name


def test_the_address_of_the_repository_is_one():
    for name in ("pyproject.toml", "CITATION.cff", "README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert set(re.findall(r"https://github\.com/[\w-]+/lightning-spectral", text)) <= {REPOSITORY}, name
