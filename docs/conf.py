"""How Sphinx builds this folder: `sphinx-build -W docs docs/_build/html`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from hf_tst import __version__

project = "hf_tst"
author = "the authors of hf_tst"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"hf_tst {release}"

myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebooks

# Docstrings are written as those of Transformers: Markdown's code spans, and [`name`] for links.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings tell types
napoleon_custom_sections = ["Overrides"]

ROOT = Path(__file__).parent.parent
# Files of the repository that are pages here, as a page of this folder includes them.
PAGES = {"README.md": "readme", "CONTRIBUTING.md": "contributing"}


class RepositoryLinks(SphinxTransform):
    """Links to the repository's files outside this folder lead to the page that has the file, or to a copy of it."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(addnodes.pending_xref)):
            if node["reftype"] != "myst":
                continue
            path = self._path(node)
            if path is None:
                continue
            if (page := PAGES.get(path.relative_to(ROOT).as_posix())) is not None:
                node["refdomain"], node["reftarget"] = "doc", page
                node["reftargetid"] = node.get("reftargetid")
            elif not path.is_relative_to(self.env.srcdir):
                target = os.path.relpath(path, (self.env.srcdir / self.env.docname).parent)
                copy = addnodes.download_reference(
                    "", "", *node.children, reftarget=target, refdoc=self.env.docname
                )
                copy.source, copy.line = node.source, node.line
                node.replace_self(copy)

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


def setup(app: Sphinx) -> None:
    app.add_transform(RepositoryLinks)
    app.connect("autodoc-process-docstring", link_names, priority=400)  # before napoleon
