"""What README and docs say of files, options and commands is so."""

import dataclasses
import re
from pathlib import Path

import options
import pytest

from hf_tst import TSTTrainingArguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_options_is_that_of_the_arguments():
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == options.render(), (
        "run scripts/options.py"
    )


def test_the_readme_is_short():
    assert len(README.splitlines()) < 300


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?:scripts|tests|hf_tst)/[\w./-]+\.(?:py|yaml)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_are_named_exist(page):
    names = {field.name for field in dataclasses.fields(TSTTrainingArguments)}
    logged = set(
        re.findall(r'"(tst_\w+|mtp_\w+)"', "".join(p.read_text() for p in (ROOT / "hf_tst").glob("*.py")))
    )
    for name in re.findall(r"`-{0,2}((?:tst|mtp)_\w+)[`=]", page.read_text(encoding="utf-8")):
        assert name in names | logged, name


def test_the_map_has_every_module_and_nothing_else():
    page = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^hf_tst/(\w+)\.py", page, re.MULTILINE))
    assert named == {path.stem for path in (ROOT / "hf_tst").glob("*.py")} - {"__init__"}
