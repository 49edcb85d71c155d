"""The manual's pages and the README as text, with what stands in their fences and tables."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}
MANUAL = "\n".join(PAGES[name] for name in sorted(PAGES))


def flat(text):
    """Return the text in one line."""
    return " ".join(text.split())


def fences(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(word, text):
    """Return the lines of shell fences that hold the word."""
    return [line for fence in fences("bash", text) for line in fence.splitlines() if word in line]


def cells_of(row, page):
    """Return the cells after the first of the one row of the page whose first cell is `row`, or begins with it."""
    rows = [line[2:-2].split(" | ") for line in PAGES[page].splitlines() if line.startswith("| ")]
    (found,) = [cells for cells in rows if cells[0] == row] or [cells for cells in rows if cells[0].startswith(row)]
    return found[1:]


def benchmark(name):
    """Return the committed results of a benchmark."""
    return json.loads((ROOT / "examples/benchmarks/results" / f"{name}_cpu.json").read_text(encoding="utf-8"))
