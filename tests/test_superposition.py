import copy
import inspect
import math

import pytest
import torch
from conftest import TINY, VOCAB_SIZE, make_model
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    T5Config,
)

from hf_tst import TSTError, multi_hot_cross_entropy, offset_weights, token_superposition
from hf_tst.bags.folding import fold_into_bags, next_bag_labels, next_window_labels
from hf_tst.bags.weighting import INPUT_WEIGHTINGS, OFFSET_WEIGHTINGS


def make_bags(bag_size=4, rows=2, length=6):
    tokens = torch.randint(
        0, VOCAB_SIZE, (rows, length * bag_size), generator=torch.Generator().manual_seed(3)
    )
    bags = fold_into_bags(tokens, bag_size)
    return bags, next_bag_labels(bags)


def aux_loss(model, outputs):
    return model.config.router_aux_loss_coef * outputs.aux_loss if hasattr(outputs, "aux_loss") else 0


@pytest.mark.parametrize("model_type", TINY)
def test_output_equals_the_model_fed_the_mean_embedding(model_type):
    model = make_model(model_type).eval()
    bags, labels = make_bags()
    mean = model.get_input_embeddings()(bags).float().mean(2)
    expected = model(inputs_embeds=mean)
    with token_superposition(model, 4, offset_weighting="power_law"):
        outputs = model(input_ids=bags, labels=labels)
        positional = model(bags, labels=labels)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(positional.logits, expected.logits)
    loss = multi_hot_cross_entropy(expected.logits, labels, weights=offset_weights("power_law", 4))
    torch.testing.assert_close(outputs.loss, loss + aux_loss(model, expected))


def test_bags_are_refused_as_their_own_labels(llama):
    bags, _ = make_bags()
    with token_superposition(llama, 4), pytest.raises(TSTError, match="equal the input bags"):
        llama(input_ids=bags, labels=bags.clone())


@pytest.mark.parametrize("fused_loss", ["on", "off"])
@pytest.mark.parametrize("boundaries", ["ignore", "respect"])
@pytest.mark.parametrize("weighting", INPUT_WEIGHTINGS)
def test_weighted_input_gives_the_loss_and_gradients_of_a_loop(llama, weighting, boundaries, fused_loss):
    bags, labels = make_bags()
    if boundaries == "respect":
        bags[0, 1, 2:] = bags[1, 4, 1:] = -100
    law = {"uniform": lambda i: 1.0, "linear": lambda i: i + 1.0, "exponential": math.exp}[weighting]
    weight, zero = llama.get_input_embeddings().weight, torch.zeros(llama.config.hidden_size)
    vectors = []
    for bag in bags.flatten(0, 1).tolist():
        shares = [law(i) if token >= 0 else 0 for i, token in enumerate(bag)]
        pairs = zip(shares, bag, strict=True)
        vectors.append(sum((weight[token] * (share / sum(shares)) for share, token in pairs if share), zero))
    logits = llama(inputs_embeds=torch.stack(vectors).view(2, 6, -1)).logits
    multi_hot_cross_entropy(logits, labels).backward()
    expected = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.train().zero_grad()
    options = {"input_weighting": weighting, "document_boundaries": boundaries, "fused_loss": fused_loss}
    with token_superposition(llama, 4, **options):
        llama(input_ids=bags, labels=labels).loss.backward()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_hooks_of_others_on_the_embedding_see_tokens(llama):
    bags, labels = make_bags()
    embedding, seen = llama.get_input_embeddings(), []
    embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedding.register_forward_hook(lambda module, args, output: seen.append(output))
    with token_superposition(llama, 4):
        llama(input_ids=bags, labels=labels)
    assert torch.equal(seen[0], bags.flatten(1))
    assert torch.equal(seen[1], embedding.weight[bags.flatten(1)])


