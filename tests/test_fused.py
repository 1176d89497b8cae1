"""The fused loss inside a model against the model's own logits, and what of it remains: nothing."""

import copy
import logging

import pytest
import torch
from conftest import TINY, TINY_LOGITS, VOCAB_SIZE, make_model
from test_superposition import make_bags
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from hf_tst import (
    fused_evaluation_loss,
    fused_next_token_loss,
    multi_hot_cross_entropy,
    offset_weights,
    token_superposition,
)
from hf_tst.models.fused import check_fusable
from hf_tst.models.head import UnfusableHeadError, inspect_head

FAMILIES = sorted(TINY | TINY_LOGITS)


def gradients(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, found, expected):
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=1e-6)
    assert set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_superposition_loss_is_that_of_the_models_own_logits(model_type, tied):
    model = without_dropout(make_model(model_type, tie_word_embeddings=tied)).train()
    bags, labels = make_bags()
    with token_superposition(model, 4, offset_weighting="power_law", fused_loss="off"):
        expected = gradients(model, input_ids=bags, labels=labels)
    with token_superposition(model, 4, offset_weighting="power_law", fused_loss="on"):
        found = gradients(model, input_ids=bags, labels=labels)
    assert expected[0].logits.shape == (2, 6, VOCAB_SIZE)
    assert found[0].logits.shape == (2, 6, 0)
    assert_same_step(model, found, expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_next_token_loss_is_the_models_own(model_type):
    model = without_dropout(make_model(model_type)).train()
    tokens = make_bags()[0].flatten(1)
    labels = tokens.masked_fill(tokens % 5 == 0, -100)
    for extra in ({}, {"num_items_in_batch": torch.tensor(31)}):
        expected = gradients(model, input_ids=tokens, labels=labels, **extra)
        with fused_next_token_loss(model, "on"):
            found = gradients(model, input_ids=tokens, labels=labels, **extra)
        assert found[0].logits.numel() == 0
        assert_same_step(model, found, expected)


@pytest.mark.parametrize("trains", [True, False])
def test_shifted_labels_and_another_ignored_label_are_those_of_the_model(llama, trains):
    tokens = make_bags()[0].flatten(1)
    shifted = tokens.flip(-1).masked_fill(tokens % 5 == 0, 3)
    given = {"input_ids": tokens, "labels": tokens, "shift_labels": shifted, "ignore_index": 3}
    expected = llama.train(trains)(**given).loss
    context = fused_next_token_loss if trains else fused_evaluation_loss
    with context(llama, "on"):
        outputs = llama(**given)
    assert outputs.logits.numel() == 0
    torch.testing.assert_close(outputs.loss, expected)


def test_a_batch_without_targets_evaluates_as_the_models_own(llama):
    """With other processes' targets in the divisor the loss is 0; without any it is NaN."""
    tokens = make_bags()[0].flatten(1)
    for extra in ({}, {"num_items_in_batch": torch.tensor(5)}, {"num_items_in_batch": torch.tensor(0)}):
        given = {"input_ids": tokens, "labels": torch.full_like(tokens, -100), **extra}
        expected = llama.eval()(**given).loss
        with fused_evaluation_loss(llama, "on"):
            torch.testing.assert_close(llama(**given).loss, expected, equal_nan=True)


def test_logits_are_there_whenever_no_loss_is_trained(llama):
    bags, labels = make_bags()
    tokens = bags.flatten(1)
    expected = llama(input_ids=tokens).logits
    with fused_next_token_loss(llama.train()):
        assert torch.equal(llama(input_ids=tokens).logits, expected)
        llama.eval()
        outputs = llama(input_ids=tokens, labels=tokens)
        assert torch.equal(outputs.logits, expected)
        generated = llama.generate(tokens[:, :5], max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 8)
    with token_superposition(llama, 4):
        outputs = llama(input_ids=bags, labels=labels)
    torch.testing.assert_close(
        outputs.loss, multi_hot_cross_entropy(outputs.logits, labels, weights=offset_weights("uniform", 4))
    )


def test_a_failed_forward_pass_leaves_the_head_whole(llama):
    llama.train()
    bags, labels = make_bags()
    with token_superposition(llama, 4, fused_loss="on"):
        with pytest.raises(ValueError, match="labels must be from 0 to"):
            llama(input_ids=bags, labels=labels + VOCAB_SIZE)
        assert llama.lm_head(torch.zeros(1, 16)).shape == (1, VOCAB_SIZE)
        assert llama(input_ids=bags, labels=labels).loss.isfinite()


@pytest.mark.parametrize(
    "context", [fused_next_token_loss, lambda model, choice: token_superposition(model, 4, fused_loss=choice)]
)
@pytest.mark.parametrize("fails", [True, False])
def test_everything_is_undone(llama, context, fails):
    before = copy.deepcopy(vars(llama.lm_head)), len(llama._forward_hooks), len(llama._forward_pre_hooks)
    modules = list(llama.modules())
    try:
        with context(llama, "on"):
            assert "forward" in vars(llama.lm_head)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert set(vars(llama.lm_head)) == set(before[0])
    assert (len(llama._forward_hooks), len(llama._forward_pre_hooks)) == before[1:]
    assert "_loss_function" not in vars(llama)
    assert list(llama.modules()) == modules


@pytest.mark.parametrize("choice", ["on", "off"])
def test_the_divisor_is_not_the_one_that_bfloat16_rounds(llama, choice):
    """FSDP casts what it gives to the forward pass of a model in mixed precision, numbers of targets among it."""
    ids = torch.randint(0, VOCAB_SIZE, (2, 8))
    count = torch.tensor(4099)  # 4096 in bfloat16

    def cast(module, args, kwargs):
        return args, kwargs | {"num_items_in_batch": kwargs["num_items_in_batch"].bfloat16()}

    expected = llama(input_ids=ids, labels=ids, num_items_in_batch=count).loss.item()
    with fused_next_token_loss(llama.train(), choice):
        hook = llama.register_forward_pre_hook(cast, with_kwargs=True)
        found = llama(input_ids=ids, labels=ids, num_items_in_batch=count).loss.item()
        hook.remove()
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_head_takes_part_in_the_backward_pass(llama):
    """FSDP waits for the gradient of what the head returned before it makes ready for the head's own."""
    bags, labels = make_bags()
    fired = []

    def watch(head, args, output):
        output.register_hook(lambda gradient: fired.append(tuple(gradient.shape)))
        args[0].register_hook(lambda gradient: fired.append("hidden"))

    with token_superposition(llama.train(), 4, fused_loss="on"):
        llama.lm_head.register_forward_hook(watch)
        llama(input_ids=bags, labels=labels).loss.backward()
    assert fired == [(2, 6, 0), "hidden"]


# Finding the head


@pytest.mark.parametrize(
    ("model_type", "scale", "softcap"),
    [
        ("llama", 1, None),
        ("gemma2", 1, 0.05),
        ("cohere", 0.0625, None),
        ("granite", 1 / 3, None),
        ("mixtral", 1, None),
    ],
)
def test_scale_and_cap_are_found_by_trying(model_type, scale, softcap):
    model = make_model(model_type)
    state = torch.get_rng_state()
    head = inspect_head(model)
    assert head.module is model.lm_head
    assert head.logit_scale == pytest.approx(scale, rel=1e-6)
    assert head.softcap == pytest.approx(softcap, rel=1e-6) if softcap else head.softcap is None
    assert torch.equal(torch.get_rng_state(), state)


def test_looking_at_the_head_runs_no_layer(llama):
    llama.model.layers[0].register_forward_hook(lambda *_: pytest.fail("a layer ran"))
    llama.model.register_forward_hook(lambda *_: pytest.fail("the body ran"))
    inspect_head(llama)


def test_models_that_cannot_be_fused_say_why(llama):
    class Offset(type(llama)):
        def forward(self, *args, labels=None, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.loss = self.loss_function(outputs.logits + 1, labels, self.vocab_size, **kwargs)
            return outputs

    shifted = copy.deepcopy(llama)
    shifted.__class__ = Offset
    silent = copy.deepcopy(llama)
    silent.__class__ = type(
        "Silent",
        (type(llama),),
        {"forward": lambda self, input_ids, **_: self.lm_head(self.model(input_ids)[0])},
    )
    hooked = copy.deepcopy(llama)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    normed = copy.deepcopy(llama)
    nn.utils.parametrizations.weight_norm(normed.lm_head)
    partitioned = copy.deepcopy(llama)
    partitioned.lm_head.weight.ds_id = 0
    deep = copy.deepcopy(llama)
    deep.lm_head = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, VOCAB_SIZE))
    for model, reason in (
        (shifted, "neither a scale nor a soft cap"),
        (silent, "does not call loss_function"),
        (hooked, "forward hooks"),
        (normed, "parametrized|not a plain"),
        (deep, "Sequential, not a plain"),
        (partitioned, "ZeRO-3"),
    ):
        with pytest.raises(UnfusableHeadError, match=reason):
            inspect_head(model)
        with pytest.raises(ValueError, match="tst_fused_loss='on', but"):
            check_fusable(model, "on")
        check_fusable(model, "auto")


