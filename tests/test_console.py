"""What a person sees of a run: one line per log, nothing overwritten without a word, flags told before torch is imported."""

import errno
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import make_blocks, write_recipe
from processes import PATIENCE, run_script, start_process

from hf_tst import TSTTrainer
from hf_tst.cli import main as cli
from hf_tst.cli.plan import PlanArguments
from hf_tst.errors import TSTError
from hf_tst.experiments import queue as run_queue
from hf_tst.experiments.compare import CompareArguments, SweepArguments
from hf_tst.pretraining import pretrain
from hf_tst.pretraining.first_look import SOURCES, announce, declared_arguments, flag_values
from hf_tst.pretraining.options import TRAINING, ArgumentParser, RunArguments, parse_arguments, parse_values
from hf_tst.pretraining.overwrite import holding_folder
from hf_tst.pretraining.recipes import recipe_names

LINE = re.compile(
    r"step +\d+/\d+  (superposition|recovery     )  loss \d+\.\d{3}(  eval \d+\.\d{3})?  \S+ raw tok/s  \d\d:\d\d left"
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(
        tmp_path_factory.mktemp("console"), 400, {}, max_steps=6, per_device_train_batch_size=2, logging_steps=1,
        max_eval_samples=4, save_strategy="no", eval_strategy="steps", eval_steps=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(recipe):
    assert cli.main(["train", str(recipe)]) == 0
    return recipe.parent / "run"


@pytest.fixture
def run_folder(finished, tmp_path):
    """A finished run, with a file of the user's."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_not_overwritten(recipe, run_folder, capsys):
    before = contents(run_folder)
    assert cli.main(["train", str(recipe), "--output_dir", str(run_folder), "--max_steps", "4"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "holds a finished run" in line
    assert "--overwrite_output_dir` replaces it" in line
    assert f"--output_dir {run_folder}-2` keeps it" in line
    assert contents(run_folder) == before


def test_it_is_replaced_when_that_is_asked_for(recipe, run_folder):
    assert (run_folder / "checkpoint-2").is_dir()
    flags = ["--output_dir", str(run_folder), "--max_steps", "10", "--overwrite_output_dir"]
    assert cli.main(["train", str(recipe), *flags]) == 0
    assert [path.name for path in run_folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((run_folder / "trainer_state.json").read_text())["max_steps"] == 10
    assert (run_folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in run_folder.glob("_*")] == ["_run.json"]


def test_files_and_folders_of_the_user_stay(recipe, run_folder):
    """What has almost the name of a run's: such as the folder of the tokenizer, which `scripts/local_corpus.py` writes."""
    (run_folder / "checkpoint-7.tar").write_bytes(b"packed")
    mine = (
        "tokenizer/tokenizer.json", "tokenizer_training.txt", "adapter_notes.md", "vocab.pdf",
        "model-notes.safetensors.md", "checkpoint-2-best/model.safetensors", "chat_template.py", "config.json.old",
    )  # fmt: skip
    for name in mine:
        (run_folder / name).parent.mkdir(exist_ok=True)
        (run_folder / name).write_text("mine")
    before = contents(run_folder)
    flags = ["--output_dir", str(run_folder), "--max_steps", "10", "--overwrite_output_dir"]
    assert cli.main(["train", str(recipe), *flags]) == 0
    after = contents(run_folder)
    kept = [*mine, "notes.txt", "checkpoint-7.tar"]
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    assert after.keys() - {name.replace("-2/", "-3/") for name in before} == set()


def test_a_run_that_fails_before_its_first_checkpoint_gives_the_old_one_back(recipe, run_folder, monkeypatch):
    class Failing(pretrain.TSTTrainer):
        def training_step(self, *args, **kwargs):
            assert not (run_folder / "model.safetensors").exists()
            raise MemoryError

    before = contents(run_folder)
    monkeypatch.setattr(pretrain, "TSTTrainer", Failing)
    with pytest.raises(MemoryError):
        cli.main(["train", str(recipe), "--output_dir", str(run_folder), "--overwrite_output_dir"])
    assert contents(run_folder) == before


def test_a_run_that_is_stopped_after_its_first_checkpoint_stays_in_place_of_the_old_one(
    recipe, run_folder, monkeypatch, capsys
):
    """Also if Ctrl-C comes while the old run is being removed, and both have a checkpoint of the same step."""
    old = contents(run_folder / "checkpoint-2")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.ReplaceRunCallback, "on_save", stop)
    flags = ["train", str(recipe), "--output_dir", str(run_folder), "--seed", "5"]
    assert cli.main([*flags, "--overwrite_output_dir"]) == 130
    assert "--resume_from_checkpoint last" in capsys.readouterr().err
    assert [path.name for path in run_folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert contents(run_folder / "checkpoint-2") != old
    assert not (run_folder / "model.safetensors").exists()
    assert not (run_folder / "_replaced").exists()
    monkeypatch.undo()
    assert cli.main([*flags, "--resume_from_checkpoint", "last"]) == 0


def test_a_run_that_is_stopped_while_the_old_one_is_set_aside_leaves_it_whole(
    recipe, run_folder, monkeypatch
):
    before = contents(run_folder)
    moved = []
    rename = Path.rename

    def stop_at_third(path, target):
        if "_replaced" in str(target):
            moved.append(path)
            if len(moved) == 3:
                raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop_at_third)
    flags = ["--output_dir", str(run_folder), "--overwrite_output_dir"]
    assert cli.main(["train", str(recipe), *flags]) == 130
    assert contents(run_folder) == before


def test_a_half_finished_run_is_resumed_or_replaced(recipe, run_folder, capsys):
    for name in ("config.json", "trainer_state.json", "model.safetensors"):
        (run_folder / name).unlink()
    flags = ["train", str(recipe), "--output_dir", str(run_folder)]
    assert cli.main(flags) == 2
    assert "--resume_from_checkpoint last` continues it" in capsys.readouterr().err
    assert cli.main([*flags, "--resume_from_checkpoint", "last", "--overwrite_output_dir"]) == 2
    assert "leave one out" in capsys.readouterr().err
    assert cli.main([*flags, "--resume_from_checkpoint", "last"]) == 0


def test_no_other_run_starts_in_the_folder_of_one_that_trains(recipe, tmp_path, monkeypatch):
    """Before it has a checkpoint, which would tell of it."""
    flags = ["train", str(recipe), "--output_dir", str(tmp_path / "run")]
    refused = []

    class First(pretrain.TSTTrainer):
        def training_step(self, *args, **kwargs):
            if not refused:
                refused.extend(
                    run_script("hf_tst", *flags, *more) for more in ([], ["--overwrite_output_dir"])
                )
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(pretrain, "TSTTrainer", First)
    assert cli.main(flags) == 0
    assert [other.returncode for other in refused] == [2, 2]
    message = f"hf-tst train: Another process works in {tmp_path / 'run'}: wait for it"
    assert all(other.stderr.splitlines()[-1].startswith(message) for other in refused)
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "run").glob("_*")] == ["_run.json"]


