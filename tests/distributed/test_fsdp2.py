"""FSDP2 (`fully_shard` over gloo, two processes) against one process, through the switch."""

import json
from pathlib import Path

import fsdp2_runs
import pytest
import torch
from fsdp2_runs import CASES, CHECKPOINTED, STEPS, SWITCH, load_shards, make, make_optimizer, train
from launching import launch_two
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return out, launch_two(Path(fsdp2_runs.__file__), out)[1]


def train_alone(name, steps=range(STEPS), folder=None):
    model = make(name)
    optimizer = make_optimizer(model)
    if folder is not None:
        load_shards(model, optimizer, folder)
    return model, train(model, optimizer, [0, 1], 1, CASES[name][3], steps)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(two, name):
    out, ranks = two
    model, losses = train_alone(name)
    summed = [sum(both) for both in zip(*(rank[name]["losses"] for rank in ranks), strict=True)]
    torch.testing.assert_close(summed, losses, rtol=1e-5, atol=1e-5)
    assert ranks[0][name]["sharded"]
    loaded = AutoModelForCausalLM.from_pretrained(out / name).state_dict()
    torch.testing.assert_close(loaded, model.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_export_is_an_ordinary_checkpoint(two, name, tmp_path):
    out, _ = two
    model = make(name)
    model.save_pretrained(tmp_path)
    saved, ordinary = (json.loads((folder / "config.json").read_text()) for folder in (out / name, tmp_path))
    assert saved == ordinary
    assert set(load_file(out / name / "model.safetensors")) == set(load_file(tmp_path / "model.safetensors"))
    loaded, info = AutoModelForCausalLM.from_pretrained(out / name, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_run_resumes_from_shards_on_as_many_processes(two):
    out, (results, _) = two
    assert results["resumed"]["losses"] == results[CHECKPOINTED]["losses"][SWITCH:]
    resumed, whole = (load_file(out / name / "model.safetensors") for name in ("resumed", CHECKPOINTED))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_run_resumes_from_shards_on_one_process(two):
    out, ranks = two
    model, losses = train_alone(CHECKPOINTED, range(SWITCH, STEPS), out / "shards")
    summed = [sum(both) for both in zip(*(rank[CHECKPOINTED]["losses"] for rank in ranks), strict=True)]
    torch.testing.assert_close(losses, summed[SWITCH:], rtol=1e-5, atol=1e-5)
    weights = load_file(out / CHECKPOINTED / "model.safetensors")
    torch.testing.assert_close(model.state_dict(), weights, rtol=1e-5, atol=1e-5)


def test_a_model_of_ones_own_has_the_same_loss_in_shards(two):
    for results in two[1]:
        whole, sharded = results["own_model"]
        assert sharded == pytest.approx(whole, rel=1e-6)


def test_a_cast_of_inputs_to_bfloat16_leaves_the_divisor_alone(two):
    assert two[1][0]["divisors"] == pytest.approx([1, 1], abs=1e-5)  # 257 is no bfloat16 number
