"""Mixtures of experts: auxiliary losses over bags, the load of experts, and the ways of computing experts."""

import copy
from functools import partial

import pytest
import torch
from conftest import BLOCK_LENGTH, losses, make_blocks, make_model, train_to_be_best_at_step_4, weights_equal
from test_superposition import make_bags
from tiny_families import FAMILIES, make_family
from transformers import AutoModelForCausalLM, Trainer
from versions import fails_before, params

from hf_tst import TSTTrainer, multi_hot_cross_entropy, token_superposition
from hf_tst.checkpoints import renamed_weights
from hf_tst.models.moe import ExpertLoadMeter
from hf_tst.records.phase_table import phase_rows
from hf_tst.records.text_tables import format_columns

WITH_AUX_LOSS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "gpt_oss",
    "phimoe",
    "jamba",
    "minimax",
)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def make(model_type):
    return make_family(next(family for family in FAMILIES if family.model_type == model_type))


def count_routers(model):
    return sum("TopKRouter" in type(module).__name__ for module in model.modules())


def auxiliary_loss(router_logits, top_k, mask=None):
    """Experts times the sum over them of (share of choices, slot by slot) · (mean probability), over all layers."""
    probabilities = torch.cat(router_logits).float().softmax(-1)
    counts = (
        torch.ones(len(probabilities)) if mask is None else mask.float().flatten().repeat(len(router_logits))
    )
    chosen = torch.zeros_like(probabilities)
    chosen.scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1)
    share = (chosen * counts[:, None]).sum(0) / counts.sum()
    mean = (probabilities * counts[:, None]).sum(0) / counts.sum()
    return probabilities.shape[-1] * (share * mean).sum()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "model_type",
    params(
        WITH_AUX_LOSS,
        {"granitemoe", "jamba"},
        fails_before("transformers", "5.23", "its own auxiliary loss fails"),
    ),
)
def test_the_auxiliary_loss_is_over_bags(model_type, masked):
    model = make(model_type).eval()
    bags, labels = make_bags()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0  # the first bags of a row, as left padding
    extra = {"attention_mask": mask} if masked else {}
    with token_superposition(model, 4), torch.no_grad():
        outputs = model(input_ids=bags, labels=labels, **extra)
    assert [tuple(layer.shape) for layer in outputs.router_logits] == [(2 * 6, 4)] * count_routers(model)
    expected = auxiliary_loss(outputs.router_logits, 2, mask if masked else None)
    torch.testing.assert_close(outputs.aux_loss, expected)
    multi_hot = multi_hot_cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, multi_hot + model.config.router_aux_loss_coef * expected)


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_a_z_loss_of_logits_is_over_bags(choice):
    model = make("bamba").train()
    bags, labels = make_bags()
    with token_superposition(model, 4, fused_loss=choice):
        outputs = model(input_ids=bags, labels=labels)
    z_loss = outputs.logits.logsumexp(-1).square().mean()
    expected = multi_hot_cross_entropy(outputs.logits, labels) + model.config.z_loss_coefficient * z_loss
    torch.testing.assert_close(outputs.loss, expected)


def train_on_equal_rows(model, args, trainer=TSTTrainer):
    """Losses of the steps. The auxiliary loss of equal micro-batches is that of the batch that they make up."""
    run = trainer(copy.deepcopy(model), args, train_dataset=make_blocks(1) * 300)
    run.train()
    return losses(run), run.model


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(partial(make_model, "qwen3_moe", router_aux_loss_coef=5.0), id="qwen3_moe"),
        pytest.param(partial(make_model, "mixtral", router_aux_loss_coef=5.0), id="mixtral"),
        pytest.param(partial(make, "bamba"), id="bamba"),  # the z-loss of its logits
    ],
)
def test_accumulation_averages_added_losses_in_both_phases(make_args, model, fused):
    model = model()
    common = {"optim": "sgd", "max_steps": 4, "tst_phase_ratio": 0.5, "tst_fused_loss": fused}
    small = make_args(per_device_train_batch_size=2, gradient_accumulation_steps=3, **common)
    large = make_args(per_device_train_batch_size=6, **common)
    (found, found_model), (expected, expected_model) = (
        train_on_equal_rows(model, args) for args in (small, large)
    )
    assert min(expected) > 6  # the cross entropy alone is 4.6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found_model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_plain_training_adds_it_up_as_trainer_does(make_args):
    model = make_model("qwen3_moe", router_aux_loss_coef=5.0)
    args = make_args(tst_phase_ratio=0, gradient_accumulation_steps=3, max_steps=3)
    losses, ours = train_on_equal_rows(model, args)
    expected, plain = train_on_equal_rows(model, args, Trainer)
    assert losses == expected
    assert weights_equal(ours, plain)


