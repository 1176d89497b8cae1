"""Arms and budgets: what an arm changes, and how many steps make arms equal."""

import pytest
from conftest import DENSE
from transformers import LlamaConfig

from hf_tst.bags.phases import PhaseSchedule
from hf_tst.experiments.arms import Arm, StepCost, check_arms, define_arms, make_arm
from hf_tst.experiments.budget import fit_to_budget, with_steps
from hf_tst.models.shape import ModelShape
from hf_tst.planning.flops import step_flops

CONFIG = LlamaConfig(**DENSE)
SHAPE = ModelShape.from_config(CONFIG)
TST = PhaseSchedule(20_000, 0.3, 6)
PLAIN = PhaseSchedule(20_000, 0, 6)


def arm(schedule):
    ratio, size, mode = schedule.phase_ratio, schedule.bag_size, schedule.mode
    values = {
        "max_steps": schedule.max_steps,
        "tst_phase_ratio": ratio,
        "tst_bag_size": size,
        "tst_mode": mode,
    }
    return Arm("arm", {}, values, StepCost(1, 1))


def steps_within_budget(budget, costs, **schedules):
    return {name: found.max_steps for name, found in fit_to_budget(budget, costs, schedules).items()}


def test_equal_data_gives_the_baseline_the_papers_steps():
    costs = {"baseline": arm(PLAIN).raw_tokens, "tst": arm(TST).raw_tokens}
    assert steps_within_budget("data", costs, baseline=PLAIN, tst=TST) == {"baseline": 50_000, "tst": 20_000}


def test_data_of_an_arm_that_reads_single_tokens_is_that_of_the_baseline():
    assert arm(PhaseSchedule(20_000, 0.3, 6, "output")).raw_tokens == StepCost(1, 1)


def test_equal_flops_shorten_an_arm_whose_steps_cost_more():
    costs = {"baseline": StepCost(10, 10), "tst": StepCost(10, 10), "mtp": StepCost(13, 13)}
    steps = steps_within_budget("flops", costs, baseline=PLAIN, tst=TST, mtp=PLAIN)
    assert steps == {"baseline": 20_000, "tst": 20_000, "mtp": round(20_000 / 1.3)}


def test_equal_time_counts_both_phases():
    costs = {"tst": StepCost(2.0, 1.0), "baseline": StepCost(9.0, 1.0)}
    steps = steps_within_budget("time", costs, tst=TST, baseline=PLAIN)
    assert steps["baseline"] == 20_000
    assert costs["tst"].of_run(PhaseSchedule(steps["tst"], 0.3, 6)) == pytest.approx(20_000, abs=1.5)


def test_arms_that_whole_steps_cannot_make_equal_are_refused():
    costs, three = {"baseline": StepCost(10, 10), "mtp": StepCost(13, 13)}, PhaseSchedule(3, 0, 6)
    with pytest.raises(
        ValueError, match=r"mtp cannot be equal to baseline in FLOPs: 2 steps are the nearest, but 13\.3% off"
    ):
        steps_within_budget("flops", costs, baseline=three, mtp=three)


def test_stages_of_the_schedule_are_as_long_in_proportion():
    values = {
        "max_steps": 300,
        "warmup_steps": 20,
        "lr_scheduler_kwargs": {"num_decay_steps": 60, "min_lr_ratio": 0.1},
    }
    assert with_steps(values, 750) == {
        "max_steps": 750,
        "warmup_steps": 50,
        "lr_scheduler_kwargs": {"num_decay_steps": 150, "min_lr_ratio": 0.1},
    }
    assert with_steps(values | {"warmup_steps": 0.1}, 750)["warmup_steps"] == 0.1
    assert with_steps(values, 300) == values


def changed(name, values):
    return make_arm(name, define_arms(values)[name], {"max_steps": 10} | values, SHAPE, 16).values


def test_an_arm_changes_what_the_table_says():
    values = {"max_steps": 10, "tst_bag_size": 4, "learning_rate": 1e-3}
    assert changed("tst", values) == values
    assert changed("baseline", values) == values | {"tst_phase_ratio": 0.0, "tst_fused_loss": "on"}
    assert changed("baseline", values | {"tst_fused_loss": "off"})["tst_fused_loss"] == "off"


def test_the_number_of_heads_is_that_of_the_arms_with_multi_token_prediction():
    assert (
        changed("tst+mtp", {})["mtp_num_heads"] == changed("mtp", {"mtp_num_heads": 1})["mtp_num_heads"] == 4
    )
    values = {"mtp_num_heads": 2, "mtp_kind": "sequential"}
    for name in ("mtp", "tst+mtp"):
        assert changed(name, values)["mtp_num_heads"] == 2
    for name in ("baseline", "tst"):
        assert changed(name, values).get("mtp_num_heads", 1) == 1


def test_tst_without_superposition_is_refused():
    plain = {"tst_phase_ratio": 0}
    with pytest.raises(ValueError, match=r"The arm tst needs superposition, but .* tst_phase_ratio=0 "):
        check_arms({"tst": {}}, plain)
    check_arms({"baseline": define_arms(plain)["baseline"]}, plain)


def test_the_flops_of_an_arm_are_those_of_its_steps():
    cost = make_arm("mtp", {"mtp_num_heads": 3}, {"max_steps": 10}, SHAPE, 16).flops
    assert 2 * 16 * cost.superposition == step_flops(CONFIG, 2, 16, phase="superposition", mtp_num_heads=3)
    assert 2 * 16 * cost.recovery == step_flops(CONFIG, 2, 16, mtp_num_heads=3)
    assert cost.recovery > cost.superposition