def die_in(folder, loader):
    """Hold a folder and die without a word, while a process of a loader lives on."""
    with holding_folder(folder):
        Path(loader).touch()
        if not os.fork():
            while Path(loader).exists():
                time.sleep(0.1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_died_holds_no_folder(tmp_path):
    loader = tmp_path / "loader"
    process = start_process(die_in, str(tmp_path / "run"), str(loader))
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "run" / "_lock").exists()
    try:
        with holding_folder(str(tmp_path / "run")):
            pass
    finally:
        loader.unlink()
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_that_cannot_be_locked_is_trained_into_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(KeyError), holding_folder(str(tmp_path / "new" / "run")):
        raise KeyError
    assert "cannot be locked on this system" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_log_is_one_line_and_the_record_has_all_of_it(llama, make_args, capsys):
    args = make_args(max_steps=10, eval_strategy="steps", eval_steps=5)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(400), eval_dataset=make_blocks(4, seed=1))
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(LINE.fullmatch(line) for line in lines[:10])
    assert ["eval" in line for line in lines[:10]] == [number in (5, 10) for number in range(1, 11)]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"grad_norm", "learning_rate", "tst_raw_tokens", "tst_data_wait_seconds"} <= logged[0].keys()


def test_what_a_script_logs_is_shown(llama, make_args, capsys):
    class Logging(TSTTrainer):
        def log(self, logs, *args, **kwargs):
            super().log({**logs, "own_metric": 0.25}, *args, **kwargs)

    Logging(llama, make_args(max_steps=2), train_dataset=make_blocks(200)).train()
    assert "own_metric 0.250" in capsys.readouterr().out.splitlines()[0]


