"""The console command: what it teaches, how it ends, and that its commands are the scripts' functions."""

import json
import re
import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest
from conftest import write_recipe
from huggingface_hub import ModelCard
from processes import PATIENCE, run_script
from transformers import AutoModelForCausalLM

from hf_tst import PreemptedError, RunError
from hf_tst.checkpoints.folders import last_complete_checkpoint
from hf_tst.cli import main as cli
from hf_tst.pretraining import pretrain


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(
        tmp_path_factory.mktemp("cli"), 400, {"vocab_size": 512}, max_steps=6, per_device_train_batch_size=2, logging_steps=1,
        disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(recipe):
    assert cli.main(["train", str(recipe)]) == 0
    return recipe.parent / "run"


def test_help_teaches_and_loads_nothing():
    code = "import sys\nfrom hf_tst.cli import main as cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "0 False"
    for word in (
        "train",
        "plan",
        "compare",
        "sweep",
        "card",
        "examples:",
        "Exit status",
        "hf-tst plan recipe.yaml --gpu h100",
    ):
        assert word in result.stdout


def test_the_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="hf-tst")
    assert script.value == "hf_tst.cli.main:main"


def test_no_command_and_unknown_commands_are_bad_input(capsys):
    assert cli.main([]) == 2
    assert "examples:" in capsys.readouterr().err
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "hf-tst: There is no command 'trian': did you mean 'train'?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "sweep" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("train", "--tst_bag_size"),
        ("plan", "--mfu"),
        ("compare", "--budget"),
        ("sweep", "--phase_ratios"),
        ("card", "--license"),
    ],
)
def test_help_of_a_command(capsys, command, flag):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert flag in out
    assert f"hf-tst {command}" in out


def test_train_makes_an_ordinary_model(trained):
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert model.config.vocab_size == 512
    assert model.config.head_dim == 8
    assert not [name for name in json.loads((trained / "config.json").read_text()) if "tst" in name]


