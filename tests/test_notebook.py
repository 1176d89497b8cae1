"""The notebook runs from top to bottom, and what it says and stores is so."""

import json
import math
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from versions import fails_before

from hf_tst import PhaseSchedule

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "token_superposition.ipynb"
ROWS, BLOCK_SIZE = 16, 64


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def facts_of(notebook):
    """What the last cell prints."""
    return json.loads("".join(output.text for output in code_cells(notebook)[-1].outputs))


def kinds_of_outputs(notebook):
    """Of each code cell, what it shows; what a machine warns of, such as its new font cache, is left out."""
    kinds = []
    for cell in code_cells(notebook):
        shown = [output for output in cell.outputs if output.get("name") != "stderr"]
        pictures = ["picture" for output in shown if "image/png" in output.get("data", {})]
        # How many pieces a text comes in is nothing to a reader.
        kinds.append(
            sorted({output.get("name", output.output_type) for output in shown} - {"display_data"}) + pictures
        )
    return kinds


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    nbformat.write(notebook, folder / NOTEBOOK.name)
    return nbformat.read(folder / NOTEBOOK.name, as_version=4)


def check_facts(facts):
    schedule = PhaseSchedule(facts["steps"], 0.3, facts["bag_size"])
    assert facts["start_losses"] == pytest.approx([math.log(facts["vocabulary"])] * 4, rel=0.03)
    assert facts["bag_loss"] == pytest.approx(facts["loop_loss"], abs=1e-5)
    assert facts["switch_step"] == schedule.switch_step
    assert facts["raw_tokens"] == schedule.amount_read(facts["steps"], ROWS * BLOCK_SIZE)
    assert facts["latent_tokens"] == facts["steps"] * ROWS * BLOCK_SIZE
    assert facts["generated_tokens"] == 40
    for name in ("tst_eval", "baseline_eval"):
        curve = facts[name]
        assert len(curve) == 21
        assert all(map(math.isfinite, curve))
        assert curve[0] == pytest.approx(math.log(facts["vocabulary"]), rel=0.03)
        assert curve[-1] < curve[0] - 1.5
    # What the text says of the curves.
    at_switch = facts["switch_step"] * 20 // facts["steps"]
    assert facts["tst_eval"][at_switch] > facts["baseline_eval"][at_switch]
    assert facts["tst_eval"][-1] < facts["tst_eval"][at_switch] - 0.3
    assert facts["tst_eval"][-1] > facts["baseline_eval"][-1]


def test_it_runs_and_computes_what_it_says(executed):
    check_facts(facts_of(executed))


@fails_before("matplotlib", "3.11", "a cell that ends in a figure stores no picture")
def test_what_is_stored_is_what_it_gives(executed, committed):
    assert [cell.source for cell in code_cells(committed)] == [cell.source for cell in code_cells(executed)]
    assert [cell.execution_count for cell in code_cells(committed)] == [
        *range(1, len(code_cells(committed)) + 1)
    ]
    assert kinds_of_outputs(committed) == kinds_of_outputs(executed)
    check_facts(facts_of(committed))
    names = ("vocabulary", "steps", "bag_size", "switch_step", "raw_tokens", "latent_tokens")
    stored, given = facts_of(committed), facts_of(executed)
    assert [stored[name] for name in names] == [given[name] for name in names]


def test_what_is_stored_has_no_warnings_or_paths(committed):
    for cell in code_cells(committed):
        for output in cell.outputs:
            text = output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
            assert output.get("name") != "stderr", text
            assert not re.search(r"[Ww]arning|/(?:home|root|tmp|usr)/|site-packages", text)


def test_its_links_lead_somewhere(committed):
    text = "".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("http")]
    assert targets
    assert all((NOTEBOOK.parent / target).exists() for target in targets)
