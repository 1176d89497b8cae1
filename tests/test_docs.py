"""What README and docs say of files, options and commands is so."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mutations
import options
import pytest
from bs4 import BeautifulSoup
from conftest import BLOCK_LENGTH, make_blocks, make_model
from test_code_blocks import BLOCKS

import hf_tst
from hf_tst import TSTTrainer, TSTTrainingArguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Of a checkpoint of the plain Trainer.
ORDINARY_FILES = {"config.json", "generation_config.json", "model.safetensors", "trainer_state.json"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_page_of_options_is_that_of_the_arguments():
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == options.render(), (
        "run scripts/options.py"
    )


@pytest.mark.parametrize(
    "mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.subject.replace(" ", "-")
)
def test_the_table_of_mutations_is_about_lines_that_are_there(mutation):
    module = (ROOT / "hf_tst" / mutation.file).read_text(encoding="utf-8")
    assert module.count(mutation.line) == 1
    assert mutations.files_of(mutation)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_folders_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/.])(?:scripts|tests|hf_tst)/(?:[\w./-]+\.(?:py|yaml)|[\w/]+/)", text):
        assert (ROOT / path).exists(), path


def test_code_fits_the_page():
    for page, language, text in BLOCKS:
        if language in ("bash", "python", "diff") and not page.startswith("model_cards"):
            assert max(map(len, text.splitlines())) <= 85, page


def test_everything_that_is_logged_or_saved_is_on_its_page(make_args):
    page = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
    model = make_model("mixtral", output_router_logits=True)
    args = make_args(
        tst_document_boundaries="respect",
        tst_nonfinite_loss="skip",
        tst_peak_tflops=1,
        mtp_num_heads=2,
        save_steps=5,
        save_strategy="steps",
    )
    blocks = [block | {"document_ids": [0] * 4 + [1] * (BLOCK_LENGTH - 4)} for block in make_blocks(200)]
    trainer = TSTTrainer(model, args, train_dataset=blocks)
    trainer.skipped_steps = 1  # as if there had been one
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry if re.match("tst_|mtp_", name)}
    files = {path.name for path in Path(args.output_dir, "checkpoint-10").iterdir()}
    ours = {name for name in files if name.endswith((".json", ".safetensors"))} - ORDINARY_FILES
    assert {"tst_expert_load_max", "mtp_loss", "tst_tokens_left_out", "tst_model_flops_utilization"} <= names
    for name in names | ours:
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_are_named_exist(page):
    names = {field.name for field in dataclasses.fields(TSTTrainingArguments)}
    logged = set(
        re.findall(r'"(tst_\w+|mtp_\w+)"', "".join(p.read_text() for p in (ROOT / "hf_tst").rglob("*.py")))
    )
    for name in re.findall(r"`-{0,2}((?:tst|mtp)_\w+)[`=]", page.read_text(encoding="utf-8")):
        assert name in names | logged, name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as `sphinx-build -W` makes them, by path from the site's root."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-d", folder / "doctrees"]
    command = [sys.executable, "-m", "sphinx", *options, "docs", folder / "html"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pages = (folder / "html").rglob("*.html")
    return {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in pages}


def test_the_site_has_every_page_and_every_public_name(site):
    folder = next(path.parent for path in site if path.name == "index.html" and path.parent.name == "html")
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]:
        if "_build" not in page.parts:
            assert folder / page.relative_to(ROOT / "docs").with_suffix(".html") in site, page
    documented = {tag["id"] for tag in site[folder / "api.html"].find_all(id=re.compile(r"^hf_tst\.\w+$"))}
    assert documented == {f"hf_tst.{name}" for name in hf_tst.__all__}
    front = site[folder / "index.html"].find("article")
    assert front.find("h1").text.startswith("hf_tst")
    assert front.find("img")
    assert front.find(class_="highlight-python")
    records = {path.name for path in (ROOT / "model_cards" / "comparisons").iterdir()}
    for record in records:  # each with its picture
        assert site[folder / "comparisons" / f"{record}.html"].find("article").find("img"), record


def test_links_of_the_site_lead_somewhere(site):
    seen = 0
    for page, content in site.items():
        for link in content.select("article a[href]"):
            url = urlsplit(link["href"])
            if url.scheme or not (url.path or url.fragment):
                continue
            assert not url.path.endswith((".yaml", ".md")), f"{page.name}: {link['href']} is a download"
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            assert target.is_file(), f"{page.name}: {link['href']}"
            if url.fragment and target in site:
                assert site[target].find(id=unquote(url.fragment)), f"{page.name}: {link['href']}"
            seen += 1
    assert seen > 100


def test_docstrings_are_rendered(site):
    (page,) = [content.find("article") for path, content in site.items() if path.name == "api.html"]
    assert not re.findall(r"\[`|`\]|:py:|\*optional\*|\|---", page.text)
