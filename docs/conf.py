"""The manual's configuration: Sphinx, with MyST for Markdown and furo for its looks."""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import lightning_spectral

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))

project = "lightning-spectral"
author = "The lightning-spectral developers"
copyright = author  # noqa: A001
release = lightning_spectral.__version__
REPOSITORY = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Source"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "logged_keys",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_ext", "_static"]
smartquotes_action = "D"  # dashes alone: quotes belong to code
# A name in single backticks is linked where it is documented, and is code elsewhere.
default_role = "py:obj"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
copybutton_exclude = ".linenos, .gp, .go"


def _link_to_repository(app, docname, source):
    """Let links to files beside docs/ lead to the repository, where Markdown's relative links already do."""
    source[0] = re.sub(r"(?<!!)(\[[^]]*\]\()\.\./", rf"\1{REPOSITORY}/blob/main/", source[0])


def _mark_code(app, what, name, obj, options, lines):
    """Let what is in single backticks but is no name be code, as in Markdown: `a <b>` would be a link to b."""

    def marked(found):
        code = found["code"]
        return found[0] if code is None or re.fullmatch(r"[\w.]+", code) else f"``{code}``"

    text = re.sub(r"``.*?``|:[\w:]+:`[^`]+`|`(?P<code>[^`]+)`", marked, "\n".join(lines), flags=re.DOTALL)
    # Of several attributes in one entry napoleon would take all but the last for a type.
    before, heading, attributes = text.partition("Attributes:\n")
    attributes = re.sub(r"^ +\w+(?:, \w+)+: ", lambda x: x[0].replace(", ", ","), attributes, flags=re.MULTILINE)
    lines[:] = (before + heading + attributes).split("\n")


def setup(app):
    """Register what this project adds."""
    app.connect("autodoc-process-docstring", _mark_code, priority=400)
    app.connect("source-read", _link_to_repository)
