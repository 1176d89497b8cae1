"""Multi-token prediction under FSDP2 (`fully_shard` over gloo, two processes) against one process."""

from pathlib import Path

import mtp_fsdp2_runs
import pytest
import torch
from launching import launch_two
from mtp_fsdp2_runs import CASES, CHECKPOINTED, make, train_alone
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return out, launch_two(Path(mtp_fsdp2_runs.__file__), out)[1]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(two, name):
    out, ranks = two
    model, heads, losses = train_alone(name)
    summed = [sum(both) for both in zip(*(rank[name]["losses"] for rank in ranks), strict=True)]
    torch.testing.assert_close(summed, losses, rtol=1e-5, atol=1e-5)
    assert ranks[0][name]["sharded"]
    loaded, info = AutoModelForCausalLM.from_pretrained(out / name, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-5)
    weights = load_file(out / name / "heads.safetensors")
    torch.testing.assert_close(weights, heads.state_dict(), rtol=1e-5, atol=1e-5)
    _, fresh = make(name)
    assert not any(torch.equal(weights[key], fresh.state_dict()[key]) for key in weights)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_resumed_run_is_the_uninterrupted_run(two, name):
    out, (results, _) = two
    losses = results["resumed"][name]["losses"]
    assert losses == results[name]["losses"][-len(losses) :]
    for file in ("model.safetensors", "heads.safetensors"):
        resumed, whole = (load_file(out / folder / file) for folder in (f"{name}-resumed", name))
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_cast_of_inputs_to_bfloat16_leaves_the_divisor_alone(two):
    assert two[1][0]["divisors"] == pytest.approx([1, 1], abs=1e-5)  # 257 is no bfloat16 number


def test_what_would_be_wrong_in_silence_is_refused(two):
    before, unsharded, no_root, body, rounded = two[1][0]["refusals"]
    assert "make its extra heads before fully_shard" in before
    assert "call fully_shard inside multi_token_prediction" in unsharded
    assert "call it on the model last" in no_root
    assert "called on the LlamaModel" in body
    assert "num_items_in_batch has dtype torch.bfloat16" in rounded
