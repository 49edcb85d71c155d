"""The directive `logged-keys`: a table of every logged key, written from the code's own tables."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lightning_spectral.options import OPTION_OF_PART
from lightning_spectral.records import log_keys
from lightning_spectral.records.log_keys import (
    ALPHA_KEY,
    LAYER_KEYS,
    PROBE_KEYS,
    REPORT_KEYS,
    STEP_CURVATURE,
    STEP_KEYS,
)


def table() -> str:
    """Return the keys as a Markdown table: key, meaning, whether its median is logged, and the option it needs."""
    rows = [
        (f"spectral/{key.name}/<layer>", key.meaning, key.median, f"`{OPTION_OF_PART[key.part]}`" if key.part else "")
        for key in LAYER_KEYS
    ]
    rows += [(f"spectral/{name}", meaning, False, "") for name, meaning in (REPORT_KEYS | PROBE_KEYS).items()]
    rows += [(f"spectral/{name}", meaning, False, "`step`") for name, meaning in STEP_KEYS.items()]
    rows.append((f"spectral/{STEP_CURVATURE.name}/<layer>", STEP_CURVATURE.meaning, False, "`step`"))
    rows.append((ALPHA_KEY, "exponent that SpectralNewton steps with", False, '`alpha="probe"`'))
    lines = [f"| `{key}` | {text} | {'yes' if median else ''} | {option} |" for key, text, median, option in rows]
    return "\n".join(["| key | meaning | median | needs |", "|---|---|---|---|", *lines])


class LoggedKeys(SphinxDirective):
    """Insert the table where the directive stands."""

    def run(self) -> list[nodes.Node]:
        """Return the table's nodes; the page is written anew when the keys or this file change."""
        for source in (log_keys.__file__, __file__):
            self.env.note_dependency(source)
        return self.parse_text_to_nodes(table())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("logged-keys", LoggedKeys)
    return {"parallel_read_safe": True}
