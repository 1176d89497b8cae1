"""Every fenced block of README, CONTRIBUTING, docs/ and model_cards/ is run, parsed or compared with what is so."""

import json
import math
import re
import shutil
from pathlib import Path

import documented_commands
import pytest
import torch
import yaml
from code_blocks import PAGES, ROOT, all_blocks, blocks_of, commands_of, find_block
from conftest import VOCAB_SIZE, make_blocks, make_model, write_corpus
from documented_commands import UnknownCommandError
from jinja2 import Template
from safetensors.torch import load_file
from tiny_recipes import RUN, SHAPE

from hf_tst.pretraining import pretrain
from hf_tst.pretraining.options import parse_arguments
from hf_tst.records.report import format_columns, phase_rows

BLOCKS = all_blocks()
LLAMA_SIZES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "vocab_size",
}  # fmt: skip


class UnknownBlockError(Exception):
    """No rule says how a block of the documentation is tested."""


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with what the documentation names: text, a tokenizer, recipes, a finished run."""
    folder = tmp_path_factory.mktemp("documented")
    write_corpus(folder)
    (folder / "corpus.txt").rename(folder / "text.txt")
    values = RUN | {
        "train_file": "text.txt", "tokenizer_name": "tokenizer", "model_type": "llama", "report_to": "none",
        "output_dir": "runs/quickstart", "config_overrides": {name: SHAPE[name] for name in LLAMA_SIZES},
    }  # fmt: skip
    for name in ("config", "recipe"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain.main(["recipe.yaml"])
    shutil.copytree(folder / "runs" / "quickstart", folder / "quickstart")
    return folder


@pytest.fixture
def workplace(finished, tmp_path, monkeypatch):
    """A copy of that folder, in which the test is."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")


def check_block(block):
    """Test a block by its language.

    Raises:
        UnknownBlockError, UnknownCommandError: If no rule knows it.
    """
    if block.language in CHECKS:
        CHECKS[block.language](block)
    elif re.match(r"\{[\w-]+\}", block.language) and block.page.startswith("docs/"):
        pass  # a directive of Sphinx: tests/test_docs.py builds the site
    else:
        raise UnknownBlockError(f"{block}: a block of {block.language!r} is tested nowhere")


def check_bash(block):
    commands = commands_of(block.text)
    assert commands
    for words in commands:
        documented_commands.check(words)


def check_python(block):
    text = block.text
    if block.page.endswith("template.md"):
        text = Template(text).render(repo_id="quickstart")
    exec(compile(text, str(block), "exec"), names_of_python())


def names_of_python():
    """What blocks of Python take as given, as the text around them says."""
    return {
        "model": make_model("llama"),
        "rows": make_blocks(2, length=72),
        "blocks": make_blocks(200),
        "tokens": torch.tensor([block["input_ids"] for block in make_blocks(2)]),
        "tokenizer": None,
    }


def check_diff(block):
    for side in "-+":
        names = run_side(block, side, Path(f"side{side}"))
        assert names["trainer"].state.global_step == 6


def run_side(block, side, output):
    """Run one side of a difference as a script, with 6 steps on the CPU."""
    script = "\n".join(line[1:] for line in block.text.splitlines() if line[:1] in (side, " "))
    tiny = f'output_dir="{output}", use_cpu=True, report_to="none", per_device_train_batch_size=2'
    script = script.replace('output_dir="out"', tiny).replace("20_000", "6")
    assert tiny in script
    names = names_of_python()
    exec(script + "\ntrainer.save_model()", names)
    assert set(load_file(output / "model.safetensors")) == set(make_model("llama").state_dict())
    return names


def check_arguments(block):
    """A file of arguments, as `hf-tst train` reads it."""
    Path("block.yaml").write_text(block.text, encoding="utf-8")
    parse_arguments(["block.yaml", "--use_cpu", "True"])


def check_citation(block):
    (entry,) = re.findall(r"@article\{[\s\S]*\}", block.text)
    assert entry == re.search(r"@article\{[\s\S]*?\n\}", (ROOT / "model_cards/template.md").read_text())[0]
    assert "2605.06546" in entry


def check_output(block):
    """Text that a program wrote, or that names files."""
    if block.text.startswith("hf_tst/"):
        check_map(block)
    elif block.page == "docs/first_run.md":
        check_output_of_the_quick_start(block)
    elif block.page == "docs/plans.md":
        (words, *_) = commands_of(find_block(block.page, "bash", "hf-tst plan").text)
        assert block.text in documented_commands.run_plan(words[2:])
    else:
        raise UnknownBlockError(f"{block}: say here what wrote this text")


