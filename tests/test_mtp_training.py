"""Multi-token prediction in the trainer: the plain run, one large batch, resuming, what is saved, what is refused."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import BLOCK_LENGTH, VOCAB_SIZE, losses, make_blocks, make_model, set_dropout
from safetensors.torch import load_file
from test_resume import StopAt
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_tst import TSTTrainer
from hf_tst.mtp.heads import MTP_KINDS
from hf_tst.training.callbacks.extra_heads import FILE_NAME

SWITCH = 3  # of 10 steps with the default tst_phase_ratio


class Heads(TrainerCallback):
    """Copies of the extra heads after every step, and whether the model had them."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        heads = getattr(model, "mtp_heads", None)
        self.weights.append(None if heads is None else copy.deepcopy(heads.state_dict()))


def weights_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.mark.parametrize("kind", MTP_KINDS)
def test_with_one_head_it_is_the_plain_trainer_bit_for_bit(llama, make_args, kind):
    set_dropout(llama)
    other, heads = copy.deepcopy(llama), Heads()
    args = make_args(tst_phase_ratio=0, mtp_num_heads=1, mtp_kind=kind, mtp_loss_weight=2.0)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(40), callbacks=[heads])
    trainer.train()
    known = TrainingArguments.__dataclass_fields__
    values = {k: v for k, v in args.to_dict().items() if k in known and known[k].init}
    plain = Trainer(other, TrainingArguments(**values), train_dataset=make_blocks(40))
    plain.train()
    assert losses(trainer) == losses(plain)
    assert weights_equal(llama.state_dict(), other.state_dict())
    assert heads.weights == [None] * 10


@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen3_moe", "gpt2"])
def test_heads_train_in_next_token_steps_only(make_args, family, kind, ratio):
    heads = Heads()
    weight = 1.0 if kind == "parallel" else 0.3
    args = make_args(
        tst_phase_ratio=ratio, mtp_num_heads=3, mtp_kind=kind, mtp_loss_weight=weight, weight_decay=0.1
    )
    model = make_model(family)
    start = copy.deepcopy(model.state_dict())
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(200), callbacks=[heads])
    trainer.train()
    first = SWITCH if ratio else 0
    assert len(heads.weights) == 10
    assert all(weights_equal(heads.weights[0], later) for later in heads.weights[1:first])
    for earlier, later in zip(
        heads.weights[max(first - 1, 0) :], heads.weights[first + (not ratio) :], strict=False
    ):
        assert not any(torch.equal(earlier[name], later[name]) for name in earlier)
    assert not any(torch.equal(start[name], weight) for name, weight in model.state_dict().items())
    found = losses(trainer)
    if ratio:
        assert found[first] > found[first - 1] + 0.5  # the losses of the extra heads
    else:
        # Random tokens: log V a target; the extra heads have 10 and 9 where the next token has 11.
        extra = weight * 19 / (11 if kind == "parallel" else 22)
        assert found[0] > 0.9 * math.log(VOCAB_SIZE) * (1 + extra)
    if "router_aux_loss_coef" in model.config.to_dict():
        assert any("tst_expert_load_max" in entry for entry in trainer.state.log_history)