@pytest.mark.parametrize("model_type", ["roberta", "opt", "xglm", "biogpt", "llama"])
def test_bags_of_the_padding_token_are_not_padding(model_type):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "pad_token_id": 1,
    }
    sizes |= (
        {"d_model": 16, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32} if model_type == "xglm" else {}
    )
    config = CONFIG_MAPPING[model_type](
        vocab_size=VOCAB_SIZE, is_decoder=True, max_position_embeddings=64, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    bags = make_bags()[0]
    bags[:, 1, 0] = bags[0, 3] = bags[:, 5] = 1
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        expected = model(inputs_embeds=embedding(bags.flatten(1)).unflatten(1, (6, 4)).mean(2)).logits
        with token_superposition(model, 4):
            torch.testing.assert_close(model(input_ids=bags).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_pass_that_fails_leaves_no_bags_behind(llama):
    bags, labels = make_bags()
    tokens, embedding = bags[..., 0], llama.get_input_embeddings()
    handle = llama.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with token_superposition(llama, 4):
        with pytest.raises(ZeroDivisionError):
            llama(input_ids=bags, labels=labels)
        handle.remove()
        assert torch.equal(embedding(tokens), embedding.weight[tokens])
        assert torch.equal(llama(input_ids=tokens, labels=tokens).loss, llama(tokens, labels=tokens).loss)


def test_bags_that_are_given_to_the_body_alone_are_refused():
    """GPT-2's body would flatten them to rows of tokens."""
    model = make_model("gpt2")
    with token_superposition(model, 4), pytest.raises(ValueError, match="call the model itself"):
        model.base_model(input_ids=make_bags()[0])


def test_a_look_up_outside_of_the_input_embedding_is_refused(llama):
    class Router(torch.nn.Module):
        def forward(self, hidden, input_ids):
            return hidden

    llama.model.layers[0].router = Router()
    with (
        pytest.raises(ValueError, match=r"outside its input embedding \(Router takes `input_ids`\)"),
        token_superposition(llama, 4),
    ):
        pass


@pytest.mark.parametrize("model_type", TINY)
def test_a_token_does_not_reach_earlier_positions(model_type):
    model = make_model(model_type).eval()
    bags, labels = make_bags()
    changed = bags.clone()
    changed[:, 3, 1] = (changed[:, 3, 1] + 1) % VOCAB_SIZE
    with token_superposition(model, 4), torch.no_grad():
        before, after = (
            model(input_ids=bags, labels=labels).logits,
            model(input_ids=changed, labels=labels).logits,
        )
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)  # experts batch tokens
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-4


@pytest.mark.parametrize("weighting", OFFSET_WEIGHTINGS)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_fresh_model_starts_at_log_v(model_type, weighting):
    model = make_model(model_type)
    bags, labels = make_bags(rows=8)
    with token_superposition(model, 4, offset_weighting=weighting):
        outputs = model(input_ids=bags, labels=labels)
    loss = (outputs.loss - aux_loss(model, outputs)).item()
    assert loss == pytest.approx(torch.tensor(VOCAB_SIZE).log().item(), rel=0.02)


def test_modes(llama):
    bags, labels = make_bags()
    llama.eval()  # in training mode the fused loss leaves no logits
    with token_superposition(llama, 4, mode="input"):
        outputs = llama(input_ids=bags, labels=labels)
    first = multi_hot_cross_entropy(outputs.logits, labels[..., :1])
    torch.testing.assert_close(outputs.loss, first)
    tokens = bags.flatten(1)
    labels = next_window_labels(tokens, 4)
    expected = llama(input_ids=tokens).logits
    with token_superposition(llama, 4, mode="output"):
        outputs = llama(input_ids=tokens, labels=labels)
        with pytest.raises(ValueError, match="single tokens"):
            llama(input_ids=bags, labels=labels)
    torch.testing.assert_close(outputs.logits, expected)
    torch.testing.assert_close(outputs.loss, multi_hot_cross_entropy(expected, labels))


def test_ordinary_batches_pass_through(llama):
    tokens = make_bags()[0].flatten(1)
    expected = llama(input_ids=tokens, labels=tokens)
    with token_superposition(llama, 4):
        outputs = llama(input_ids=tokens, labels=tokens)
        generated = llama.generate(tokens[:, :5], max_new_tokens=3, do_sample=False)
    assert torch.equal(outputs.loss, expected.loss)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(generated, llama.generate(tokens[:, :5], max_new_tokens=3, do_sample=False))


def snapshot(model):
    attributes = {
        name: {k: v for k, v in vars(m).items() if not k.startswith("_forward")}
        for name, m in model.named_modules()
    }
    hooks = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    return {name: set(values) for name, values in attributes.items()}, hooks, model.config.to_dict()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("fused_loss", ["on", "off"])
def test_a_copy_made_inside_works_on_its_own_weights(llama, fused_loss, wrapped):
    model = llama.train()
    if wrapped:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
        model = peft.get_peft_model(model, config).train()
    bags, labels = make_bags()

    def loss_and_gradients(one):
        one.zero_grad()
        loss = one(input_ids=bags, labels=labels).loss
        loss.backward()
        return loss, {name: p.grad for name, p in one.named_parameters() if p.grad is not None}

    with token_superposition(model, 4, fused_loss=fused_loss):
        before, expected = loss_and_gradients(model)
        model.zero_grad()
        twin = copy.deepcopy(model)
        loss, gradients = loss_and_gradients(twin)
        assert torch.equal(loss, before)
        assert all(p.grad is None for p in model.parameters())
        assert gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
        twin.get_input_embeddings().weight.data.normal_()
        of_embedding = loss_and_gradients(twin)[0]
        twin.get_output_embeddings().weight.data.normal_()
    assert not torch.equal(of_embedding, before)
    assert not torch.equal(loss_and_gradients(twin)[0], of_embedding)
    assert "_loss_function" not in vars(llama)
    assert not llama._forward_pre_hooks


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_undone(llama, fails):
    tokens = make_bags()[0].flatten(1)
    before, loss = snapshot(llama), llama(input_ids=tokens, labels=tokens).loss
    keys, own_loss = list(llama.state_dict()), llama.loss_function
    try:
        with token_superposition(llama, 4):
            assert snapshot(llama) != before
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert snapshot(llama) == before
    assert list(llama.state_dict()) == keys
    assert llama.loss_function is own_loss
    assert torch.equal(llama(input_ids=tokens, labels=tokens).loss, loss)


def test_tokens_are_read_after_a_pass_of_bags_that_was_interrupted(llama, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    bags, _ = make_bags()
    expected = llama(input_ids=bags.flatten(1)).logits
    with token_superposition(llama, 4):
        with monkeypatch.context() as patch:
            patch.setattr(llama.model.norm, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                llama(input_ids=bags)
        assert torch.equal(llama(input_ids=bags.flatten(1)).logits, expected)


def test_a_loss_of_the_users_own_comes_back(llama):
    def own_loss(logits, labels, vocab_size, **kwargs):
        return logits.sum() * 0 + 7

    llama.loss_function = own_loss
    tokens = make_bags()[0].flatten(1)
    with token_superposition(llama, 4):
        assert llama(input_ids=tokens, labels=tokens).loss == 7
    assert llama.loss_function is own_loss


def test_nesting_is_refused_and_leaves_the_outer_context_whole(llama):
    bags, labels = make_bags()
    with token_superposition(llama, 4):
        loss = llama(input_ids=bags, labels=labels).loss
        with pytest.raises(RuntimeError, match="already"), token_superposition(llama, 4):
            pass
        assert torch.equal(llama(input_ids=bags, labels=labels).loss, loss)


def test_wrong_shapes_are_refused(llama):
    bags, labels = make_bags()
    with (
        token_superposition(llama, 3),
        pytest.raises(
            ValueError, match=r"input_ids has shape \(.*, 4\), but the last dimension must be bag_size=3"
        ),
    ):
        llama(input_ids=bags, labels=labels)
    with token_superposition(llama, 4):
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 24\), but must have \(2, 6\)"):
            llama(input_ids=bags, labels=labels, attention_mask=torch.ones(2, 24))
        with pytest.raises(ValueError, match=r"labels has shape \(2, 6, 2\), but must have \(2, 6, 4\)"):
            llama(input_ids=bags, labels=labels[..., :2])


@pytest.mark.parametrize("fused_loss", ["on", "off"])
def test_labels_that_are_not_one_bag_a_position_are_refused(llama, fused_loss):
    bags, labels = make_bags()
    llama.train()
    with token_superposition(llama, 4, fused_loss=fused_loss):
        for wrong, shape in ((labels[:, :5], "2, 5, 4"), (labels[:1], "1, 6, 4"), (labels[..., 0], "2, 6")):
            message = rf"labels has shape \({shape}\), but must have \(2, 6, 4\)"
            with pytest.raises(ValueError, match=message):
                llama(input_ids=bags, labels=wrong)
            with pytest.raises(ValueError, match=message):
                llama(bags, labels=wrong)
        assert llama(input_ids=bags, labels=labels).loss.isfinite()
    with token_superposition(llama, 4, mode="output", fused_loss=fused_loss):
        with pytest.raises(ValueError, match=r"\(2, 6, 4\), but must have \(2, 24, 4\)"):
            llama(input_ids=bags.flatten(1), labels=labels)
        tokens = bags[..., 0]
        assert llama(input_ids=tokens, labels=tokens).loss.isfinite()


def test_a_bag_level_mask_hides_bags(llama):
    bags, labels = make_bags()
    mask = torch.ones(2, 6, dtype=torch.long)
    with token_superposition(llama, 4, fused_loss="off"):
        plain = llama(input_ids=bags, labels=labels).logits
        assert torch.equal(llama(input_ids=bags, labels=labels, attention_mask=mask).logits, plain)
        mask[:, 0] = 0
        hidden = llama(input_ids=bags, labels=labels, attention_mask=mask).logits
        assert not torch.equal(hidden[:, 1:], plain[:, 1:])


def test_models_that_cannot_be_served_say_why():
    bert = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    models = {
        "encoder-decoder": AutoModelForSeq2SeqLM.from_config(
            T5Config(vocab_size=50, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
        ),
        "causal language model": AutoModelForMaskedLM.from_config(BertConfig(**bert)),
        "is not a text-only causal": AutoModelForSequenceClassification.from_config(
            LlamaConfig(**TINY["llama"], pad_token_id=0)
        ),
        "BertLMHeadModel is not a text-only causal language model": AutoModelForCausalLM.from_config(
            BertConfig(**bert)
        ),
        "PreTrainedModel": torch.nn.Linear(2, 2),
    }
    for reason, model in models.items():
        with pytest.raises(ValueError, match=reason), token_superposition(model, 4):
            pass
    decoder = AutoModelForCausalLM.from_config(BertConfig(**bert, is_decoder=True))
    with token_superposition(decoder, 4):
        assert decoder(torch.zeros(1, 2, 4, dtype=torch.long)).logits.shape == (1, 2, 50)


@pytest.mark.parametrize(
    ("model_type", "sizes", "reason"),
    [
        ("git", {"vision_config": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}},
         "changes its labels before `loss_function`"),
        ("deepseek_v4", {"head_dim": 8, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 1, "n_routed_experts": 4, "moe_intermediate_size": 8},
         "outside its input embedding"),
    ],
)  # fmt: skip
def test_newer_models_that_cannot_be_served_say_why(model_type, sizes, reason):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("not in this version of Transformers")
    common = TINY["llama"] | {"hidden_size": 16, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**common | sizes))
    with pytest.raises(ValueError, match=reason), token_superposition(model, 4):
        pass


def test_peft_adapters_train_through_the_wrapper(llama):
    peft = pytest.importorskip("peft")
    bags, labels = make_bags()
    with token_superposition(llama, 4):
        expected = llama(input_ids=bags, labels=labels).loss
    model = peft.get_peft_model(llama, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with token_superposition(model, 4):
        loss = model(input_ids=bags, labels=labels).loss
        loss.backward()
    torch.testing.assert_close(loss, expected)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("fused_loss", ["auto", "off"])
def test_arguments_may_come_by_position(fused_loss):
    model = make_model("llama")
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    bags, labels = torch.randint(0, 97, (2, 2, 5, 4))
    given = [{"input_ids": bags, "labels": labels}.get(name) for name in names[: names.index("labels") + 1]]
    with token_superposition(model, 4, fused_loss=fused_loss):
        assert torch.equal(model(*given).loss, model(input_ids=bags, labels=labels).loss)
