"""The README: short, and of one mind with the manual."""

import re

from manual import MANUAL, README, flat

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