def test_extra_heads_have_the_weight_decay_of_their_kind(llama, make_args):
    groups = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(p): name for name, p in model.named_parameters()}
            groups.extend({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)

    args = make_args(mtp_num_heads=2, mtp_kind="sequential", weight_decay=0.1)
    TSTTrainer(llama, args, train_dataset=make_blocks(200), callbacks=[Look()]).train()
    decayed, others = groups
    assert {n.split("heads.0.")[1] for n in others if "mtp_heads" in n} == {
        "hidden_norm.weight",
        "embedding_norm.weight",
        "layer.input_layernorm.weight",
        "layer.post_attention_layernorm.weight",
    }
    assert "mtp_heads.heads.0.projection.weight" in decayed
    assert "mtp_heads.heads.0.layer.mlp.up_proj.weight" in decayed


@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_accumulation_gives_one_large_batch(make_args, family, kind, ratio):
    blocks = make_blocks(200)
    for block in blocks[::3]:
        block["labels"] = [-100] * 5 + block["labels"][5:]  # micro-batches with different numbers of targets
    common = {
        "tst_phase_ratio": ratio, "mtp_num_heads": 3, "mtp_kind": kind, "optim": "sgd", "learning_rate": 0.1,
        "max_grad_norm": 0,
    }  # fmt: skip
    found = []
    for rows, accumulation in ((8, 1), (2, 4)):
        # The auxiliary loss of a mixture is not linear in the batch, with or without this package.
        model = make_model(family, **({"output_router_logits": False} if "moe" in family else {}))
        args = make_args(per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, **common)
        trainer = TSTTrainer(model, args, train_dataset=blocks)
        trainer.train()
        found.append((losses(trainer), model.state_dict()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_bfloat16_stays_close_to_float32(make_args, family, kind, ratio):
    found, heads = [], [Heads(), Heads()]
    common = {"tst_phase_ratio": ratio, "mtp_num_heads": 3, "mtp_kind": kind, "learning_rate": 3e-3}
    for bf16, noted in zip((False, True), heads, strict=True):
        args = make_args(bf16=bf16, adam_epsilon=1e-3, **common)
        trainer = TSTTrainer(make_model(family), args, train_dataset=make_blocks(200), callbacks=[noted])
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append([[e["loss"], e["loss"] - e.get("mtp_loss", 0), e["grad_norm"]] for e in entries])
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    exact, rounded = (torch.tensor(values) for values in found)
    assert rounded.isfinite().all()
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded[:, :2], exact[:, :2], rtol=5e-3, atol=0)
    torch.testing.assert_close(rounded[:, 2], exact[:, 2], rtol=0.1, atol=0)
    torch.testing.assert_close(heads[1].weights[-1], heads[0].weights[-1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize(("ratio", "stop"), [(0, 4), (0.3, 2), (0.3, 3), (0.3, 7)])
def test_a_resumed_run_is_the_uninterrupted_run(llama, make_args, tmp_path, kind, ratio, stop):
    """In a plain run, before the switch, at it, and after it."""
    blocks = make_blocks(200)
    resumed_model = copy.deepcopy(set_dropout(llama))
    common = {"tst_phase_ratio": ratio, "mtp_num_heads": 3, "mtp_kind": kind}
    heads, heads_again = Heads(), Heads()
    args = make_args(save_strategy="steps", save_steps=stop, **common)
    whole = TSTTrainer(llama, args, train_dataset=blocks, callbacks=[heads])
    whole.train()
    checkpoint = Path(args.output_dir) / f"checkpoint-{stop}"
    args = make_args(output_dir=str(tmp_path / "resumed"), **common)
    resumed = TSTTrainer(resumed_model, args, train_dataset=blocks, callbacks=[heads_again])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    assert weights_equal(resumed_model.state_dict(), llama.state_dict())
    assert weights_equal(heads_again.weights[-1], heads.weights[-1])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_what_is_saved_is_the_ordinary_model(make_args, tmp_path, family):
    model = make_model(family)
    model.save_pretrained(tmp_path / "plain")
    args = make_args(mtp_num_heads=3, save_strategy="steps", save_steps=4)
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(200))
    trainer.train()
    trainer.save_model()
    checkpoint, final = Path(args.output_dir) / "checkpoint-8", Path(args.output_dir)
    for folder in (checkpoint, final):
        keys = [set(load_file(where / "model.safetensors")) for where in (tmp_path / "plain", folder)]
        assert keys[0] == keys[1]
        configs = [json.loads((where / "config.json").read_text()) for where in (tmp_path / "plain", folder)]
        assert configs[0] | {"use_cache": False} == configs[1] | {
            "use_cache": False
        }  # Trainer switches caches off
    assert (checkpoint / FILE_NAME).is_file()
    assert not (final / FILE_NAME).exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert weights_equal(loaded.state_dict(), model.state_dict())
    assert not hasattr(model, "mtp_heads")


def test_the_best_model_is_loaded_without_complaint(llama, make_args, caplog):
    args = make_args(
        mtp_num_heads=2, save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4))
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "missing" not in caplog.text
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(llama.state_dict()[name], weight) for name, weight in saved.items())


@pytest.mark.parametrize("kind", MTP_KINDS)
def test_evaluation_is_next_token_without_extra_heads(llama, make_args, kind):
    evaluation, found = make_blocks(4, seed=9), []

    class Compare(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
            clean = make_model("llama").eval()
            clean.load_state_dict(model.state_dict())
            ids = torch.tensor([block["input_ids"] for block in evaluation])
            found.append((metrics["eval_loss"], clean(input_ids=ids, labels=ids).loss.item()))

    args = make_args(
        mtp_num_heads=3, mtp_kind=kind, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4
    )
    TSTTrainer(
        llama, args, train_dataset=make_blocks(200), eval_dataset=evaluation, callbacks=[Compare()]
    ).train()
    assert len(found) == 5
    for ours, plain in found:
        assert ours == pytest.approx(plain, rel=1e-6)


def test_gradient_checkpointing_and_document_boundaries(llama, make_args):
    blocks = make_blocks(200)
    for block in blocks:
        block["document_ids"] = [0] * 5 + [1] * 7
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(llama)
        args = make_args(
            mtp_num_heads=3, tst_document_boundaries="respect", gradient_checkpointing=checkpointing
        )
        trainer = TSTTrainer(model, args, train_dataset=blocks)
        trainer.train()
        found.append(losses(trainer))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_trainer_trains_again_and_leaves_the_model_after_an_error(llama, make_args):
    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.at:
                raise KeyError

    fail = Fail()
    fail.at = 5
    args = make_args(mtp_num_heads=2)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), callbacks=[fail])
    with pytest.raises(KeyError):
        trainer.train()
    assert not hasattr(llama, "mtp_heads")
    fail.at = None
    trainer.train()
    assert trainer.state.global_step == 10
    assert not hasattr(llama, "mtp_heads")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"mtp_num_heads": 3}, {}, "was trained with mtp_kind=parallel, mtp_num_heads=3, but this run has mtp_num_heads=1"),
        ({}, {"mtp_num_heads": 2}, "was trained with mtp_num_heads=1, but"),
        ({"mtp_num_heads": 3}, {"mtp_num_heads": 2}, "but this run has mtp_kind=parallel, mtp_num_heads=2"),
        ({"mtp_num_heads": 2}, {"mtp_num_heads": 2, "mtp_kind": "sequential"}, "mtp_kind=sequential"),
    ],
)  # fmt: skip
def test_other_heads_than_those_of_the_checkpoint_are_refused(llama, make_args, before, after, message):
    args = make_args(save_strategy="steps", save_steps=5, **before)
    TSTTrainer(llama, args, train_dataset=make_blocks(200)).train()
    trainer = TSTTrainer(llama, make_args(**after), train_dataset=make_blocks(200))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-5"))


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("arguments", "trainer_arguments", "wrap", "message"),
    [
        ({"torch_compile": True}, {}, None, "torch_compile"),
        ({"label_smoothing_factor": 0.1, "tst_phase_ratio": 0}, {}, None, "label_smoothing_factor"),
        ({"tst_phase_ratio": 0}, {"compute_loss_func": lambda *args, **kwargs: None}, None, "compute_loss_func"),
        ({}, {}, lora, "PEFT"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused_before_training(
    llama, make_args, arguments, trainer_arguments, wrap, message
):
    args = make_args(mtp_num_heads=2, **arguments)
    with pytest.raises(ValueError, match=f"mtp_num_heads=2 does not work with {message}"):
        TSTTrainer(wrap(llama) if wrap else llama, args, train_dataset=make_blocks(200), **trainer_arguments)


def test_model_init_is_refused(make_args):
    with pytest.raises(ValueError, match="model_init"):
        TSTTrainer(
            args=make_args(mtp_num_heads=2),
            model_init=lambda: make_model("llama"),
            train_dataset=make_blocks(200),
        )


def test_an_optimizer_without_the_heads_is_refused(llama, make_args):
    optimizers = (torch.optim.SGD(llama.parameters(), lr=0.1), None)
    args = make_args(mtp_num_heads=2)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), optimizers=optimizers)
    with pytest.raises(ValueError, match="would not train them"):
        trainer.train()
    assert not hasattr(llama, "mtp_heads")


