"""What the pages show works: Python is run, commands have their options, and output is what the program prints."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import make_blocks, make_model, write_recipe
from jinja2 import Template
from processes import run_script
from safetensors.torch import load_file

from hf_tst.cli import main as cli
from hf_tst.experiments.compare import CompareArguments, SweepArguments
from hf_tst.experiments.options import parse_experiment
from hf_tst.pretraining.options import parse_arguments
from hf_tst.records.phase_table import phase_rows
from hf_tst.records.text_tables import format_columns

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("model_cards/**/*.md")])
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Page, language and text of each block of code.
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), *block)
    for page in PAGES
    for block in FENCED.findall(page.read_text(encoding="utf-8"))
]


def blocks(*languages):
    found = [(page, text) for page, language, text in BLOCKS if language in languages]
    return [pytest.param(*block, id=f"{block[0]}-{number}") for number, block in enumerate(found)]


def commands(text):
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with what the pages name: a recipe, text, a finished run."""
    folder = tmp_path_factory.mktemp("pages")
    recipe = write_recipe(folder, 400, {}, max_steps=4, per_device_train_batch_size=2)
    shutil.copy(recipe, folder / "config.yaml")
    shutil.copy(folder / "corpus.txt", folder / "text.txt")
    assert cli.main(["train", str(recipe), "--output_dir", str(folder / "runs" / "quickstart")]) == 0
    return folder


@pytest.fixture(autouse=True)
def workplace(finished, tmp_path, monkeypatch):
    """A copy of that folder, in which the test is."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")


def given():
    """What blocks of Python take as given, as the text around them says."""
    tokens = torch.tensor([block["input_ids"] for block in make_blocks(2)])
    model = make_model("llama")
    names = {"model": model, "rows": make_blocks(2, length=72), "blocks": make_blocks(200)}
    train_step = lambda **batch: model(**batch).loss.backward()  # noqa: E731
    return names | {"tokens": tokens, "tokenizer": None, "train_step": train_step}


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_runs(page, text):
    if page.endswith("template.md"):
        text = Template(text).render(repo_id="runs/quickstart")
    exec(compile(text.replace("20_000", "6"), page, "exec"), given())


@pytest.mark.parametrize(("page", "text"), blocks("diff"))
def test_both_sides_of_a_difference_train_and_save_the_same_tensors(page, text):
    saved = []
    for side in "-+":
        script = "\n".join(line[1:] for line in text.splitlines() if line[:1] in (side, " "))
        options = f'output_dir="side{side}", use_cpu=True, report_to="none", per_device_train_batch_size=2'
        script = script.replace('output_dir="out"', options).replace("20_000", "6")
        exec(f"{script}\nassert trainer.state.global_step == 6\ntrainer.save_model()", given())
        saved.append(load_file(f"side{side}/model.safetensors").keys())
    assert saved[0] == saved[1]


@pytest.mark.parametrize(("page", "text"), blocks("bash"))
def test_commands_have_their_options(page, text, capsys):
    for words in commands(text):
        check_command(words, capsys)


def check_command(words, capsys):
    """Check a command of ours as if it ran in the current folder; nothing is trained."""
    words = [str(ROOT / word) if word.startswith("scripts/configs/") else word for word in words]
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or (ROOT / args.config_file).is_file()
        words = ["python", args.training_script, *args.training_script_args]
    match words:
        case ["hf-tst", "train", *flags] | ["python", "scripts/run_clm_tst.py", *flags]:
            parse_arguments([*flags, "--use_cpu"])
        case ["hf-tst", ("compare" | "sweep") as command, *flags]:
            kind = CompareArguments if command == "compare" else SweepArguments
            values, args = parse_experiment([*flags, "--use_cpu"], kind)
            args.select_arms(values)
        case ["hf-tst", "plan", *_]:
            assert cli.main(words[1:]) == 0
        case ["hf-tst", command, *flags]:
            with pytest.raises(SystemExit):
                cli.main([command, "--help"])
            check_flags(flags, capsys.readouterr().out)
        case ["python", "-c", code]:
            exec(code, {})
        case ["python", script, *flags] if script.endswith(".py"):
            check_flags(flags, run_script(ROOT / script, "--help").stdout)


def check_flags(flags, page):
    named = {flag for flag in flags if flag.startswith("--")}
    assert named <= set(re.findall(r"--[\w-]+", page)), page


def only_block(page, language, holding):
    (text,) = [text for p, lang, text in BLOCKS if (p, lang) == (page, language) and holding in text]
    return text


def test_the_output_of_the_quick_start_is_that_of_the_run_on_record():
    history = json.loads((ROOT / "model_cards/quickstart/trainer_state.json").read_text())["log_history"]
    loss = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
    last = f"final evaluation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}"
    shown = only_block("docs/first_run.md", "text", "final evaluation loss")
    assert shown == f"{format_columns(phase_rows(history))}\n\n{last}\n"


def test_the_plan_that_is_shown_is_what_its_command_prints(capsys):
    (command, *_) = commands(only_block("docs/plans.md", "bash", "hf-tst plan"))
    assert cli.main(command[1:]) == 0
    assert only_block("docs/plans.md", "text", "steps") in capsys.readouterr().out


def test_the_configuration_of_axolotl_is_part_of_the_example():
    example = (ROOT / "scripts/examples/axolotl.yaml").read_text(encoding="utf-8")
    assert only_block("docs/axolotl.md", "yaml", "base_model") in example
