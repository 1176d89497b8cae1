"""TSTTrainer with multi-token prediction under accelerate's FSDP2 (gloo, two processes) against one process without."""

from pathlib import Path

import mtp_trainer_fsdp2_runs
import pytest
import torch
from accelerate import Accelerator
from conftest import make_model
from launching import launch_two
from mtp_trainer_fsdp2_runs import CASES, RESUMED, LastHeads, evaluations, logs, make_trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.skipif(
    not hasattr(Accelerator, "is_fsdp2"), reason="this accelerate has no FSDP2, so the trainer has none"
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    return out, launch_two(Path(mtp_trainer_fsdp2_runs.__file__), out)[1][0]


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"bf16_moe"}))
def test_two_processes_train_as_one_does(two, tmp_path, name):
    out, results = two
    heads = LastHeads()
    trainer = make_trainer(name, tmp_path, 1, callbacks=[heads])
    trainer.train()
    result = results[name]
    assert (result["fsdp2"], result["sharded"], result["left"]) == (True, True, False)
    assert sum(entry["mtp_loss"] > 0 for entry in result["logs"]) == (8 if "baseline" in name else 5)
    torch.testing.assert_close(result["logs"], logs(trainer), rtol=1e-5, atol=1e-5)
    weights = AutoModelForCausalLM.from_pretrained(out / name).state_dict()
    torch.testing.assert_close(weights, trainer.model.state_dict(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.load(out / name / "heads.pt"), heads.weights, rtol=1e-5, atol=1e-5)


def test_bfloat16_stays_close_to_float32(two, tmp_path):
    _, results = two
    trainer = make_trainer("bf16_moe", tmp_path, 1, bf16=False)
    trainer.train()
    found = results["bf16_moe"]["logs"]
    for key in ("loss", "mtp_loss"):
        values, expected = ([entry[key] for entry in entries] for entries in (found, logs(trainer)))
        torch.testing.assert_close(values, expected, rtol=2e-2, atol=0)
    assert [entry["loss"] for entry in found] != [entry["loss"] for entry in logs(trainer)]


def test_evaluation_is_that_of_one_process_and_makes_no_logits(two, tmp_path):
    result, one = two[1]["evaluations"], evaluations(tmp_path, 1)
    assert result["widths"] == one["widths"] == [0]
    assert len(result["losses"]) == 6
    torch.testing.assert_close(result["losses"], one["losses"], rtol=1e-5, atol=1e-5)


def test_what_cannot_go_with_it_is_refused(two):
    old, loading = two[1]["refusals"]
    assert old == (
        "mtp_num_heads=3 does not work with FSDP1 (FSDP2 is fsdp_version: 2): leave it out, or set mtp_num_heads=1."
    )
    assert "does not work with fsdp_cpu_ram_efficient_loading: leave it out" in loading


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_the_ordinary_model(two, tmp_path, name):
    out, _ = two
    model_type, overrides = CASES[name].get("model", ("llama", {}))
    model = make_model(model_type, **overrides)
    model.save_pretrained(tmp_path)
    assert set(load_file(out / name / "model.safetensors")) == set(load_file(tmp_path / "model.safetensors"))
    _, info = AutoModelForCausalLM.from_pretrained(out / name, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize(("name", "step"), [(name, step) for name in RESUMED for step in RESUMED[name]])
def test_a_resumed_run_is_the_uninterrupted_run(two, name, step):
    """In superposition, at the switch, in recovery, and in a plain run."""
    out, results = two
    assert results[f"{name}-{step}"]["logs"] == results[name]["logs"]
    for read, file in ((load_file, "model.safetensors"), (torch.load, "heads.pt")):
        resumed, whole = (read(out / folder / file) for folder in (f"{name}-{step}", name))
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)