def test_lines_and_bar_on_a_terminal_of_80_columns(recipe, tmp_path):
    command = [sys.executable, "-m", "hf_tst", "train", str(recipe), "--output_dir", str(tmp_path / "run")]
    leader, follower = pty.openpty()
    os.set_blocking(leader, False)
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    printed = b""
    while process.poll() is None:
        time.sleep(0.1)
        with suppress(BlockingIOError):
            printed += os.read(leader, 1 << 20)
    os.close(follower)
    os.close(leader)
    assert process.returncode == 0, printed.decode()
    parts = re.split(r"[\r\n]+", printed.decode().replace("\x1b[A", ""))
    lines = [part for part in parts if "raw tok/s" in part]
    assert len(lines) == 6
    assert all(LINE.fullmatch(line) for line in lines)
    bars = [part for part in parts if "%|" in part and "left" in part]
    assert {bar.split()[0] for bar in bars} >= {"superposition", "recovery", "evaluation"}
    assert all(len(bar) <= 80 for bar in bars)
    assert "Warning" not in printed.decode()
    assert "sample " in parts[-2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make_terminal(monkeypatch):
    """What is shown on a terminal from now on, bars included. A fixture would come before pytest's own capture."""
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    return shown


def test_the_bar_of_a_resumed_run_begins_where_it_stands(llama, make_args, monkeypatch):
    args = make_args(max_steps=10, disable_tqdm=False, save_strategy="steps", save_steps=8)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(400))
    trainer.train()
    terminal = make_terminal(monkeypatch)
    trainer.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-8"))
    assert re.findall(r" (\d+)/10 ", terminal.getvalue())[0] == "8"


def test_ctrl_c_names_the_flag_that_continues(recipe, tmp_path, capsys, monkeypatch):
    class Interrupted(pretrain.TSTTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 4:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(pretrain, "TSTTrainer", Interrupted)
    flags = ["train", str(recipe), "--output_dir", str(tmp_path / "run")]
    assert cli.main(flags) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"hf-tst train: interrupted: at step \d+, and the newest checkpoint is of step \d+: continue with "
        "--resume_from_checkpoint last",
        last,
    )
    monkeypatch.undo()
    assert cli.main([*flags, "--resume_from_checkpoint", "last"]) == 0


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_comparison_shows_where_its_runs_are(tmp_path, capsys, monkeypatch, on_terminal):
    (tmp_path / "run.sh").write_text("echo 'step 3/10  loss 4.125'; sleep 3\n")
    monkeypatch.setattr(run_queue, "PROGRESS_EVERY", 1)
    terminal = make_terminal(monkeypatch) if on_terminal else None
    run_queue.run_all(
        [run_queue.PlannedRun("tst", tmp_path / "tst", {})], launcher=f"sh {tmp_path / 'run.sh'}"
    )
    if on_terminal:
        assert "0/1  tst  step 3/10  loss 4.125" in terminal.getvalue()
    else:
        assert "tst  step 3/10  loss 4.125" in capsys.readouterr().out.splitlines()


def without_torch(*arguments):
    """What a command prints until torch is imported, and whether it is."""
    code = f"""import sys
from hf_tst.cli import main as cli
cli.import_module = lambda name: sys.exit(f"torch {{'torch' in sys.modules}}")
sys.exit(cli.main({list(arguments)!r}))"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_what_will_be_trained_is_said_before_torch_is_imported(recipe, tmp_path):
    result = without_torch("train", str(recipe), "--output_dir", str(tmp_path / "x"), "--max_steps=1000")
    assert result.stderr == "torch False\n"
    for words in (
        "a new llama",
        "corpus.txt",
        "1,000 steps, the first 300 on bags of 6 tokens",
        str(tmp_path / "x"),
    ):
        assert words in result.stdout


@pytest.mark.parametrize("command", SOURCES)
def test_a_misspelt_flag_is_told_before_torch_is_imported(command):
    wrong, right = ("licence", "license") if command == "card" else ("tst_bag_sise", "tst_bag_size")
    result = without_torch(command, f"--{wrong}", "4")
    assert result.returncode == 2
    assert result.stderr == f"hf-tst {command}: There is no flag {wrong!r}: did you mean {right!r}?\n"


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        ("train", [*TRAINING, RunArguments]),
        ("plan", [PlanArguments, *TRAINING, RunArguments]),
        ("compare", [CompareArguments, *TRAINING]),
        ("sweep", [SweepArguments, *TRAINING]),
    ],
)
def test_the_flags_of_the_source_are_those_of_the_parser(command, kinds):
    flags = {*vars(ArgumentParser(kinds).parse_flags([]))}
    assert flags <= declared_arguments(SOURCES[command]).keys()


def test_values_of_flags():
    words = ["--max-steps", "3", "--bf16", "--seed=4", "--streaming"]
    assert flag_values(words) == {"max_steps": "3", "bf16": True, "seed": "4", "streaming": True}


def test_help_has_ours_first_and_the_rest_on_request(capsys):
    pages = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["train", flag])
        pages[flag] = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+)", pages["--help"], re.MULTILINE)
    assert flags[0] == "tst_phase_ratio"
    assert flags.index("train_file") < flags.index("model_type") < flags.index("max_steps")
    assert "adam_beta1" not in flags
    assert "  --adam_beta1" in pages["--help_all"]


def test_the_help_of_a_comparison_lists_no_flag_that_it_refuses(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["compare", "--help_all"])
    text = capsys.readouterr().out
    assert "  --per_device_train_batch_size" in text
    for flag in ("resume_from_checkpoint", "push_to_hub", "load_best_model_at_end", "auto_find_batch_size"):
        assert not re.search(rf"--{flag}\b", text)
        assert cli.main(["compare", f"--{flag}=yes"]) == 2


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_that_wait_leave_their_cores_to_others_unless_the_user_says_otherwise(given, monkeypatch):
    """It takes effect only in a process that has not imported torch yet, hence one of its own."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    script = (
        "import os, sys; from hf_tst.cli import main as cli; assert 'torch' not in sys.modules\n"
        "cli.import_module = lambda _: sys.exit(str(('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])))\n"
        "cli.main(['env'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == str((False, given or "PASSIVE"))


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_have_names(name):
    values = parse_values([name, "--seed", "5"], TRAINING, "")
    assert Path(values.output_dir).parent == Path("runs")
    assert values.seed == 5


