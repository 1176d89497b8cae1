from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_report import HISTORY

from hf_tst import TSTError
from hf_tst.records.card import RunRecord, make_model_card, write_model_card
from hf_tst.records.run_record import NOTES, RUN_NOTE

CARDS = Path(__file__).parent.parent / "model_cards"
ARGUMENTS = {
    "tst_phase_ratio": 0.3, "tst_bag_size": 4, "tst_mode": "full", "tst_offset_weighting": "power_law",
    "optim": "adamw_torch", "learning_rate": 2e-3, "lr_scheduler_type": "linear", "seed": 7, "hub_token": "hf_secret",
}  # fmt: skip


def make_record(**changes):
    values = {
        "log_history": HISTORY, "max_steps": 10, "switch_step": 3, "arguments": ARGUMENTS, "rows_per_step": 5,
        "total_flos": 1.5e9, "parameters": 1234, "hardware": "2 x H100", "evaluation": {"eval_loss": 2.0, "eval_runtime": 1.0},
    }  # fmt: skip
    return RunRecord(**values | changes)


def test_the_card_says_what_the_record_says():
    card = make_model_card(
        make_record(), repo_id="me/model", base_model="other/base", datasets=["a/b"], curve="c.png"
    )
    assert card.data.model_name == "model"
    assert card.data.base_model == "other/base"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "loss": 2.0,
        "perplexity": pytest.approx(7.389, abs=1e-3),
    }
    for said in (
        "first 3 of 10 optimizer steps (r = 0.3)",
        "s = 4 contiguous tokens",
        "`power_law`",
        "| superposition | 0-2 | 120 | 30 | 4.000 | 3.500 | 4.500 |",
        "| recovery | 3-9 | 70 | 70 | 5.000 | 3.000 | - |",
        "2 x H100",
        "1,234",
        "2605.06546",
        "![",
        'from_pretrained("me/model")',
    ):
        assert said in card.text, said
    assert "hf_secret" not in str(card)


def test_plain_training_and_runs_without_evaluation_say_so():
    record = make_record(
        switch_step=0, evaluation={}, log_history=[e for e in HISTORY if e["tst_current_bag_size"] == 1]
    )
    card = make_model_card(record, repo_id="model")
    assert "superposition was off" in card.text
    assert "token-superposition" not in card.data.tags
    assert card.data.eval_results is None
    assert "## Evaluation" not in card.text
    assert "![" not in card.text


@pytest.mark.parametrize(
    ("mode", "words", "others"),
    [
        ("input", "predicted the first token of the next bag", "offset weights"),
        ("output", "the model read single tokens", "bag"),
    ],
)
def test_the_other_modes_are_told_apart(mode, words, others):
    card = make_model_card(make_record(arguments=ARGUMENTS | {"tst_mode": mode}), repo_id="model")
    assert words in card.text
    assert others not in card.text[card.text.index("In the first") : card.text.index("The remaining")]


def test_the_weightings_are_told():
    card = make_model_card(
        make_record(arguments=ARGUMENTS | {"tst_input_weighting": "linear"}), repo_id="model"
    )
    assert "(input weights: `linear`)" in card.text
    assert "(offset weights: `power_law`)" in card.text


def test_extra_heads_are_told():
    card = make_model_card(
        make_record(arguments=ARGUMENTS | {"mtp_num_heads": 3, "mtp_kind": "sequential"}), repo_id="model"
    )
    assert "2 extra sequential heads predicted tokens after the next one" in card.text
    assert "extra" not in make_model_card(make_record(), repo_id="model").text


