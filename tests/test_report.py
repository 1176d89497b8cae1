from hf_tst.records.phase_table import phase_rows, plot_loss_curve
from hf_tst.records.text_tables import format_columns

HISTORY = [
    {"step": 2, "loss": 4.0, "tst_current_bag_size": 4, "tst_raw_tokens": 80, "tst_latent_tokens": 20},
    {"step": 3, "loss": 3.5, "tst_current_bag_size": 4, "tst_raw_tokens": 120, "tst_latent_tokens": 30},
    {"step": 3, "eval_loss": 4.5, "tst_current_bag_size": 4},
    {"step": 4, "loss": 5.0, "tst_current_bag_size": 1, "tst_raw_tokens": 130, "tst_latent_tokens": 40},
    {"step": 10, "loss": 3.0, "tst_current_bag_size": 1, "tst_raw_tokens": 190, "tst_latent_tokens": 100},
    {"step": 10, "train_runtime": 1.0, "tst_current_bag_size": 1},
]


def test_phases_are_summed_up():
    _, first, second = phase_rows(HISTORY)
    assert first == ("superposition", "0-2", "120", "30", "4.000", "3.500", "4.500")
    assert second == ("recovery", "3-9", "70", "70", "5.000", "3.000", "-")
    table = format_columns(phase_rows(HISTORY)).splitlines()
    assert len(table) == 3
    assert table[1].split() == ["superposition", "0-2", "120", "30", "4.000", "3.500", "4.500"]


def test_losses_are_those_of_the_next_token_where_extra_heads_train():
    _, only = phase_rows(
        [{**entry, "mtp_loss": 0.5} for entry in HISTORY if entry["tst_current_bag_size"] == 1]
    )
    assert only[4:6] == ("4.500", "2.500")


def test_plain_training_has_one_phase():
    _, only = phase_rows([entry for entry in HISTORY if entry["tst_current_bag_size"] == 1])
    assert only[0] == "recovery"
    assert len(phase_rows([])) == 1  # the header


def test_the_curve_is_a_picture(tmp_path):
    path = plot_loss_curve(HISTORY, tmp_path / "curve.png", switch_step=3)
    assert path.read_bytes().startswith(b"\x89PNG")
    other = plot_loss_curve(HISTORY, tmp_path / "other.png")
    assert other.read_bytes() != path.read_bytes()


def test_evaluations_are_those_of_their_phase_in_the_order_of_the_log():
    """Also between logs, and after the last one."""
    history = [
        {"step": step, "tst_current_bag_size": 1 + (step <= 12), "tst_raw_tokens": step, "tst_latent_tokens": step, "loss": 1.0}
        for step in (10, 20)
    ]  # fmt: skip
    history += [
        {"step": step, "tst_current_bag_size": 1 + (step <= 12), "eval_loss": step}
        for step in (4, 12, 20, 24)
    ]
    history.sort(key=lambda entry: entry["step"])
    _, first, second = phase_rows(history)
    assert (first[-1], second[-1]) == ("12.000", "24.000")
    _, first, second = phase_rows(
        [*history, {"step": 25, "train_runtime": 1.0}, {"step": 25, "eval_loss": 25}]
    )
    assert (first[-1], second[-1]) == ("12.000", "25.000")


def test_the_evaluation_after_training_is_that_of_its_last_phase():
    trained = [{name: value for name, value in entry.items() if name != "eval_loss"} for entry in HISTORY]
    end = trained[-1]["step"]
    *_, last = phase_rows([*trained, {"step": end, "train_runtime": 1.0}, {"step": end, "eval_loss": 1.25}])
    assert last[-1] == "1.250"


def test_steps_are_counted_to_the_end_of_the_run():
    """Beyond the last logged loss, also if recovery logged none."""
    summary = {
        "step": 12,
        "tst_current_bag_size": 1,
        "tst_raw_tokens": 210,
        "tst_latent_tokens": 120,
        "train_loss": 3.0,
    }
    *_, last = phase_rows([*HISTORY, summary])
    assert last[:6] == ("recovery", "3-11", "90", "90", "5.000", "3.000")
    *_, last = phase_rows([*HISTORY[:3], summary])
    assert last[:6] == ("recovery", "3-11", "90", "90", "-", "-")
