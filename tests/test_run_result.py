"""The result of a run: its curve and clock from the log, what counts as diverged, its file."""

import json
import math

import pytest

from hf_tst.bags.phases import PhaseSchedule
from hf_tst.experiments.result import RunResult, result_of_run
from hf_tst.records.run_record import timed_steps

RUN = {"parameters": 7, "hardware": "1 x Abacus", "software": "torch 99"}
SCHEDULE = PhaseSchedule(10, 0.4, 3)


def log(step, speed, bag_size=3):
    return {
        "step": step, "loss": 1.0, "tst_current_bag_size": bag_size, "tst_latent_tokens": 100 * step, "tst_latent_tokens_per_second": speed,
    }  # fmt: skip


def history(*losses):
    """Ten steps of 100 tokens, four on bags of 3, evaluated before, in the middle of and after training."""
    first, middle, last = losses
    return [
        {"step": 0, "eval_loss": first},
        log(2, 10.0),
        log(4, 50.0),
        {"step": 5, "eval_loss": middle},
        log(6, 100.0, 1),
        log(8, 200.0, 1),
        {"step": 10, "eval_loss": last},
    ]


def test_tokens_and_seconds_at_each_evaluation():
    result = result_of_run(history(5.0, 4.0, 3.0), SCHEDULE, 100, RUN)
    assert [point.step for point in result.curve] == [0, 5, 10]
    assert [point.latent_tokens for point in result.curve] == [0, 500, 1000]
    assert [point.raw_tokens for point in result.curve] == [0, 4 * 300 + 100, 4 * 300 + 600]
    # 20 s for the first two steps, 4 s for the next two, then 1 s a step, 0.5 s a step, and so on to the end.
    assert [point.seconds for point in result.curve] == pytest.approx([0, 25, 28])
    assert result.seconds_per_step == pytest.approx({"superposition": 2.0, "recovery": 0.5})
    assert (result.curve[-1].step, result.initial_eval_loss, result.final_eval_loss) == (10, 5.0, 3.0)


def test_tokens_that_were_left_out_at_document_ends_are_not_counted():
    entries = history(5.0, 4.0, 3.0)
    entries[2]["tst_tokens_left_out"] = 30
    assert result_of_run(entries, SCHEDULE, 100, RUN).curve[-1].raw_tokens == 4 * 300 + 600 - 30


def test_time_is_that_of_the_steps_whatever_the_length_of_rows():
    # Rows of 512 tokens, then of 128, each 10 steps at 1,000 tokens a second; counts are multiples of the last length.
    rows = [(10, 512), (20, 128)]
    history = [log(step, 1000.0, 1) | {"tst_latent_tokens": step * length} for step, length in rows]
    assert [timed.seconds for timed in timed_steps(history)] == pytest.approx([5.12, 1.28])


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ((5, 4, 3), False), ((5, 4, math.nan), True), ((5, 4, math.inf), True), ((5, 4, 5.1), True), ((5, math.nan, 4), False),
        ((9, 3, 5), False), ((9, 3, 7), True), ((9, 9, 9.5), True), ((math.nan, 5, 9), False),
        # A trained model goes on: what it gains and loses is noise, until it is much.
        ((3, 2.99, 2.996), False), ((3, 2.99, 3.02), False), ((3, 2.9, 3.3), True),
    ],
)  # fmt: skip
def test_no_finite_loss_or_half_the_gain_lost_is_divergence(losses, diverged):
    assert result_of_run(history(*losses), SCHEDULE, 100, RUN).has_diverged is diverged


def test_the_file_is_json_and_comes_back(tmp_path):
    assert RunResult.load(tmp_path) is None
    result = result_of_run(history(5.0, math.nan, 3.0), SCHEDULE, 100, RUN)
    result.save(tmp_path)
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert RunResult.load(tmp_path) == result
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        RunResult.load(tmp_path)


def test_a_run_without_evaluation_is_refused():
    with pytest.raises(ValueError, match="was not evaluated"):
        result_of_run([log(2, 10.0)], SCHEDULE, 100, RUN)