@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize("ratio", [0, 0.3])
def test_the_share_of_the_extra_heads_in_the_loss_is_logged(llama, make_args, kind, ratio):
    """What is left is the next-token loss: that of a run without extra heads, as long as nothing is learned."""
    found = []
    for num_heads in (1, 3):
        args = make_args(
            tst_phase_ratio=ratio, mtp_num_heads=num_heads, mtp_kind=kind, mtp_loss_weight=1.0, learning_rate=0, logging_steps=2,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = TSTTrainer(copy.deepcopy(llama), args, train_dataset=make_blocks(200))
        trainer.train()
        found.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for plain, entry in zip(*found, strict=True):
        trains = entry["tst_current_bag_size"] == 1
        assert ("mtp_loss" in entry) == trains
        assert "mtp_loss" not in plain
        assert entry["loss"] - entry.get("mtp_loss", 0) == pytest.approx(plain["loss"], abs=2e-5)
        assert not trains or entry["mtp_loss"] > 1


@pytest.mark.parametrize("stop", [None, 2, 6])
@pytest.mark.parametrize("ratio", [0, 0.3])
def test_the_weight_falls_in_a_straight_line_over_next_token_training(llama, make_args, ratio, stop):
    """The loss of untrained heads is the same in all steps but for its weight; also in a resumed run."""
    args = make_args(
        tst_phase_ratio=ratio, mtp_num_heads=2, mtp_loss_weight=0.9, mtp_loss_weight_end=0.1, learning_rate=0,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    callbacks = [] if stop is None else [StopAt(stop)]
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200), callbacks=callbacks)
    trainer.train()
    if stop:
        trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200))
        trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-{stop}")
    entries = [entry for entry in trainer.state.log_history if "mtp_loss" in entry]
    first = SWITCH if ratio else 0
    assert len(entries) == 10 - first
    weights = [0.9 - 0.8 * i / (9 - first) for i in range(10 - first)]
    assert [entry["mtp_loss_weight"] for entry in entries] == pytest.approx(weights, abs=1e-6)
    losses_of_heads = [entry["mtp_loss"] / weight for entry, weight in zip(entries, weights, strict=True)]
    # The extra head has 10 targets where the next token has 11.
    assert losses_of_heads == pytest.approx([10 / 11 * math.log(VOCAB_SIZE)] * len(entries), rel=0.05)


