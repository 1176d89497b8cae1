"""What a run must not do: run code that it was not asked to run, tell the Hub's token, write where it should not."""

import ast
import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_blocks
from transformers import TrainingArguments

from hf_tst import TSTTrainer, TSTTrainingArguments
from hf_tst.data.quickstart import train_tokenizer
from hf_tst.pretraining.options import ModelArguments
from hf_tst.pretraining.pretrain import main

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("hf_tst/**/*.py"), *ROOT.glob("scripts/**/*.py")]
TOKEN = "hf_TheTokenOfNobody"


def calls(path, name):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


def test_nothing_is_unpickled_or_read_as_code():
    loads = [(path, call) for path in SOURCES for call in calls(path, "torch.load")]
    assert loads
    for path, call in loads:
        assert {"weights_only": "True"}.items() <= {
            k.arg: ast.unparse(k.value) for k in call.keywords
        }.items(), path
    for name in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system"):
        assert not [path for path in SOURCES if list(calls(path, name))], name


def test_code_of_the_hub_runs_only_if_it_is_asked_for():
    assert ModelArguments().trust_remote_code is False
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not isinstance(node.value, ast.Constant) or node.value.value is False, path


def test_pickled_arguments_hold_no_token():
    """Trainer's do, and it pushes them beside the model."""
    assert TOKEN.encode() in pickle.dumps(TrainingArguments("x", hub_token=TOKEN))
    args = TSTTrainingArguments("x", hub_token=TOKEN, tst_bag_size=3)
    pickled = pickle.dumps(args)
    assert TOKEN.encode() not in pickled
    again = pickle.loads(pickled)
    assert (again.hub_token, again.tst_bag_size, again.output_dir) == (None, 3, "x")
    assert args.hub_token == copy.copy(args).hub_token == copy.deepcopy(args).hub_token == TOKEN
    changed = copy.copy(args)
    changed.max_steps = 7
    assert args.max_steps == -1
    args.label_names = ["labels"]
    copy.deepcopy(args).label_names.append("more")
    assert args.label_names == ["labels"]


@pytest.fixture
def recipe(tmp_path):
    texts = [
        json.dumps({"text": f"line {i} says {i * i}", "file_name": "../../escaped.txt"}) for i in range(400)
    ]
    inside = tmp_path / "inside"
    inside.mkdir()
    train_tokenizer(texts, 400).save_pretrained(inside / "tokenizer")
    (inside / "..escaped; $(touch gone).jsonl").write_text("\n".join(texts), encoding="utf-8")
    values = {
        "output_dir": str(inside / "out"), "model_type": "llama", "block_size": 16, "max_steps": 4, "use_cpu": True,
        "config_overrides": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 32,
        },
        "per_device_train_batch_size": 2, "save_steps": 2, "save_strategy": "steps", "report_to": "tensorboard",
        "train_file": str(inside / "..escaped; $(touch gone).jsonl"), "tokenizer_name": str(inside / "tokenizer"),
        "logging_steps": 1, "hub_token": TOKEN, "eval_strategy": "steps", "eval_steps": 2,
    }  # fmt: skip
    path = inside / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_a_run_tells_no_token_and_writes_nowhere_but_in_its_folder(recipe, tmp_path, capfd, caplog):
    recipe_text = recipe.read_text()
    before = files(tmp_path)
    with caplog.at_level("DEBUG"):
        main([str(recipe)])
    printed = capfd.readouterr()
    new = files(tmp_path) - before
    assert len(new) > 30
    assert {path.relative_to(recipe.parent).parts[0] for path in new} == {"out"}
    assert {path.name for path in new} >= {
        "training_args.bin",
        "README.md",
        "trainer_state.json",
        "manifest.json",
    }
    assert not [path for path in new if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in printed.out + printed.err + caplog.text
    assert recipe.read_text() == recipe_text


@pytest.mark.parametrize(
    "flags",
    [["--max_steps", "many"], ["--max_stepz", "3"], ["--tst_bag_size", "0"], ["--lr_scheduler_kwargs", "{"], ["--fsdp", "x"],
     ["--resume_from_checkpoint", "last"], ["--push_to_hub"]],
)  # fmt: skip
def test_error_messages_tell_no_token(recipe, capfd, caplog, flags):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        main([str(recipe), *flags])
    printed = capfd.readouterr()
    chain, error = "", caught.value
    while error is not None:
        chain, error = f"{chain} {error!r}", error.__cause__
    assert TOKEN not in printed.out + printed.err + caplog.text + chain


def test_code_in_a_checkpoint_is_not_run(llama, make_args, tmp_path):
    """An optimizer that is a pickled call: refused by the manifest, and without one by `weights_only`."""

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    args = make_args(save_strategy="steps", save_steps=5)
    TSTTrainer(llama, args, train_dataset=make_blocks(200)).train()
    folder = Path(args.output_dir) / "checkpoint-5"
    torch.save({"state": Bomb()}, folder / "optimizer.pt")
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200))
    with pytest.raises(ValueError, match=r"optimizer\.pt"):
        trainer.train(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        trainer.train(str(folder))
    assert not (tmp_path / "exploded").exists()
