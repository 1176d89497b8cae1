from hf_tst.records.report import format_phases, plot_loss_curve, summarize_phases

HISTORY = [
    {"step": 2, "loss": 4.0, "tst_phase": "superposition", "tst_raw_tokens": 80, "tst_latent_tokens": 20},
    {"step": 3, "loss": 3.5, "tst_phase": "superposition", "tst_raw_tokens": 120, "tst_latent_tokens": 30},
    {"step": 3, "eval_loss": 4.5, "tst_phase": "superposition"},
    {"step": 4, "loss": 5.0, "tst_phase": "recovery", "tst_raw_tokens": 130, "tst_latent_tokens": 40},
    {"step": 10, "loss": 3.0, "tst_phase": "recovery", "tst_raw_tokens": 190, "tst_latent_tokens": 100},
    {"step": 10, "train_runtime": 1.0, "tst_phase": "recovery"},
]


def test_phases_are_summed_up():
    first, second = summarize_phases(HISTORY)
    assert (first.first_step, first.last_step, first.raw_tokens, first.latent_tokens) == (0, 2, 120, 30)
    assert (first.first_loss, first.last_loss, first.eval_loss) == (4.0, 3.5, 4.5)
    assert (second.first_step, second.last_step, second.raw_tokens, second.latent_tokens) == (3, 9, 70, 70)
    assert second.eval_loss is None
    table = format_phases([first, second]).splitlines()
    assert len(table) == 3
    assert table[1].split() == ["superposition", "0-2", "120", "30", "4.000", "3.500", "4.500"]


def test_losses_are_those_of_the_next_token_where_extra_heads_train():
    (only,) = summarize_phases(
        [{**entry, "mtp_loss": 0.5} for entry in HISTORY if entry["tst_phase"] == "recovery"]
    )
    assert (only.first_loss, only.last_loss) == (4.5, 2.5)


def test_plain_training_has_one_phase():
    (only,) = summarize_phases([entry for entry in HISTORY if entry["tst_phase"] == "recovery"])
    assert only.phase == "recovery"
    assert summarize_phases([]) == []


def test_the_curve_is_a_picture(tmp_path):
    path = plot_loss_curve(HISTORY, tmp_path / "curve.png", switch_step=3)
    assert path.read_bytes().startswith(b"\x89PNG")
    other = plot_loss_curve(HISTORY, tmp_path / "other.png")
    assert other.read_bytes() != path.read_bytes()