def test_recipes_are_listed_with_what_they_cost(capsys):
    assert cli.main(["recipes"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"270m-20k-tst +267M +104\.86B +\d+", table)
    assert "fsdp2" in table


def test_a_dry_run_shows_bags_and_plan_and_leaves_nothing(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain.TSTTrainer, "train", None)
    flags = ["--output_dir", str(tmp_path / "run"), "--save_strategy", "steps", "--save_steps", "3"]
    assert cli.main(["train", str(recipe), "--dry_run", *flags]) == 0
    out = capsys.readouterr().out
    assert re.search(r"step 0, bag 0 +'.+'", out)
    assert "whole run      6 steps" in out
    assert "checkpoint-2, checkpoints every 3 steps" in out
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", str(recipe), "--dry_run", "--max_steps", "100000", *flags]) == 2
    assert "lower max_steps to about" in capsys.readouterr().err


def test_text_without_a_tokenizer_names_both_that_it_needs(recipe, tmp_path, capsys):
    flags = [
        "--train_file",
        str(recipe.parent / "corpus.txt"),
        "--max_steps",
        "4",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert cli.main(["train", *flags, "--use_cpu"]) == 2
    told = capsys.readouterr().err
    assert "tokenizer_name" in told
    assert "config_name or model_type" in told


def test_versions_for_a_bug_report(capsys):
    assert cli.main(["env"]) == 0
    assert re.search(r"torch +\d", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("recipe", "flags", "data"),
    [
        ("dataset_name: some/data\ndataset_config_name: part\n", ["--train_file", "a.jsonl"], ("a.jsonl", None, None)),
        ("train_file: a.jsonl\n", ["--dataset-name=some/data"], (None, "some/data", None)),
        ("dataset_name: some/data\ndataset_config_name: part\n", ["--max_steps", "3"], (None, "some/data", "part")),
        ("dataset_name: some/data\ndataset_config_name: part\n", ["--dataset_name", "other"], (None, "other", "part")),
    ],
)  # fmt: skip
def test_data_of_flags_takes_the_place_of_a_recipes(tmp_path, capsys, recipe, flags, data):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe + "output_dir: out\nmodel_type: llama\n")
    _, args, _, _ = parse_arguments([str(path), *flags])
    assert (args.train_file, args.dataset_name, args.dataset_config_name) == data
    announce("train", [str(path), *flags])
    assert f"a new llama, on {data[0] or data[1]}\n" in capsys.readouterr().out


def test_a_flag_has_its_whole_name(tmp_path, capsys):
    """`--train_fil a.jsonl` named data, but trained with the settings of the quick start."""
    flags = ["--train_fil", "a.jsonl", "--output_dir", str(tmp_path)]
    for check in (announce, lambda _, words: parse_arguments(words)):
        with pytest.raises(TSTError, match="There is no flag 'train_fil': did you mean 'train_file'"):
            check("train", flags)
    assert not capsys.readouterr().out
