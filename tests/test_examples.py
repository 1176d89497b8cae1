"""Every example runs in a tiny form, and leaves an ordinary model."""

import copy
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import DENSE, make_model, weights_equal
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from versions import fails_before, params

from hf_tst.data.quickstart import train_tokenizer

EXAMPLES = sorted((Path(__file__).parent.parent / "scripts" / "examples").glob("*.py"))
NEEDS_MUON = fails_before("torch", "2.9", "it has no Muon")
TRAINER = [
    "--per_device_train_batch_size",
    "2",
    "--report_to",
    "none",
    "--disable_tqdm",
    "True",
    "--use_cpu",
    "True",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model with its tokenizer, and a data set, as folders in place of Hub ids."""
    folder = tmp_path_factory.mktemp("examples")
    texts = [f"line {i} of the text, which says {i * i}\n" for i in range(400)]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save_pretrained(folder / "model")
    LlamaForCausalLM(LlamaConfig(**DENSE | {"vocab_size": len(tokenizer)})).save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "train.txt").write_text("".join(texts), encoding="utf-8")
    return folder


def has_trainer(example):
    return "TSTTrainer" in example.read_text(encoding="utf-8")


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    def run(example, *more):
        flags = ["--model", data / "model", "--dataset", data / "data", "--block_size", 16, "--max_steps", 5]
        flags += ["--output_dir", tmp_path / "out", *more]
        flags += TRAINER if has_trainer(example) else ["--batch_size", 2]
        monkeypatch.setattr(sys, "argv", [str(example), *map(str, flags)])
        runpy.run_path(str(example), run_name="__main__")

    return run


@pytest.mark.parametrize("example", params(EXAMPLES, ["muon.py"], NEEDS_MUON))
def test_an_example_trains(example, run, tmp_path):
    run(example)
    output = (
        tmp_path / "out" / "merged" if "merge" in example.read_text(encoding="utf-8") else tmp_path / "out"
    )
    model = AutoModelForCausalLM.from_pretrained(output)
    tokens = AutoTokenizer.from_pretrained(output)("line 1", return_tensors="pt")["input_ids"]
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape[1] == tokens.shape[1] + 2


@pytest.mark.parametrize("example", params(filter(has_trainer, EXAMPLES), ["muon.py"], NEEDS_MUON))
def test_an_example_goes_on_from_a_checkpoint(example, run, tmp_path):
    run(example, "--save_steps", 2)
    weights = sorted((tmp_path / "out").rglob("*.safetensors"))
    expected = {path: load_file(path) for path in weights if "checkpoint-" not in str(path)}
    assert expected
    for path in expected:
        path.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    run(example, "--save_steps", 2, "--resume_from_checkpoint", "last")
    for path, tensors in expected.items():
        found = load_file(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    state = json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [note["step"] for note in state["stateful_callbacks"]["TSTTrainer"]] == [0, 4]


@NEEDS_MUON
def test_muon_and_adamw_as_one_optimizer_do_what_each_does_alone():
    """Also after the state was saved and loaded, with another learning rate in between, as a schedule sets it."""
    module = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "examples" / "muon.py"))
    models = [make_model("llama").train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    joint = module["MuonAndAdamW"](models[0], lr=0.01, weight_decay=0.1)
    named = dict(models[1].named_parameters())
    matrices = {name: p for name, p in named.items() if p.ndim == 2 and "layers" in name}
    others = [p for name, p in named.items() if name not in matrices]
    options = {"lr": 0.01, "weight_decay": 0.1}
    muon = torch.optim.Muon(matrices.values(), adjust_lr_fn="match_rms_adamw", **options)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.95), **options)
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    for step in range(4):
        if step == 2:
            fresh = module["MuonAndAdamW"](models[0], lr=0.01, weight_decay=0.1)
            fresh.load_state_dict(copy.deepcopy(joint.state_dict()))
            joint = fresh
        for group in (*joint.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 0.01 / (step + 1)
        for model, optimizers in zip(models, ([joint], [muon, adamw]), strict=True):
            model(tokens, labels=tokens).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    assert weights_equal(*models)


@NEEDS_MUON
def test_muon_refuses_weights_that_are_sharded_after_the_optimizer_was_made(tmp_path):
    """As accelerate does; no weight is changed."""
    module = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "examples" / "muon.py"))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model("llama").train()
        before = copy.deepcopy(model.state_dict())
        optimizer = module["MuonAndAdamW"](model, lr=0.01, weight_decay=0.1)
        places = {id(p): name for name, p in model.named_parameters()}
        names = [[places[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        sharded = dict(model.named_parameters())
        for group, members in zip(optimizer.param_groups, names, strict=True):
            group["params"] = [sharded[name] for name in members]
        tokens = torch.randint(0, 64, (2, 12))
        model(tokens, labels=tokens).loss.backward()
        with pytest.raises(ValueError, match="sharded weights"):
            optimizer.step()
        assert all(torch.equal(p.full_tensor(), before[name]) for name, p in model.named_parameters())
    finally:
        distributed.destroy_process_group()