@pytest.mark.parametrize("mode", ["full", "output"])
def test_flops_are_counted_where_heads_train(llama, make_args, mode):
    found = []
    for num_heads in (1, 2):
        args = make_args(mtp_num_heads=num_heads, tst_mode=mode, tst_phase_ratio=0.3)
        trainer = TSTTrainer(copy.deepcopy(llama), args, train_dataset=make_blocks(200))
        trainer.train()
        found.append(trainer.state.total_flos)
    layer = sum(p.numel() for p in llama.model.layers[-1].parameters())
    head, attention = VOCAB_SIZE * 16, 12 * 16 * BLOCK_LENGTH
    assert found[1] - found[0] == (6 * (layer + head) + attention) * (10 - SWITCH) * 2 * BLOCK_LENGTH


def test_the_card_is_that_of_the_model_that_is_saved(llama, make_args):
    args = make_args(mtp_num_heads=3)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200))
    trainer.train()
    trainer.create_model_card()
    card = (Path(args.output_dir) / "README.md").read_text()
    assert f"{llama.num_parameters():,}" in card
    assert "2 extra parallel heads" in card


def test_superposition_is_that_of_a_run_without_extra_heads_bit_for_bit(llama, make_args):
    set_dropout(llama)
    found = []
    for num_heads in (1, 3):
        trainer = TSTTrainer(
            copy.deepcopy(llama), make_args(mtp_num_heads=num_heads), train_dataset=make_blocks(200)
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0][:SWITCH] == found[1][:SWITCH]
    assert found[0][SWITCH] < found[1][SWITCH]


def test_a_beginning_that_runs_out_of_memory_leaves_no_second_loss(make_args):
    class OneTooLarge(TSTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if inputs["input_ids"].shape[0] > 1:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    options = {"tst_phase_ratio": 0, "mtp_num_heads": 2, "mtp_loss_weight": 1.0, "max_steps": 2}
    args = make_args(auto_find_batch_size=True, per_device_train_batch_size=2, **options)
    found = OneTooLarge(make_model("llama"), args, train_dataset=make_blocks(40))
    found.train()
    given = TSTTrainer(
        make_model("llama"),
        make_args(per_device_train_batch_size=1, **options),
        train_dataset=make_blocks(40),
    )
    given.train()
    assert found._train_batch_size == 1
    for trainer in (found, given):  # a target and one more, of a model that knows nothing yet
        assert losses(trainer)[0] == pytest.approx(2 * math.log(VOCAB_SIZE), rel=0.1)


@pytest.mark.parametrize("ratio", [0, 0.3])
def test_micro_batches_of_a_mixture_log_the_extra_loss_of_one_large_batch(make_args, ratio):
    def extra(batch, micro_batches):
        args = make_args(
            tst_phase_ratio=ratio, tst_fused_loss="on", mtp_num_heads=2, logging_steps=1, per_device_train_batch_size=batch,
            gradient_accumulation_steps=micro_batches,
        )  # fmt: skip
        model = make_model("mixtral")
        assert model.config.output_router_logits
        trainer = TSTTrainer(model, args, train_dataset=make_blocks(200))
        trainer.train()
        return next(entry["mtp_loss"] for entry in trainer.state.log_history if "mtp_loss" in entry)

    assert extra(1, 4) == pytest.approx(extra(4, 1), rel=1e-3)
