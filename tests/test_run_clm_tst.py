"""The script as a user runs it: in a process of its own, on the embedded default and on files."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import write_corpus
from processes import run_script
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parent.parent / "scripts" / "run_clm_tst.py"
TINY = {
    "model_type": "llama",
    "config_overrides": "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,"
    "num_key_value_heads=1,max_position_embeddings=32",
    "block_size": 16,
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def run(*flags, cwd, fails=False):
    result = run_script(SCRIPT, *flags, cwd=cwd)
    assert result.returncode == (2 if fails else 0), result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tokenizer, a corpus and a configuration file."""
    folder = tmp_path_factory.mktemp("workspace")
    texts = write_corpus(folder)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8"
    )
    for i in range(2):
        lines = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"part-{i}.jsonl").write_text("".join(lines[i::2]), encoding="utf-8")
    (folder / "latin.txt").write_bytes("caf\xe9\n".encode("latin1") * 100)
    (folder / "empty.txt").touch()
    (folder / "hub").mkdir()
    for split in ("train", "validation"):
        shutil.copy(folder / "corpus.jsonl", folder / "hub" / f"{split}.jsonl")
    config = TINY | {"train_file": "corpus.jsonl", "tokenizer_name": "tokenizer", "output_dir": "out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_without_data_it_trains_on_the_standard_library(tmp_path):
    result = run(
        "--max_steps", 8, "--max_eval_samples", 8, "--logging_steps", 1, "--eval_steps", 4, cwd=tmp_path
    )
    assert "learning_rate" not in result.stderr
    output = tmp_path / "runs" / "quickstart"
    assert "superposition  0-1" in result.stdout
    assert "recovery       2-7" in result.stdout
    assert "final evaluation loss" in result.stdout
    assert (output / "loss_curve.png").is_file()
    assert "first 2 of 8 optimizer steps" in (output / "README.md").read_text()
    assert (output / "checkpoint-2" / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2


@pytest.mark.parametrize("config", ["config.yaml", "config.json"])
def test_a_file_of_arguments_and_flags_that_win(workspace, tmp_path, config):
    flags = ["--output_dir", tmp_path / "run", "--max_steps", 4, "--tst_phase_ratio", 0.5]
    result = run(config, *flags, cwd=workspace)
    assert "learning_rate=5e-05 is Trainer's default" in result.stderr
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    sizes = [entry["tst_current_bag_size"] for entry in state["log_history"] if "loss" in entry]
    assert sizes == [6] * 2 + [1] * 2
    assert "eval_loss" in json.loads((tmp_path / "run" / "eval_results.json").read_text())


@pytest.mark.parametrize(
    "flags",
    [
        ["--train_file", "corpus.txt"],
        ["--streaming", "--validation_split_percentage", 0],
        ["--dataset-name", "hub"],
        ["--train_file", "part-*.jsonl", "--dataloader_num_workers", 2],
        ["--train_file", "part-*.jsonl", "--streaming", "--validation_file", "corpus.jsonl"],
        ["--tst_document_boundaries", "respect"],
        ["--train_file", "corpus.txt", "--validation_file", "corpus.jsonl", "--max_train_samples", 200],
    ],
)
def test_text_files_streams_and_data_set_folders(workspace, tmp_path, flags):
    result = run("config.yaml", "--output_dir", tmp_path / "run", *flags, cwd=workspace)
    assert "recovery       2-5" in result.stdout
    if "--streaming" not in flags:
        assert " training and " in result.stdout
    assert (
        "datasets:" not in (tmp_path / "run" / "README.md").read_text()
    )  # local ones have no name on the Hub


@pytest.mark.parametrize(
    "data", [[], ["--streaming", "--validation_split_percentage", 0]], ids=["packed", "stream"]
)
def test_resuming_gives_the_uninterrupted_run(workspace, tmp_path, data):
    common = ("config.yaml", "--save_steps", 3, "--save_strategy", "steps", *data)
    run(*common, "--output_dir", tmp_path / "whole", cwd=workspace)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    run(*common, "--output_dir", tmp_path / "whole", "--resume_from_checkpoint", "last", cwd=workspace)
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == whole


def test_a_stream_is_not_continued_with_another_file(workspace, tmp_path):
    common = ("config.yaml", "--save_steps", 3, "--streaming", "--validation_split_percentage", 0)
    run(*common, "--output_dir", tmp_path, "--train_file", "part-0.jsonl", cwd=workspace)
    resumed = (*common, "--output_dir", tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-3")
    result = run(*resumed, "--train_file", "part-1.jsonl", cwd=workspace, fails=True)
    assert "the data's fingerprint was stream of 1 shards, " in result.stderr
    run(*resumed, "--train_file", "part-0.jsonl", cwd=workspace)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_file", "empty.txt"], "empty.txt holds no text"),
        (["--train_file", "nothing.txt"], "There is no file"),
        (["--train_file", "latin.txt"], "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
        (
            ["--block_size", 32, "--train_file", "part-0.jsonl", "--max_train_samples", 3],
            "lower max_steps to about",
        ),
        (["--tst_phase_ratio", 2], "tst_phase_ratio must be from 0 to 1"),
        (["--block_size", 64], "more than the model's context of 32"),
        (["--max_steps", 100_000], "lower max_steps to about"),
        (["--streaming"], "cannot be split"),
        (
            ["--streaming", "--validation_split_percentage", 0, "--max_train_samples", 9],
            "A stream has no number of blocks for max_train_samples=9",
        ),
        (["--resume_from_checkpoint", "last"], "no checkpoint to resume from"),
        (["--model_type", "nonsense"], "model_type is 'nonsense'"),
        (["--dataset_name", "some/data", "--train_file", "corpus.txt"], "name one of them"),
    ],
)
def test_bad_input_is_one_sentence(workspace, tmp_path, flags, message):
    result = run("config.yaml", "--output_dir", tmp_path / "run", *flags, cwd=workspace, fails=True)
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_the_standard_library_is_not_streamed(tmp_path):
    result = run("--streaming", "--output_dir", tmp_path / "run", cwd=tmp_path, fails=True)
    assert "streaming need training data: name train_file or dataset_name" in result.stderr.splitlines()[-1]


def test_unknown_names_in_a_file_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("max_step: 3\n")
    assert "max_step" in run("config.yaml", cwd=tmp_path, fails=True).stderr.splitlines()[-1]
    assert "no configuration file" in run("missing.yaml", cwd=tmp_path, fails=True).stderr
