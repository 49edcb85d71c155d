"""The README: short, and of one mind with the manual."""

import re
import statistics

import pytest
from manual import MANUAL, README, benchmark, flat

MEASURED = re.compile(r"\d[\d.,]* (?:%|GB|MB|kB|training steps|nats)")


def test_it_is_short():
    assert len(README.splitlines()) <= 220


def test_measured_numbers_are_the_manuals():
    """The manual's numbers are held to the benchmarks' files; what the README cites stands in the manual, too."""
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    told = set(MEASURED.findall(flat(prose)))
    assert not told - set(MEASURED.findall(flat(MANUAL)))


def test_rows_with_measured_means_are_the_manuals():
    def rows(text):
        return {row for row in re.findall(r"^\| .+ \|$", text.replace("](../", "]("), re.MULTILINE) if "±" in row}

    assert rows(README) <= rows(MANUAL)


@pytest.mark.parametrize(("title", "name"), [("ReLU ResNet", "resnet"), ("GPT of 3 blocks", "gpt3")])
def test_the_table_of_costs_is_the_benchmarks(title, name):
    methods = benchmark("probe")["figures"][name]["methods"]
    (row,) = re.findall(rf"^\| {title}.* \| (\d+ \| \d+) \|$", README, re.MULTILINE)
    assert row == f"{methods['exact']['steps']:.0f} | {methods['auto']['steps']:.0f}"


def test_what_other_networks_cost_is_the_benchmarks():
    figures = benchmark("others")["figures"].values()
    steps, layers = [row["steps"] for row in figures], [len(row["layers"]) for row in figures]
    told = f"{statistics.median(steps):.0f} in the median, {max(steps):.0f} at most"
    row = f"| {len(steps)} networks and losses as other people write them | {min(layers)} to {max(layers)} | | {told} |"
    assert row in README.splitlines()
