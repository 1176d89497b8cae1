"""Command lines of the documentation, run in a tiny form. What no rule knows is an error."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from code_blocks import ROOT
from sphinx.cmd.build import get_parser
from tiny_recipes import RUN, SHAPE, shrink, shrink_overrides
from transformers import AutoModelForCausalLM

from hf_tst.cli import main as cli
from hf_tst.experiments.budget import plan_comparison
from hf_tst.experiments.compare import CompareArguments, SweepArguments
from hf_tst.experiments.options import open_experiment, parse_experiment
from hf_tst.pretraining.options import read_config

# Lines that set an environment up. `.ci/run` runs them in a fresh one; the value is how it says so: `README` stands
# for the first blocks of "Quick start" and "Tests", which it runs to the letter.
RUN_BY_CI = {
    "python3 -m venv .venv": "README",
    ". .venv/bin/activate": "README",
    "pip install -c constraints.txt -e .[plot]": "README",
    "pip install -c constraints.txt -e .[test]": "README",
    "pip install -c constraints.txt -e .[dev]": '.venv/bin/pip install --quiet -c constraints.txt -e ".[dev]"',
    "ruff format .": ".venv/bin/ruff format --check .",
    "ruff check .": ".venv/bin/ruff check .",
    "mypy": ".venv/bin/mypy",
    ".ci/run": "",  # itself
}
# Lines that would change the checkout that the tests run in, or take texts from elsewhere, and why nothing is lost.
LEFT_OUT = {
    "pre-commit install": "it writes a hook into .git; the hook calls ruff and mypy, which CI runs",
    "apt-get download dict-gcide linux-doc-6.1": "texts of Debian; the line after them finds folders with text",
    "dpkg-deb -x dict-gcide_*.deb runs/debian": "the same",
    "dpkg-deb -x linux-doc-6.1_*.deb runs/debian": "the same",
    "pip download --no-deps -d wheels liger-kernel cut-cross-entropy": "packages that run on a GPU alone",
    "pip install --no-index --no-deps --find-links wheels --target wheels/site liger-kernel cut-cross-entropy": "the same",
    "export PYTHONPATH=wheels/site": "the same",
}

# Where the tiny run differs from the run that is documented: its switch is at step 1 of 4.
IN_THE_TINY_RUN = {"out/checkpoint-6000": "out/checkpoint-1", "5999,6000": "0,1"}
SMALL_LLAMA = ",".join(
    f"{name}={SHAPE[name]}"
    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings",
    )
)  # fmt: skip


class UnknownCommandError(Exception):
    """No rule says how a command of the documentation is tested."""


def run(words: Sequence[str]) -> str:
    """Run a command in the current folder, in a tiny form, and return what it prints.

    Raises:
        UnknownCommandError: If no rule knows it.
        AssertionError: If it fails, or leaves something else than it should.
    """
    line = " ".join(words)
    if any(set(word) <= set("();<>|&") for word in words):
        raise UnknownCommandError(f"{line}: one command a line, please")
    if line in RUN_BY_CI or line in LEFT_OUT:
        return ""
    match list(words):
        case ["hf-tst", "train", *flags]:
            return train(["hf-tst", "train"], flags)
        case ["hf-tst", command, *flags] if command in HF_TST:
            return HF_TST[command](flags)
        case ["python", "scripts/run_clm_tst.py", *flags]:
            return train(["python", "scripts/run_clm_tst.py"], flags)
        case ["python", script, *flags] if script in SCRIPTS:
            return SCRIPTS[script](script, flags)
        case ["python", "-c", code]:
            return printed(lambda: exec(code, {}))
        case ["python", "-m", "pytest", *flags]:
            return pytest_flags(flags)
        case ["accelerate", "launch", *flags]:
            return launch(flags)
        case ["sphinx-build", *flags]:  # tests/test_docs.py builds the site
            args = get_parser().parse_args(flags)
            assert (ROOT / args.sourcedir / "conf.py").is_file()
            return ""
        case ["cp", source, target]:
            return shutil.copy(source, target)
    raise UnknownCommandError(f"{line}: say in tests/documented_commands.py how it is tested")


def printed(function: Callable[[], Any]) -> str:
    """What a function prints; it may end with `sys.exit(0)`."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = function()
        except SystemExit as end:
            status = end.code
    assert not isinstance(status, (int, str)) or status == 0, f"{status}\n{err.getvalue()[-2000:]}"
    return out.getvalue()


def hf_tst(*arguments: str) -> str:
    return printed(lambda: cli.main(list(arguments)))


def script(path: str, flags: Sequence[str]) -> str:
    def call() -> None:
        before, sys.argv = sys.argv, [path, *flags]
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        finally:
            sys.argv = before

    return printed(call)


def tiny(flags: Sequence[str]) -> list[str]:
    """Flags of training for a tiny run: the file of arguments, if it is the repository's, made small; flags that win."""
    flags = list(flags)
    small = [word for name, value in RUN.items() for word in (f"--{name}", str(value))]
    if "--lr_scheduler_kwargs" in flags:  # of which the decay is as long as thousands of steps need it
        small += ["--lr_scheduler_kwargs", '{"num_decay_steps": 1}']
    if flags and flags[0].endswith(".yaml"):
        if (ROOT / flags[0]).is_file():
            values = yaml.safe_load((ROOT / flags[0]).read_text(encoding="utf-8"))
            flags[0] = Path(flags[0]).name
            Path(flags[0]).write_text(yaml.safe_dump(shrink(values)), encoding="utf-8")
    else:
        small += ["--config_overrides", SMALL_LLAMA]
    return [*flags, *small]