def test_auto_falls_back_and_says_why(llama, caplog):
    llama.lm_head.register_forward_hook(lambda *_: None)
    bags, labels = make_bags()
    with caplog.at_level(logging.INFO, "hf_tst"), token_superposition(llama.train(), 4):
        outputs = llama(input_ids=bags, labels=labels)
    assert outputs.logits.shape[-1] == VOCAB_SIZE
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "its head has forward hooks" in record.getMessage()


def test_a_loss_of_the_users_own_is_not_fused(llama):
    llama.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 7
    tokens = make_bags()[0].flatten(1)
    with fused_next_token_loss(llama.train()):
        assert llama(input_ids=tokens, labels=tokens).loss == 7
    with pytest.raises(ValueError, match="its own loss function"), fused_next_token_loss(llama, "on"):
        pass


def test_lora_on_the_head_falls_back_and_a_trained_copy_of_it_is_found(llama):
    peft = pytest.importorskip("peft")
    bags, labels = make_bags()
    for options in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ):
        model = peft.get_peft_model(
            copy.deepcopy(llama), peft.LoraConfig(task_type="CAUSAL_LM", **options)
        ).train()
        with token_superposition(model, 4, fused_loss="off"):
            expected = gradients(model, input_ids=bags, labels=labels)
        with token_superposition(model, 4):
            found = gradients(model, input_ids=bags, labels=labels)
        assert_same_step(model, found, expected)


def test_models_whose_body_is_not_called_as_a_whole_are_right_too():
    config = OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        dropout=0.0,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    bags, labels = make_bags()
    with token_superposition(model, 4, fused_loss="off"):
        expected = gradients(model, input_ids=bags, labels=labels)
    with token_superposition(model, 4, fused_loss="on"):
        found = gradients(model, input_ids=bags, labels=labels)
    assert_same_step(model, found, expected)
