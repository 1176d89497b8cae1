import dataclasses
import math
import subprocess
import sys

import pytest
from transformers import HfArgumentParser

from hf_tst import TSTTrainer, TSTTrainingArguments
from hf_tst.bags.weighting import OFFSET_WEIGHTINGS

FIELDS = [
    field for field in dataclasses.fields(TSTTrainingArguments) if field.name.startswith(("tst_", "mtp_"))
]


def test_defaults():
    args = TSTTrainingArguments(output_dir="x")
    assert {field.name: getattr(args, field.name) for field in FIELDS} == {
        "tst_phase_ratio": 0.3,
        "tst_bag_size": 6,
        "tst_offset_weighting": "uniform",
        "tst_input_weighting": "uniform",
        "tst_mode": "full",
        "tst_superposition_rows": "longer",
        "tst_save_at_switch": True,
        "tst_fused_loss": "auto",
        "tst_document_boundaries": "ignore",
        "tst_allow_data_change": False,
        "mtp_num_heads": 1,
        "mtp_kind": "parallel",
        "mtp_loss_weight": None,
        "mtp_loss_weight_end": None,
        "tst_nonfinite_loss": "stop",
        "tst_spikes": "ignore",
        "tst_spike_threshold": 6.0,
        "tst_spike_window": 128,
        "tst_peak_tflops": None,
    }


def test_every_field_has_help_and_comes_through_the_parser():
    assert all(field.metadata["help"] for field in FIELDS)
    flags = "--output_dir x --tst_phase_ratio 0.2 --tst_bag_size 8 --tst_offset_weighting power_law --tst_mode output"
    (args,) = HfArgumentParser(TSTTrainingArguments).parse_args_into_dataclasses(
        [*flags.split(), "--no_tst_save_at_switch"]
    )
    assert args.tst_phase_ratio == 0.2
    assert args.tst_bag_size == 8
    assert args.tst_offset_weighting == "power_law"
    assert args.tst_mode == "output"
    assert not args.tst_save_at_switch


@pytest.mark.parametrize("weighting", OFFSET_WEIGHTINGS)
def test_arguments_survive_a_round_trip(weighting):
    args = TSTTrainingArguments(output_dir="x", tst_offset_weighting=weighting)
    again = {field.name: args.to_dict()[field.name] for field in FIELDS}
    assert TSTTrainingArguments(output_dir="x", **again).to_dict()["tst_offset_weighting"] == weighting


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tst_phase_ratio": 1.5}, "tst_phase_ratio"),
        ({"tst_phase_ratio": math.nan}, "tst_phase_ratio"),
        ({"tst_bag_size": 0}, "tst_bag_size"),
        ({"tst_offset_weighting": "linear"}, "tst_offset_weighting"),
        ({"tst_input_weighting": "power_law"}, "tst_input_weighting"),
        ({"tst_mode": "both"}, "tst_mode"),
        ({"tst_superposition_rows": "shorter"}, "tst_superposition_rows"),
        ({"tst_mode": "output", "tst_superposition_rows": "more"}, "reads single tokens"),
        ({"tst_fused_loss": "yes"}, "tst_fused_loss"),
        ({"mtp_num_heads": 0}, "mtp_num_heads"),
        ({"mtp_num_heads": 2.0}, "mtp_num_heads"),
        ({"mtp_num_heads": True}, "mtp_num_heads"),
        ({"mtp_kind": "tree"}, "mtp_kind"),
        ({"mtp_loss_weight": -1}, "mtp_loss_weight"),
        ({"tst_spikes": "hope"}, "tst_spikes"),
        ({"tst_spike_threshold": math.nan}, "tst_spike_threshold"),
        ({"tst_spike_window": 1}, "tst_spike_window"),
        ({"mtp_loss_weight_end": "none"}, "mtp_loss_weight_end"),
        ({"mtp_loss_weight": math.nan}, "mtp_loss_weight"),
        (
            {"tst_phase_ratio": 0, "tst_fused_loss": "on", "label_smoothing_factor": 0.1},
            "label_smoothing_factor",
        ),
        ({"tst_mode": "input", "tst_offset_weighting": "power_law"}, "single target"),
        ({"tst_mode": "output", "tst_input_weighting": "linear"}, "reads single tokens"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"use_liger_kernel": True}, "liger"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TSTTrainingArguments(output_dir="x", **wrong)


def test_sorting_rows_by_length_is_refused():
    names = {field.name for field in dataclasses.fields(TSTTrainingArguments)}
    wrong = (
        {"train_sampling_strategy": "group_by_length"}
        if "train_sampling_strategy" in names
        else {"group_by_length": True}
    )
    with pytest.raises(ValueError, match="group_by_length"):
        TSTTrainingArguments(output_dir="x", **wrong)


def test_plain_training_may_use_what_superposition_cannot():
    TSTTrainingArguments(output_dir="x", tst_phase_ratio=0, label_smoothing_factor=0.1)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, hf_tst; print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_the_trainer_needs_neither_datasets_nor_evaluate_nor_peft():
    code = (
        "import sys\n"
        "for name in ('datasets', 'pyarrow', 'evaluate', 'peft', 'matplotlib'): sys.modules[name] = None\n"
        "from hf_tst import *\n"
        "import hf_tst.data.quickstart, hf_tst.data.files, hf_tst.records.phase_table, hf_tst.training.audit\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 10), (20, 10), (95, 5)])
def test_warmup_stable_decay_decays_over_the_last_tenth(llama, tmp_path, warmup, decay):
    """Counted by hand from the learning rates of the steps; what is given is kept."""

    def rates(**options):
        args = TSTTrainingArguments(
            str(tmp_path), max_steps=100, warmup_steps=warmup, lr_scheduler_type="warmup_stable_decay", learning_rate=1.0,
            use_cpu=True, report_to="none", **options,
        )  # fmt: skip
        trainer = TSTTrainer(llama, args)
        trainer.create_optimizer()
        scheduler = trainer.create_scheduler(100)
        return [scheduler.lr_lambdas[0](step) for step in range(101)]

    found = rates()
    assert found[warmup : 101 - decay] == [1.0] * (101 - decay - warmup)
    assert all(later < earlier for earlier, later in zip(found[-decay - 1 :], found[-decay:], strict=False))
    assert found[100] == 0
    given = rates(lr_scheduler_kwargs={"num_decay_steps": 3})
    assert given[97] == 1.0 > given[98]


@pytest.mark.parametrize(
    ("ratio", "kind", "warns"),
    [(0.3, "reduce_lr_on_plateau", True), (0, "reduce_lr_on_plateau", False), (0.3, "cosine", False)],
)
def test_a_schedule_that_follows_evaluation_is_warned_of(ratio, kind, warns, tmp_path, caplog):
    TSTTrainingArguments(
        str(tmp_path), tst_phase_ratio=ratio, lr_scheduler_type=kind, eval_strategy="steps", eval_steps=5
    )
    assert ("hardly improves in superposition" in caplog.text) == warns