def test_the_card_is_written_again_from_the_record(trained, capsys):
    path = trained / "README.md"
    first = ModelCard.load(path)
    path.unlink()
    (trained / "loss_curve.png").unlink()
    flags = ["--license", "mit", "--datasets", "some/data", "--language", "en", "--repo_id", "someone/model"]
    assert cli.main(["card", str(trained), *flags]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    again = ModelCard.load(path)
    expected = first.text.replace("# run", "# model").replace(f'"{trained}"', '"someone/model"')
    expected = expected.replace("text, from a data set without a Hub id", "some/data")
    assert again.text.splitlines()[:-1] == expected.splitlines()[:-1]  # the last one has a hash of the others
    assert (again.data.license, again.data.datasets, again.data.language) == ("mit", ["some/data"], ["en"])
    assert [result.metric_value for result in again.data.eval_results] == [
        result.metric_value for result in first.data.eval_results
    ]
    assert (trained / "loss_curve.png").is_file()


def test_the_card_tells_what_the_run_had_not_what_is_here(trained, tmp_path, capsys):
    state = json.loads((trained / "trainer_state.json").read_text())
    (entry,) = state["stateful_callbacks"]["TSTTrainer"]
    assert entry["tst_run"]["switch_step"] == 2
    assert not [value for value in entry["tst_run"]["arguments"].values() if str(trained) in str(value)]
    elsewhere = json.loads(json.dumps(entry))
    elsewhere["tst_run"] |= {"hardware": "8 x Abacus", "software": "torch 99"}
    state["stateful_callbacks"]["TSTTrainer"].append(elsewhere)  # as if resumed there
    state["global_step"] = 5  # and stopped
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert cli.main(["card", str(tmp_path)]) == 0
    text = ModelCard.load(tmp_path / "README.md").text
    assert "CPU; then 8 x Abacus" in text
    assert "; then torch 99" in text
    assert "The run is not finished**: this is the model after 5 of 6 optimizer steps" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "name the output folder of a finished run"),
        ("[]", "cannot be used"),
        ("nonsense", "cannot be used"),
        ('{"log_history": [{"step": 1, "loss": 2.0}]}', "no record of a TSTTrainer run"),
        ("own card", "was not written by a trainer"),
    ],
)
def test_bad_input_of_card(trained, tmp_path, capsys, content, message):
    if content == "own card":
        (tmp_path / "README.md").write_text("# Mine\n")
        content = (trained / "trainer_state.json").read_text()
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert cli.main(["card", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("hf-tst card: ")
    assert message in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--max_stepz", "3"], "There is no flag 'max_stepz': did you mean 'max_steps'?"),
        (["train", "--max_steps", "many"], "Argument --max_steps/--max-steps: invalid int value: 'many'."),
        (["train", "stray"], "There is no recipe 'stray': `hf-tst recipes` lists them"),
        (["train", "270m-20k-ts"], "did you mean '270m-20k-tst'?"),
        (["train", "--max_steps", "3", "stray"], "'stray' does not belong to a flag: write --name value"),
        (["train", "--train_file", "a.jsonl", "b.jsonl"], "'b.jsonl' does not belong to a flag: write --name value, and patterns of files in quotes"),
        (["compare", "--seeds", "0", "1", "--max_steps", "4"], "'1' does not belong to a flag: write --seeds 0,1"),
        (["train", "missing.yaml"], "There is no configuration file missing.yaml"),
        (["train", "--train_file", "x.txt", "--tokenizer_name", "nowhere", "--model_type", "llama"], "There is no file x.txt"),
        (["plan", "--gpu", "b20"], "did you mean 'b200'?"),
        (["card", "nowhere", "--licence", "mit"], "did you mean 'license'?"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_status_2(capsys, tmp_path, arguments, message):
    if arguments[0] == "train":
        arguments = [*arguments, "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"hf-tst {arguments[0]}: ")
    assert message in line


def test_a_model_that_is_not_there_is_one_sentence(recipe, capsys):
    assert (
        cli.main(["train", str(recipe), "--overwrite_output_dir", "--tokenizer_name", "nowhere/nothing"]) == 2
    )
    assert "Cannot load nowhere/nothing: " in capsys.readouterr().err.splitlines()[-1]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(recipe, capsys):
    overrides = '{"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 100}'
    assert cli.main(["train", str(recipe), "--overwrite_output_dir", "--config_overrides", overrides]) == 2
    assert "vocab_size=100 in config_overrides is less than the tokenizer's" in capsys.readouterr().err


def test_a_step_of_other_tokens_than_asked_for_is_refused(recipe, capsys, monkeypatch):
    class SharedRows(pretrain.TSTTrainer):
        def get_total_train_batch_size(self, args):
            return super().get_total_train_batch_size(args) // 2

    monkeypatch.setattr(pretrain, "TSTTrainer", SharedRows)
    assert cli.main(["train", str(recipe), "--overwrite_output_dir", "--tokens_per_step", "64"]) == 2
    assert "A step trains on 32 tokens, not on tokens_per_step=64" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_debug_anywhere_shows_the_traceback(capsys, place):
    arguments = ["plan", "--gpu", "b20"]
    assert cli.main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main([*arguments[:place], "--debug", *arguments[place:]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("hf-tst plan: ")


def test_the_debug_flag_of_trainer_stays_its_own(monkeypatch):
    seen = []
    monkeypatch.setitem(cli.COMMANDS, "train", seen.append)
    assert cli.main(["train", "--debug", "underflow_overflow", "--max_steps", "3", "--debug"]) == 0
    assert seen == [["--debug", "underflow_overflow", "--max_steps", "3"]]


@pytest.mark.parametrize(
    ("error", "status"), [(RunError("The disk is full."), 1), (PreemptedError("Told to end."), 143)]
)
def test_statuses_of_runs_that_are_stopped(monkeypatch, capsys, error, status):
    def stopped(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", stopped)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == f"hf-tst train: {error}\n"


def test_statuses_of_a_process(recipe):
    assert run_script("hf_tst.cli.main", "plan", recipe, "--json").returncode == 0
    command = [sys.executable, "-m", "hf_tst.cli.main", "plan", str(recipe), "--mfu", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("hf-tst plan: mfu must be")


def test_sigterm_ends_training_with_a_checkpoint_and_143(recipe, tmp_path):
    flags = ["--max_steps", "-1", "--num_train_epochs", "200", "--save_steps", "5", "--save_total_limit", "2"]
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "hf_tst.cli.main",
        "train",
        str(recipe),
        *flags,
        "--output_dir",
        str(folder),
    ]
    process = subprocess.Popen(
        [*command, "--enable_jit_checkpoint"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE
    while not list(folder.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    message = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 143
    found = re.fullmatch(
        rf"hf-tst train: SIGTERM after optimizer step (\d+), with a checkpoint in {folder}: continue with "
        r"--resume_from_checkpoint last\.",
        message,
    )
    assert last_complete_checkpoint(folder) == str(folder / f"checkpoint-{found[1]}")
    assert not (folder / "README.md").exists()
    assert not (folder / "model.safetensors").exists()


def test_interruption_is_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "hf-tst train: interrupted\n"
