"""The manual's table of faults: each row names tests that there are, and their number is told."""

import re

from manual import PAGES, ROOT


def test_every_fault_of_the_table_has_a_test():
    (table,) = re.findall(r"<!-- faults -->\n(.*?)<!-- end of faults -->", PAGES["faults.md"], re.DOTALL)
    rows = [line.split(" | ")[-1] for line in table.splitlines()[2:]]
    written = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names or "the same" in row, row
        assert all(written.count(f"\ndef {name}(") == 1 for name in names), row
    assert f"these {len(rows)} faults" in PAGES["faults.md"]