def check_map(block):
    """A file or folder a line, and in words also names of files, which exist."""
    for line in block.text.splitlines():
        assert list(ROOT.glob(line.split()[0])), line
        for name in re.findall(r"\w+\.py", line):
            assert list(ROOT.glob(f"*/{name}")), line


def check_output_of_the_quick_start(block):
    history = json.loads((ROOT / "model_cards/quickstart/trainer_state.json").read_text())["log_history"]
    loss = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    last = f"final evaluation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}"
    assert block.text == f"{format_columns(phase_rows(history))}\n\n{last}\n"


CHECKS = {
    "bash": check_bash,
    "python": check_python,
    "diff": check_diff,
    "yaml": check_arguments,
    "json": check_arguments,
    "bibtex": check_citation,
    "text": check_output,
}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_does_what_it_says(block, workplace):
    check_block(block)


def test_the_loop_of_ones_own_has_losses_that_start_at_log_v():
    block = find_block("docs/migration.md", "python", "DataCollatorForTokenSuperposition")
    losses = []
    names = names_of_python() | {"note": lambda loss: losses.append(loss.item())}
    exec(block.text.replace("\n# here", "\nnote(loss)\n# here"), names)
    losses.append(names["loss"].item())
    assert losses == pytest.approx([math.log(VOCAB_SIZE)] * 2, rel=0.02)


def test_all_pages_are_looked_at():
    pages = {path.relative_to(ROOT).as_posix() for path in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "docs/plans.md", "model_cards/template.md"} <= pages
    for path in PAGES:
        fences = re.findall(r"^\s*```", path.read_text(encoding="utf-8"), re.MULTILINE)
        found = [block for block in BLOCKS if block.page == path.relative_to(ROOT).as_posix()]
        assert len(fences) == 2 * len(found), path


@pytest.mark.parametrize(
    "text",
    [
        "```\nno language\n```",
        "```rust\nfn main() {}\n```",
        "    indented\n",
        "```text\nwritten by nobody knows what\n```",
        "```{toctree}\nindex\n```",  # outside docs/
        "```bash\nmake docs\n```",
        "```bash\npython scripts/unheard_of.py\n```",
        "```bash\nhf-tst plan recipe.yaml | head\n```",
    ],
)
def test_what_no_rule_knows_is_an_error(text, workplace):
    (block,) = blocks_of(text)
    with pytest.raises((UnknownBlockError, UnknownCommandError)):
        check_block(block)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nhf-tst train recipe.yaml --tst_bagsize 4\n```",
        "```bash\nhf-tst plan recipe.yaml --gpus b200\n```",
        "```bash\nhf-tst compare recipe.yaml --armz tst\n```",
        "```bash\nhf-tst compare recipe.yaml --learning_rates 1e-3,fast\n```",
        "```bash\nhf-tst sweep recipe.yaml --bag_sizes 1,2\n```",
        "```bash\nhf-tst card out --licence mit\n```",
        "```bash\nhf-tst train missing.yaml\n```",
        "```bash\npython scripts/audit.py --num_blocks 4000 --worldsize 2 --steps 0\n```",
        "```bash\naccelerate launch --num_process_of_mine 8 scripts/run_clm_tst.py config.yaml\n```",
        "```bash\naccelerate launch scripts/run_clm_tst.py config.yaml --block_sizes 3\n```",
        "```bash\npython -m pytest --no-such-flag\n```",
        "```bash\nsphinx-build --no-such-flag docs out\n```",
        "```python\nmodel.forward_all()\n```",
        "```yaml\ntst_bagsize: 4\n```",
        '```json\n{"tst_phase_ratio": 2}\n```',
    ],
)
def test_a_block_that_is_wrong_is_an_error(text, workplace):
    (block,) = blocks_of(text)
    with pytest.raises((AssertionError, ValueError, AttributeError, SystemExit)):
        check_block(block)


def test_ci_runs_the_blocks_that_set_up():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert {'run_block "Quick start"', 'run_block "Tests"'} <= set(script.splitlines())


def test_commands_are_split_as_a_shell_splits_them():
    text = "a --b \\\n  c 'd e'  # note\n\n# all of it\nf 'g|h' | i\n"
    assert commands_of(text) == [["a", "--b", "c", "d e"], ["f", "g|h", "|", "i"]]