# The load of experts


def test_load_by_hand():
    meter = ExpertLoadMeter()
    assert meter.report() == {}
    first = torch.tensor([[9.0, 5, 0, 0], [9, 0, 5, 0], [9, 5, 0, 0]])  # experts 0 0 0, 1 2 1
    second = torch.tensor([[9.0, 5, 0, 0], [0, 0, 9, 5], [9, 5, 0, 0]])  # 0 2 0, 1 3 1
    meter.add((first, second), top_k=2)
    # of 6 choices a layer: (3, 2, 1, 0) and (2, 2, 1, 1), times 4 experts
    expected = {
        "tst_expert_load_max": 4 * 5 / 12,
        "tst_expert_load_min": 4 * 1 / 12,
        "tst_experts_unused": 1 / 8,
    }
    assert meter.report() == pytest.approx(expected, abs=1e-4)
    assert meter.report() == {}
    meter.add((first, second), top_k=2, mask=torch.tensor([[0, 1, 0]]))
    meter.add((first.view(1, 3, 4), second.view(1, 3, 4)), top_k=2, mask=torch.tensor([[0, 1, 0]]))
    expected = {"tst_expert_load_max": 2.0, "tst_expert_load_min": 0.0, "tst_experts_unused": 0.5}
    assert meter.report() == pytest.approx(expected)
    meter.add((first,), top_k=1)
    assert meter.report(lambda counts: counts + 1)["tst_expert_load_max"] == pytest.approx(
        4 * 4 / 7, abs=1e-4
    )


@pytest.mark.parametrize("router_logits", [None, (), (None,), (torch.zeros(2, 4), torch.zeros(3, 4))])
def test_what_has_no_load_is_not_counted(router_logits):
    meter = ExpertLoadMeter()
    meter.add(router_logits, top_k=2)
    meter.add((torch.zeros(2, 4),), top_k=None)
    assert meter.report() == {}


@pytest.mark.parametrize("ratio", [0.3, 0])
def test_training_logs_the_load_of_the_steps_since_the_last_log(make_args, ratio):
    model = make_model("qwen3_moe")
    chosen = []

    def note(router, args, output):
        if router.training:
            chosen.append(output[2].flatten())  # the experts that the router itself picked

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(note)
    args = make_args(
        tst_phase_ratio=ratio, gradient_accumulation_steps=2, logging_steps=2, eval_strategy="steps"
    )
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(4))
    trainer.train()
    assert all(len(experts) == 2 * BLOCK_LENGTH * 2 for experts in chosen)  # positions, not tokens
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = [entry["step"] for entry in logs]
    assert steps == ([2, 3, 4, 6, 8, 10] if ratio else [2, 4, 6, 8, 10])
    for entry, since in zip(logs, [0, *steps], strict=False):
        passes = chosen[since * 4 : entry["step"] * 4]  # two layers, two micro-batches
        loads = [torch.bincount(torch.cat(passes[layer::2]), minlength=4).float() for layer in (0, 1)]
        loads = [4 * load / load.sum() for load in loads]
        assert entry["tst_expert_load_max"] == pytest.approx(
            sum(load.max().item() for load in loads) / 2, abs=1e-4
        )
        assert entry["tst_expert_load_min"] == pytest.approx(
            sum(load.min().item() for load in loads) / 2, abs=1e-4
        )
    assert "tst_expert_load_max" not in trainer.state.log_history[-1]