def train(command: list[str], flags: Sequence[str]) -> str:
    argv = tiny(flags)
    out = hf_tst("train", *argv) if command[0] == "hf-tst" else script(command[1], argv)
    if "--output_dir" in argv:
        output = Path(argv[argv.index("--output_dir") + 1])
    else:
        file = read_config(argv[0]) if argv[0].endswith(".yaml") else {}
        output = Path(file.get("output_dir", "runs/quickstart"))
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == RUN["max_steps"]
    AutoModelForCausalLM.from_pretrained(output)
    assert "final evaluation loss" in out
    return out


def plan(flags: Sequence[str]) -> str:
    return hf_tst("plan", *flags)  # as it is: nothing is trained or downloaded


def compare(flags: Sequence[str]) -> str:
    """All runs are planned, and one seed and learning rate of them done."""
    argv = tiny(flags)
    if any("mtp" in flag for flag in flags):  # in so few steps, arms with extra heads are not equal in FLOPs
        argv += ["--budget", "data"]
    values, args = parse_experiment(argv, CompareArguments)
    runs = plan_comparison(open_experiment(values, args))
    rates = (args.learning_rates or "1").split(",")
    arms = {run.arm.name for run in runs}
    assert len(runs) == len(arms) * len(args.seeds.split(",")) * len(rates)
    first = ["--seeds", args.seeds.split(",")[0]] + (
        ["--learning_rates", rates[0]] if args.learning_rates else []
    )
    out = hf_tst("compare", *argv, *first, "--processes", "1")  # runs are in this process
    assert [line.split()[0] for line in out.splitlines() if line.startswith(tuple(arms))]
    assert "comparison.html" in out
    return out


def sweep(flags: Sequence[str]) -> str:
    """All runs are planned, and one bag size and ratio of them done."""
    argv = tiny(flags)
    values, args = parse_experiment(argv, SweepArguments)
    plan_comparison(open_experiment(values, args))
    one_cell = ["--bag_sizes", args.bag_sizes.split(",")[0], "--phase_ratios", "0.5"]
    out = hf_tst("sweep", *argv, *one_cell, "--processes", "1")
    assert "Lowest:" in out
    return out


def card(flags: Sequence[str]) -> str:
    out = hf_tst("card", *flags)
    assert Path(out.strip()).is_file()
    return out


def gpu_evidence(path: str, flags: Sequence[str]) -> str:
    """Without the time for a step; tests/test_gpu_evidence.py runs every step."""
    shown = script(path, [*flags, "--seconds", "0"])
    assert shown.count("not reached, 0 s") >= 5
    return shown


def pytest_flags(flags: Sequence[str]) -> str:
    """Pytest reads the flags, where there are no tests, and the paths exist."""
    for flag in flags:
        assert not flag.startswith("tests") or (ROOT / flag.split("::")[0]).exists(), flag
    command = [sys.executable, "-m", "pytest", *flags, "--markers"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout


def launch(flags: Sequence[str]) -> str:
    """The flags are those of `accelerate launch`; what it starts is run by itself."""
    args = launch_command_parser().parse_args(list(flags))
    if args.config_file:
        load_config_from_file(str(ROOT / args.config_file))
    return run(["python", args.training_script, *args.training_script_args])


def audit(path: str, flags: Sequence[str]) -> str:
    out = script(path, [IN_THE_TINY_RUN.get(flag, flag) for flag in flags])
    steps = flags[list(flags).index("--steps") + 1].split(",")
    records = [json.loads(line) for line in out.splitlines() if line.startswith('{"step"')]
    assert len(records) == len(steps)
    if len(records) == 2:  # around the switch
        assert [record["phase"] for record in records] == ["superposition", "recovery"]
    return out


def benchmark_step(path: str, flags: Sequence[str]) -> str:
    flags = list(flags)
    place = flags.index("--config_overrides") + 1
    pairs = dict(pair.split("=") for pair in flags[place].split(","))
    flags[place] = ",".join(f"{name}={value}" for name, value in shrink_overrides(pairs).items())
    small = ["--device", "cpu", "--batch_size", "1", "--length", "8", "--bag_sizes", "4", "--rounds", "1"]
    out = script(path, [*flags, *small])
    assert "superposition" in out
    return out


def local_corpus(path: str, flags: Sequence[str]) -> str:
    """Folders that are named hold texts, as many as evaluation can have one in twenty of."""
    flags = list(flags)
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines(keepends=True)
    if "--folders" in flags:
        for number, folder in enumerate(flags[flags.index("--folders") + 1 :]):
            Path(folder).mkdir(parents=True, exist_ok=True)
            for start in range(40):
                text = "".join(lines[start::40])
                Path(folder, f"{start}.md").write_text(f"{number}\n{text}", encoding="utf-8")
    small = ["--max_bytes", "200000", "--tokenizer_bytes", "50000", "--vocab_size", "400"]
    out = script(path, [*flags, *small])
    corpus = Path(flags[flags.index("--output_dir") + 1], "corpus.jsonl")
    assert corpus.stat().st_size > (10_000 if "--folders" in flags else 100_000)
    return out


HF_TST: dict[str, Callable[[Sequence[str]], str]] = {
    "plan": plan, "compare": compare, "sweep": sweep, "card": card,
}  # fmt: skip
SCRIPTS: dict[str, Callable[[str, Sequence[str]], str]] = {
    "scripts/audit.py": audit,
    "scripts/benchmark_step.py": benchmark_step,
    "scripts/gpu_evidence.py": gpu_evidence,
    "scripts/local_corpus.py": local_corpus,
}
