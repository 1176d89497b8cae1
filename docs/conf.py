"""How Sphinx builds this folder: `sphinx-build -W docs docs/_build/html`."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from hf_tst import __version__

project = "hf_tst"
author = "the authors of hf_tst"
project_copyright = f"2026, {author}"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hf_tst {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
pygments_style = "friendly"  # a diff has red and green lines
pygments_dark_style = "github-dark"

ROOT = Path(__file__).parent.parent
# The address of the repository: pyproject.toml is the only place that has it.
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
if REPOSITORY := URLS.get("Repository", "").rstrip("/"):
    html_theme_options = {
        "source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/",
    }  # fmt: skip

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"
nb_execution_mode = "off"  # a test runs the notebooks

# Docstrings are written as those of Transformers: Markdown's code spans, and [`name`] for links.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings tell types
napoleon_custom_sections = ["Overrides"]

RECORDS = {path.parent.name: path for path in (ROOT / "model_cards" / "comparisons").glob("*/*.md")}
CONFIGS = {path.stem: path for path in (ROOT / "scripts" / "configs" / "comparisons").glob("*.yaml")}
# The page, and the section, that shows a file of the repository. Other files of the repository are downloads.
PAGES = {
    ROOT / "README.md": "index",
    ROOT / "CONTRIBUTING.md": "contributing",
    ROOT / "LICENSE": "license",
    **{path: f"comparisons/{name}" for name, path in RECORDS.items()},
    **{path: f"comparisons/{name}#configuration" for name, path in CONFIGS.items()},
}
RECORD = """
```{{include}} {path}
:heading-offset: 1
:relative-images:
```
"""
CONFIG = """
## Configuration

```{{literalinclude}} {path}
:language: yaml
:caption: {caption}
```
"""


class RepositoryLinks(SphinxTransform):
    """Links to the repository's files outside this folder lead to the page that shows the file, or download it."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        kinds = (addnodes.pending_xref, addnodes.download_reference)
        for node in [node for kind in kinds for node in self.document.findall(kind)]:
            path = self._path(node) if node.get("reftype") == "myst" else None
            if path is None:
                continue
            link: nodes.Element
            if path in PAGES:
                page, _, section = PAGES[path].partition("#")
                target = {"reftarget": page, "reftargetid": section or node.get("reftargetid")}
                link = addnodes.pending_xref(refdomain="doc", reftype="myst", refexplicit=True, **target)
            elif not path.is_relative_to(self.env.srcdir):
                target = os.path.relpath(path, (self.env.srcdir / self.env.docname).parent)
                link = addnodes.download_reference(reftarget=target)
            else:
                continue
            link["refdoc"] = self.env.docname
            link.source, link.line = node.source, node.line
            link += node.children
            node.replace_self(link)

    def _path(self, node: nodes.Element) -> Path | None:
        """The file of the repository that a link of Markdown names, from where the Markdown is."""
        target = node["reftarget"].partition("#")[0]
        if not target:
            return None
        if node["refdomain"] == "doc":  # without its suffix, and from this folder
            path = (Path(self.env.srcdir) / f"{target}.md").resolve()
        else:
            path = (Path(node.source or self.document["source"]).parent / target).resolve()
        return path if path.is_file() and path.is_relative_to(ROOT) else None


def link_names(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """[`name`] and [`~package.name`], Transformers' links in docstrings, as Sphinx writes them."""
    lines[:] = [re.sub(r"\[`(~?[\w.]+)`\]", r":py:obj:`\1`", line) for line in lines]


def write_record_pages(app: Sphinx) -> None:
    """A page for each comparison in docs/comparisons, which git ignores: its record, if there is one, and its configuration."""
    folder = Path(app.srcdir) / "comparisons"
    folder.mkdir(exist_ok=True)
    names = sorted(RECORDS.keys() | CONFIGS.keys())
    for page in folder.glob("*.md"):
        if page.stem not in names:  # from an earlier state of the repository
            page.unlink()
    for name in names:
        page = folder / f"{name}.md"
        text = f"# {name}\n\n[All results](../results.md)\n"
        if name in RECORDS:
            text += RECORD.format(path=os.path.relpath(RECORDS[name], folder))
        if name in CONFIGS:
            path = CONFIGS[name]
            text += CONFIG.format(path=os.path.relpath(path, folder), caption=path.relative_to(ROOT))
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def add_badge(app: Sphinx, name: str, source: list[str]) -> None:
    """A link that opens a notebook elsewhere, below its title, once the repository has an address on GitHub."""
    if name == "notebooks/token_superposition" and REPOSITORY.startswith("https://github.com/"):
        place = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/docs/{name}.ipynb"
        badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{place})"
        notebook = json.loads(source[0])
        notebook["cells"][0]["source"].insert(1, f"\n{badge}\n")
        source[0] = json.dumps(notebook)


def setup(app: Sphinx) -> None:
    app.add_transform(RepositoryLinks)
    app.connect("builder-inited", write_record_pages)
    app.connect("source-read", add_badge)
    app.connect("autodoc-process-docstring", link_names, priority=400)  # before napoleon
