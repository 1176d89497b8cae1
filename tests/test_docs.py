"""What README and docs say of files, options and commands is so."""

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import options
import pytest
import torch
from conftest import VOCAB_SIZE, make_blocks, make_model
from safetensors.torch import load_file

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


def test_the_picture_is_whole_and_legible_on_any_page():
    root = ElementTree.parse(ROOT / "docs" / "images" / "tst.svg").getroot()
    _, _, width, height = map(float, root.get("viewBox").split())
    shapes = [shape for shape in root if shape.tag.rpartition("}")[2] in ("rect", "text")]
    background, *others = shapes
    size = {"width": f"{width:g}", "height": f"{height:g}", "fill": "#ffffff"}
    assert size.items() <= background.attrib.items()
    for shape in others:
        right = float(shape.get("x")) + float(shape.get("width", 0))
        bottom = float(shape.get("y")) + float(shape.get("height", 0))
        assert right < width
        assert bottom < height


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


def code_block(language, holding):
    """The fenced block of the README in a language that holds some text."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holding in text]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("side", ["-", "+"])
def test_the_script_before_and_after_trains(side, tmp_path):
    lines = code_block("diff", "TSTTrainer").splitlines()
    script = "\n".join(line[1:] for line in lines if line[:1] in (side, " "))
    tiny = f'output_dir="{tmp_path}", use_cpu=True, report_to="none", per_device_train_batch_size=2'
    script = script.replace('output_dir="out"', tiny).replace("20_000", "6")
    assert tiny in script
    names = {"model": make_model("llama"), "tokenizer": None, "blocks": make_blocks(200)}
    exec(script + "\ntrainer.save_model()", names)
    assert names["trainer"].state.global_step == 6
    assert set(load_file(tmp_path / "model.safetensors")) == set(make_model("llama").state_dict())


def test_the_loop_of_ones_own_has_losses_that_start_at_log_v():
    losses = []
    script = code_block("python", "DataCollatorForTokenSuperposition").replace(
        "\n# here", "\nnote(loss)\n# here"
    )
    names = {
        "model": make_model("llama"),
        "rows": make_blocks(2, length=72),
        "tokens": torch.tensor([block["input_ids"] for block in make_blocks(2)]),
        "note": lambda loss: losses.append(loss.item()),
    }
    exec(script, names)
    losses.append(names["loss"].item())
    assert losses == pytest.approx([torch.tensor(VOCAB_SIZE).log().item()] * 2, rel=0.02)