def test_the_phase_table_shows_the_load_on_both_sides_of_the_switch(llama, make_args):
    table = {}
    for name, model in (("moe", make_model("mixtral")), ("dense", llama)):
        trainer = TSTTrainer(model, make_args(), train_dataset=make_blocks(200))
        trainer.train()
        rows = phase_rows(trainer.state.log_history)
        table[name] = format_columns(rows)
        if name == "moe":
            logs = [entry for entry in trainer.state.log_history if "loss" in entry]
            before, after = (
                f"{entry['tst_expert_load_min']:.2f}-{entry['tst_expert_load_max']:.2f}"
                for entry in logs[2:4]
            )
            assert (rows[1][-1], rows[2][-2]) == (before, after)
            assert after in table[name]
    assert "expert load" in table["moe"]
    assert "expert load" not in table["dense"]


# Checkpoints


@pytest.mark.parametrize(
    ("model_type", "stop", "shard_size", "in_place"),
    [
        ("qwen3_moe", 2, "5GB", True),
        pytest.param(
            "qwen3_moe",
            7,
            "5GB",
            False,
            marks=fails_before("transformers", "5.23", "it reads weights that this test cannot make it copy"),
        ),
        ("qwen3_moe", 3, "20KB", True),
        ("mixtral", 3, "5GB", True),
    ],
)
def test_a_resumed_run_has_its_experts(
    make_args, tmp_path, monkeypatch, model_type, stop, shard_size, in_place
):
    """Trainer would leave them as they were made. They are read into their places, without a second model."""
    model, other, blocks = make_model(model_type), make_model(model_type), make_blocks(200)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)  # what is not loaded shows
    whole = TSTTrainer(model, make_args(save_strategy="steps", save_steps=stop), train_dataset=blocks)
    save = model.save_pretrained
    model.save_pretrained = lambda *args, **kwargs: save(*args, **kwargs | {"max_shard_size": shard_size})
    whole.train()
    assert (tmp_path / f"run/checkpoint-{stop}/model.safetensors.index.json").exists() == (
        shard_size == "20KB"
    )
    second = []
    load = type(other).from_pretrained
    monkeypatch.setattr(
        type(other), "from_pretrained", lambda *args, **kwargs: second.append(1) or load(*args, **kwargs)
    )
    if not in_place:  # as where a weight is computed from several
        monkeypatch.setattr(renamed_weights._View, "contiguous", torch.Tensor.clone)
    resumed = TSTTrainer(other, make_args(output_dir=str(tmp_path / "resumed")), train_dataset=blocks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert weights_equal(other, model)
    assert bool(second) != in_place


def test_a_resumed_run_keeps_the_bits_of_its_weights_whatever_the_configuration_says(make_args, tmp_path):
    """A configuration of bfloat16 weights, of which a model is made in float32."""
    model, blocks = make_model("qwen3_moe"), make_blocks(200)
    model.config.dtype = torch.bfloat16
    other = copy.deepcopy(model)
    TSTTrainer(model, make_args(save_strategy="steps", save_steps=5), train_dataset=blocks).train()
    resumed = TSTTrainer(other, make_args(output_dir=str(tmp_path / "resumed")), train_dataset=blocks)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert weights_equal(other, model)


def test_the_best_model_has_its_experts(make_args):
    model = make_model("qwen3_moe")
    trainer = train_to_be_best_at_step_4(model, make_args)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert weights_equal(AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint), model)


# Ways of computing experts


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_every_experts_implementation_trains_alike_through_the_switch(make_args, model_type):
    first, runs = make_model(model_type), {}
    for implementation in IMPLEMENTATIONS:
        model = copy.deepcopy(first)
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        trainer = TSTTrainer(model, make_args(adam_epsilon=1e-3), train_dataset=make_blocks(200))
        trainer.train()
        runs[implementation] = losses(trainer)
    for implementation in IMPLEMENTATIONS[1:]:
        torch.testing.assert_close(runs[implementation], runs["eager"], rtol=1e-5, atol=1e-5)
