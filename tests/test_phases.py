import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_tst import PhaseSchedule


def test_switch_is_the_rounded_share_of_the_steps():
    assert PhaseSchedule(49_983, 12_483 / 49_983, 16).switch_step == 12_483
    assert PhaseSchedule(10, 0.26, 4).switch_step == 3
    assert PhaseSchedule(10, 0, 4).switch_step == 0
    assert PhaseSchedule(10, 1, 4).switch_step == 10


@given(st.integers(1, 500), st.floats(0, 1), st.integers(1, 16), st.integers(1, 64))
def test_counts_equal_a_walk_over_the_steps(steps, ratio, bag_size, rows):
    schedule = PhaseSchedule(steps, ratio, bag_size)
    tokens_per_step = rows * 8
    blocks = tokens = 0
    for step in range(steps):
        reads = bag_size if schedule.phase(step) == "superposition" else 1
        blocks += rows * reads
        assert schedule.amount_read(step, tokens_per_step) == tokens
        tokens += tokens_per_step * reads
    assert schedule.blocks_needed(rows) == blocks
    assert schedule.amount_read(steps, tokens_per_step) == tokens


def test_output_mode_reads_no_more_than_plain_training():
    assert PhaseSchedule(10, 0.5, 4, mode="output").blocks_needed(3) == 30


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf, "0.3", None])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match="phase_ratio must be"):
        PhaseSchedule(10, ratio, 4)


@pytest.mark.parametrize("bag_size", [0, -1, 2.5, None])
def test_a_bag_of_no_tokens_is_refused(bag_size):
    with pytest.raises(ValueError, match="bag_size must be"):
        PhaseSchedule(10, 0.3, bag_size)


def test_other_nonsense_is_refused():
    with pytest.raises(ValueError, match="max_steps"):
        PhaseSchedule(0, 0.3, 4)
    with pytest.raises(ValueError, match="mode must be"):
        PhaseSchedule(10, 0.3, 4, mode="both")
