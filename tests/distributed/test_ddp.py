"""TSTTrainer on two processes (DDP over gloo) against one process at the same global batch."""

from pathlib import Path

import ddp_runs
import pytest
import torch
from conftest import make_model
from ddp_runs import CASES, OWN_DATA, STEPS, SWITCH, run_case
from launching import launch_two
from safetensors.torch import load_file

from hf_tst import token_superposition

# Cases whose batch two processes average in another way than one does; they are checked by hand below.
BY_HAND = {"tokens_of_a_rank_unequal"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    printed, ranks = launch_two(Path(ddp_runs.__file__), out)
    assert "fsdp is set, but" not in printed
    return out, ranks


@pytest.mark.parametrize("name", sorted(CASES.keys() - BY_HAND))
def test_two_processes_train_as_one_does(two, tmp_path, name):
    out, ranks = two
    one = run_case(name, tmp_path, world_size=1, runs=out)
    result = ranks[0][name]
    assert (one["world_size"], result["world_size"]) == (1, 2)
    torch.testing.assert_close(result["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result["grad_norms"], one["grad_norms"], rtol=1e-4, atol=1e-5)
    assert len(result["evaluations"]) >= 4
    torch.testing.assert_close(result["evaluations"], one["evaluations"], rtol=1e-5, atol=1e-5)
    extra = [[entry.get("mtp_loss", 0) for entry in run["logs"]] for run in (result, one)]
    torch.testing.assert_close(*extra, rtol=1e-5, atol=1e-5)
    weights, expected = (load_file(folder / "weights.safetensors") for folder in (out / name, tmp_path))
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    for key in ("tst_raw_tokens", "tst_expert_load_max", "tst_expert_load_min", "tst_experts_unused"):
        assert [entry.get(key) for entry in result["logs"]] == [entry.get(key) for entry in one["logs"]]
    floors = [[entry.get("tst_loss_above_floor", 0) for entry in run["logs"]] for run in (result, one)]
    torch.testing.assert_close(*floors, rtol=1e-4, atol=1e-4)
    assert [e.get("tst_skipped_steps") for e in result["logs"]] == [
        e.get("tst_skipped_steps") for e in one["logs"]
    ]
    assert ("tst_expert_load_max" in result["logs"][0]) == ("moe" in name)
    _, start = CASES[name].get("resume", (None, 0))
    shares = [
        [e["tst_model_flops_utilization"] / e["tst_latent_tokens_per_second"] for e in run["logs"][start:]]
        for run in (result, one)
    ]
    assert [2 * share for share in shares[0]] == pytest.approx(shares[1], rel=1e-3)  # of twice the peak


def test_what_the_cases_are_about_happens(two):
    results = two[1][0]
    assert results["spikes"]["logs"][-1]["tst_skipped_steps"] > 0
    assert min(results["clipped"]["grad_norms"]) > 0.05  # so clipping cut
    assert max(results["unequal_targets"]["losses"]) != max(results["llama"]["losses"])
    assert (
        results["qwen3_moe"]["losses"][0] > results["llama"]["losses"][0] + 0.5
    )  # the auxiliary loss is in it
    assert ["mtp_loss" in entry for entry in results["mtp"]["logs"]] == [i >= SWITCH for i in range(STEPS)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_all_ranks_switch_at_the_same_step(two, name):
    _, start = CASES[name].get("resume", (None, 0))
    switch = 0 if "tst_phase_ratio" in CASES[name] else SWITCH
    micro_batches = CASES[name].get("gradient_accumulation_steps", 1)
    expected = [
        [step, 3 if step < switch else 2] for step in range(start, STEPS) for _ in range(micro_batches)
    ]
    for results in two[1]:
        assert results[name]["passes"] == expected


@pytest.mark.parametrize("name", sorted(name for name in CASES if "resume" in CASES[name]))
def test_a_resumed_run_is_the_uninterrupted_run(two, name):
    out, (results, _) = two
    source, _ = CASES[name]["resume"]
    for key in ("losses", "grad_norms"):
        assert results[name][key] == results[source][key]
    resumed, whole = (load_file(out / case / "weights.safetensors") for case in (name, source))
    assert resumed.keys() == whole.keys()
    assert any(key.startswith("mtp_heads.") for key in whole) == ("mtp" in name)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_processes_that_read_the_same_batches_are_told(two):
    for results in two[1]:
        assert results["not_shared_out"].startswith("0 steps: All 2 processes read the same batches")


@pytest.mark.parametrize("kind", OWN_DATA)
def test_processes_with_different_data_are_told(two, kind):
    for results in two[1]:
        assert results[kind].startswith("0 steps: The processes have different training data")


def test_ranks_with_unequal_targets_can_be_averaged_without_counting_across(two):
    name = "tokens_of_a_rank_unequal"
    model, losses = make_model("llama"), []
    for results in two[1]:
        batch = {key: torch.tensor(value) for key, value in results[name]["first_batch"].items()}
        with token_superposition(model, 4):
            losses.append(model(**batch).loss.item())
    assert abs(losses[0] - losses[1]) > 1e-4
    assert two[1][0][name]["losses"][0] == pytest.approx(sum(losses) / 2, abs=2e-5)