def test_a_card_of_the_users_own_stays(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\n---\n# Mine\n")
    with pytest.raises(TSTError, match="was not written by a trainer"):
        write_model_card(tmp_path, make_record(), repo_id="model")
    assert "# Mine" in path.read_text()
    path.unlink()
    assert write_model_card(tmp_path, make_record(), repo_id="model") == path
    assert (tmp_path / "loss_curve.png").is_file()
    assert write_model_card(tmp_path, make_record(max_steps=99), repo_id="model") == path
    assert "of 99 optimizer steps" in ModelCard.load(path).text


def test_metadata_that_is_not_given_is_kept(tmp_path):
    given = {"datasets": ["a/b"], "language": "en", "base_model": "other/base", "tags": ["mine"]}
    path = write_model_card(tmp_path, make_record(), repo_id="model", **given)
    path.write_text(path.read_text().replace("language: en", "language: en\nlicense_name: own"))  # by hand
    write_model_card(tmp_path, make_record(switch_step=0, max_steps=99), license="mit", datasets=[])
    card = ModelCard.load(path)
    assert "of 99 optimizer steps" in card.text or "All 99 optimizer steps" in card.text
    assert "a/b" in card.text
    assert (card.data.datasets, card.data.language, card.data.base_model) == (["a/b"], "en", "other/base")
    assert (card.data.license, card.data["license_name"]) == ("mit", "own")
    assert card.data.tags == ["mine", "generated_from_trainer"]
    write_model_card(tmp_path, make_record(), license="apache-2.0", tags=["new"])
    assert ModelCard.load(path).data.license == "apache-2.0"
    assert ModelCard.load(path).data.tags == ["new", "generated_from_trainer", "token-superposition"]


@pytest.mark.parametrize("where", ["at the end", "inside"])
def test_a_card_that_was_edited_stays(tmp_path, where):
    path = write_model_card(tmp_path, make_record(), repo_id="model")
    text = path.read_text()
    edited = (
        f"{text}\nMine.\n"
        if where == "at the end"
        else text.replace("## Training\n", "Mine.\n\n## Training\n")
    )
    path.write_text(edited)
    with pytest.raises(
        TSTError, match="was edited after it was written, and is not overwritten: move it away"
    ):
        write_model_card(tmp_path, make_record(), repo_id="model", license="mit")
    assert path.read_text() == edited


def test_a_card_that_cannot_be_read_stays(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\ntags: [\n---\n# Mine\n")
    with pytest.raises(TSTError, match="was not written by a trainer"):
        write_model_card(tmp_path, make_record(), repo_id="model")
    assert "# Mine" in path.read_text()


def test_the_evaluation_is_that_of_the_weights():
    def evaluated(*after, loads_best=True):
        entry = {"switch_step": 0, "rows_per_step": 1, "arguments": {"load_best_model_at_end": loads_best}, "parameters": 1,
                 "hardware": "", "software": "", "base_model": None, "library_name": "transformers"}  # fmt: skip
        history = [
            {"eval_loss": 2.0, "step": 5}, {"eval_loss": 3.0, "step": 10},
            {"train_runtime": 1.0, "step": 10}, *after,
        ]  # fmt: skip
        state = {
            "log_history": history,
            "stateful_callbacks": {NOTES: [{RUN_NOTE: entry, "step": 0}]},
            "best_global_step": 5,
            "max_steps": 10,
            "global_step": 10,
            "total_flos": 0,
        }
        return RunRecord.from_state(state).evaluation["eval_loss"]

    assert evaluated() == 2.0
    assert evaluated(loads_best=False) == 3.0
    assert evaluated({"eval_loss": 2.1, "step": 10}) == 2.1


def test_seconds_are_those_of_the_whole_run():
    # 1,000 tokens at 100 a second; then, resumed from there, as many at 50.
    speeds = [(5, 500, 100.0), (10, 1000, 100.0), (20, 2000, 50.0)]
    history = [
        {
            "tst_latent_tokens": tokens,
            "tst_latent_tokens_per_second": speed,
            "tst_current_bag_size": 1,
            "step": step,
        }
        for step, tokens, speed in speeds
    ] + [
        {"train_runtime": 21.0, "step": 20},
    ]
    assert "| seconds of training, without evaluation | 30 |" in str(
        make_model_card(make_record(log_history=history), repo_id="me/model")
    )


def test_the_card_of_a_run_that_is_not_over_says_so():
    card = make_model_card(make_record(global_step=2), repo_id="model")
    assert "**The run is not finished**: this is the model after 2 of 10 optimizer steps." in card.text
    assert "The remaining steps will be next-token training" in card.text
    assert "The run is not finished" not in make_model_card(make_record(global_step=10), repo_id="model").text


def test_superposition_is_claimed_only_of_runs_that_had_it():
    plain, superposed = (make_model_card(make_record(switch_step=n), repo_id="model").text for n in (0, 3))
    assert "trained with Token Superposition Training" in superposed
    assert "@article{peng2026token" in superposed
    assert "trained by next-token prediction" in plain
    assert "trained with Token Superposition Training" not in plain
    assert "@article" not in plain


def test_an_adapter_is_called_one():
    card = make_model_card(make_record(library_name="peft", base_model="other/base"), repo_id="model")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "other/base"
    assert "ordinary PEFT adapter" in card.text


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in CARDS.glob("*/README.md")))
def test_the_cards_here_are_what_their_records_give(folder):
    card = ModelCard.load(CARDS / folder / "README.md")
    record = RunRecord.from_folder(CARDS / folder)
    again = make_model_card(
        record,
        repo_id=f"runs/{folder}",
        license=card.data.license,
        curve="loss_curve.png",
        language=card.data.language,
    )
    assert str(again).strip() == str(card).strip()
