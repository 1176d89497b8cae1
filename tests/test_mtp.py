"""Multi-token prediction against layers, shifts and cross entropies written out, and what the context leaves behind."""

import copy
import re

import pytest
import tiny_families
import torch
from conftest import BLOCK_LENGTH, VOCAB_SIZE, make_model
from mtp_by_hand import logits_by_hand
from torch.nn.functional import cross_entropy
from versions import fails_before, params

from hf_tst import MTPHeads, fused_next_token_loss, multi_token_prediction, token_superposition
from hf_tst.mtp.heads import MTP_KINDS
from hf_tst.mtp.losses import decoder_layers

FAMILIES = ["llama", "qwen3", "mixtral", "qwen3_moe", "gpt2", "gemma2", "granite", "phi"]
ROWS = 3


def make(family):
    options = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0} if family == "gpt2" else {}
    return make_model(family, **options)


def make_tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (ROWS, BLOCK_LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 7] = -100
    return ids, labels


def reference(model, heads, ids, labels, divisor=None, weight=None):
    """The model's own loss plus that of each extra head, one after the other."""
    own = model(input_ids=ids, labels=labels, **({} if divisor is None else {"num_items_in_batch": divisor}))
    divisor = (labels[:, 1:] != -100).sum() if divisor is None else divisor
    total = 0.0
    for ahead, z in enumerate(logits_by_hand(model, heads, ids)[1:], start=2):
        total += (
            cross_entropy(z[:, :-ahead].flatten(0, 1), labels[:, ahead:].flatten(), reduction="sum") / divisor
        )
    if weight is None:
        weight = 0.1 if heads.kind == "parallel" else 0.3
    return own.loss + total * (weight if heads.kind == "parallel" else weight / len(heads.heads))


def gradients(*modules):
    found = [p.grad for module in modules for p in module.parameters()]
    for module in modules:
        module.zero_grad()
    return found


@pytest.mark.parametrize("given", ["nothing", "num_items_in_batch", "loss_weight"])
@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_layers_and_shifts_written_out(family, kind, given):
    model = make(family)
    heads = MTPHeads(model, 3, kind)
    ids, labels = make_tokens()
    divisor = 17 if given == "num_items_in_batch" else None
    weight = 0.7 if given == "loss_weight" else None
    expected = reference(model, heads, ids, labels, divisor, weight)
    expected.backward()
    expected_gradients = gradients(model, heads)
    with multi_token_prediction(model, heads, weight):
        options = {} if divisor is None else {"num_items_in_batch": divisor}
        loss = model(input_ids=ids, labels=labels, **options).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in expected_gradients)
    torch.testing.assert_close(gradients(model, heads), expected_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MTP_KINDS)
def test_a_fresh_model_starts_at_log_v_with_every_head(llama, kind):
    heads = MTPHeads(llama, 2, kind)
    ids, _ = make_tokens()
    with multi_token_prediction(llama, heads, 1.0):
        loss = llama(input_ids=ids, labels=ids).loss
    targets = 1 + (BLOCK_LENGTH - 2) / (BLOCK_LENGTH - 1)  # a row has one target less for the second head
    assert loss.item() == pytest.approx(targets * torch.tensor(VOCAB_SIZE).log().item(), rel=0.02)


@pytest.mark.parametrize("kind", MTP_KINDS)
def test_no_head_looks_past_the_end_of_a_document(llama, kind):
    heads = MTPHeads(llama, 3, kind)
    ids, _ = make_tokens()
    lengths = [5, 1, BLOCK_LENGTH - 6]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(ROWS, -1)
    labels = ids.masked_fill(positions == 0, -100)
    divisor = (labels[:, 1:] != -100).sum()
    with multi_token_prediction(llama, heads):
        packed = llama(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
        apart = sum(
            llama(input_ids=part, labels=part, num_items_in_batch=divisor).loss
            for part in ids.split(lengths, dim=1)
        )
    torch.testing.assert_close(packed, apart)


@pytest.mark.parametrize("kind", MTP_KINDS)
def test_a_mask_reaches_the_heads(llama, kind):
    heads = MTPHeads(llama, 3, kind)
    ids, _ = make_tokens()
    padding = torch.zeros(ROWS, 3, dtype=torch.long)
    mask = torch.cat([torch.ones_like(ids), padding], dim=1)
    labels = torch.cat([ids, padding - 100], dim=1)
    with multi_token_prediction(llama, heads):
        short = llama(input_ids=ids, labels=ids).loss
        padded = llama(input_ids=torch.cat([ids, padding], 1), labels=labels, attention_mask=mask).loss
    torch.testing.assert_close(padded, short)


@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family, kind, reentrant):
    model = make(family)
    heads = MTPHeads(model, 3, kind)
    ids, labels = make_tokens()
    found = []
    with multi_token_prediction(model, heads):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                flags = [
                    m.gradient_checkpointing for m in heads.modules() if hasattr(m, "gradient_checkpointing")
                ]
                assert flags == [True, True]
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            found.append([loss, *gradients(model)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", MTP_KINDS)
def test_it_goes_with_the_fused_loss(llama, kind):
    ids, labels = make_tokens()
    with multi_token_prediction(llama, MTPHeads(llama, 2, kind)):
        expected = llama(input_ids=ids, labels=labels).loss
        with fused_next_token_loss(llama, "on"):
            output = llama(input_ids=ids, labels=labels)
    assert output.logits.numel() == 0
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("kind", MTP_KINDS)
def test_heads_run_in_the_mixed_precision_of_the_model(llama, kind):
    """accelerate puts autocast around the model's forward, inside its hooks."""
    ids, labels = make_tokens()
    heads, seen = MTPHeads(llama, 2, kind), []
    for module in (llama.model.layers[0].mlp, next(m for n, m in heads.named_modules() if n.endswith("mlp"))):
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with multi_token_prediction(llama, heads):
        seen.clear()
        expected = llama(input_ids=ids, labels=labels).loss
        llama.forward = torch.autocast("cpu", torch.bfloat16)(llama.forward)
        loss = llama(input_ids=ids, labels=labels).loss
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_memory_of_the_losses_does_not_grow_with_heads():
    """No logits of a batch are kept, and one gradient of the head whatever n is."""
    vocabulary = 1009
    kept = []
    ids, _ = make_tokens()
    for num_heads in (2, 6):
        model = make_model("llama", vocab_size=vocabulary, tie_word_embeddings=False)
        sizes = []

        def note(tensor, sizes=sizes, weight=model.lm_head.weight):
            if vocabulary in tensor.shape and tensor.data_ptr() != weight.data_ptr():
                sizes.append(tuple(tensor.shape))
            return tensor

        with (
            multi_token_prediction(model, MTPHeads(model, num_heads)),
            fused_next_token_loss(model, "on"),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            model(input_ids=ids, labels=ids).loss.backward()
        kept.append(sizes)
    assert kept[0] == kept[1] == [(vocabulary, 16)] * 2


@pytest.mark.parametrize("kind", MTP_KINDS)
def test_only_next_token_training_is_changed(llama, kind):
    heads = MTPHeads(llama, 2, kind)
    ids, labels = make_tokens()
    bags = ids.unsqueeze(-1).expand(-1, -1, 2)
    calls = [
        lambda: llama(input_ids=ids).logits,
        lambda: llama.eval()(input_ids=ids, labels=labels).loss,
        lambda: llama.eval()(input_ids=ids, labels=labels).logits,
    ]
    expected = [call() for call in calls]
    with token_superposition(llama.train(), 2):
        superposed = llama(input_ids=bags, labels=bags.flip(1)).loss
    with multi_token_prediction(llama, heads):
        assert all(torch.equal(call(), before) for call, before in zip(calls, expected, strict=True))
        with token_superposition(llama.train(), 2):
            loss = llama(input_ids=bags, labels=bags.flip(1)).loss
    assert torch.equal(loss, superposed)
    loss.backward()
    assert all(p.grad is None for p in heads.parameters())


def anatomy(model):
    modules = list(model.modules())
    return [(type(m), sorted(vars(m)), [len(v) for k, v in vars(m).items() if "hooks" in k]) for m in modules]


@pytest.mark.parametrize("ending", ["normal", "outside", "in forward", "interrupted"])
def test_the_model_is_what_it_was_afterwards(llama, ending):
    def interrupt(*args):
        raise KeyboardInterrupt

    ids, labels = make_tokens()
    heads = MTPHeads(llama, 2)
    llama(input_ids=ids, labels=labels)  # Transformers installs its own hooks in a first pass
    before, keys, config = anatomy(llama), list(llama.state_dict()), llama.config.to_dict()
    plain = llama(input_ids=ids, labels=labels).loss
    try:
        with multi_token_prediction(llama, heads):
            llama(input_ids=ids, labels=labels)
            assert [n for n, _ in llama.named_parameters() if n.startswith("mtp_heads.")]
            assert list(llama.state_dict()) == keys
            assert llama.load_state_dict(llama.state_dict()).missing_keys == []
            if ending == "outside":
                raise KeyError
            if ending == "in forward":
                llama(input_ids=ids + VOCAB_SIZE, labels=labels)
            if ending == "interrupted":
                with llama.model.norm.register_forward_pre_hook(interrupt):
                    llama(input_ids=ids, labels=labels)
    except (KeyError, IndexError, KeyboardInterrupt):
        assert ending != "normal"
    else:
        assert ending == "normal"
    assert anatomy(llama) == before
    assert list(llama.state_dict()) == keys
    assert llama.config.to_dict() == config
    assert torch.equal(llama(input_ids=ids, labels=labels).loss, plain)


def test_heads_follow_from_their_seed_and_leave_the_global_generator_alone(llama):
    torch.manual_seed(3)
    one = MTPHeads(llama, 3, "sequential", seed=5)
    drawn = torch.rand(1)
    torch.manual_seed(4)
    other = MTPHeads(llama, 3, "sequential", seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    std = llama.config.initializer_range
    matrices = [p for p in one.parameters() if p.dim() == 2]
    assert all(p.std().item() == pytest.approx(std, rel=0.2) for p in matrices)
    assert all(bool((p == 1).all()) for p in one.parameters() if p.dim() == 1)


def test_heads_are_not_forgotten_in_silence(llama):
    ids, labels = make_tokens()
    with multi_token_prediction(llama, MTPHeads(llama, 2)):
        llama.model = make_model("llama").model
        with pytest.raises(RuntimeError, match="a module was replaced"):
            llama(input_ids=ids, labels=labels)


# Families whose layers are made, called or followed in a way of their own.
REFUSED = {"Gemma 3n", "GPT-Neo", "Falcon-H1", "Bamba", "Zamba 2", "RWKV", "GPT", "XLM", "TrOCR", "XLNet"}


# Where they cannot be fused, or their forward fails, with older versions.
LATER = {"Granite-MoE", "Granite-MoE-hybrid", "Mamba", "Falcon-Mamba", "XGLM", "CTRL"}


@pytest.mark.parametrize(
    "family",
    params(
        tiny_families.FAMILIES,
        LATER,
        fails_before("transformers", "5.23", "its forward is another"),
    ),
)
def test_a_copy_of_the_last_layer_says_in_every_family_what_the_model_says(family):
    model = tiny_families.make_family(family)
    ids = torch.randint(1, tiny_families.VOCAB_SIZE, (2, BLOCK_LENGTH))
    if family.name in REFUSED:
        with pytest.raises(ValueError, match="Multi-token prediction does not support"):
            MTPHeads(model, 2)
        return
    heads = MTPHeads(model, 2)
    heads.heads[0].load_state_dict(decoder_layers(model)[-1].state_dict())
    output = model(input_ids=ids, labels=ids)
    z, y = output.logits[:, :-2].float(), ids[:, 2:]
    extra = cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / ids[:, 1:].numel()
    with multi_token_prediction(model, heads, 1.0):
        loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, output.loss + extra, rtol=1e-5, atol=1e-5)


def test_bags_may_not_be_read_from_embeddings_by_sequential_heads(llama):
    ids, labels = make_tokens()
    with (
        multi_token_prediction(llama, MTPHeads(llama, 2, "sequential")),
        pytest.raises(ValueError, match="pass input_ids"),
    ):
        llama(inputs_embeds=llama.get_input_embeddings()(ids), labels=labels)


class OtherLayer(torch.nn.Module):
    """A layer that is made in a way of its own."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states, **kwargs)


class FixedLayer(OtherLayer):
    """A layer of which a second one cannot be called in the same place."""

    def __init__(self, config=None, layer_idx=None, layer=None):
        super().__init__(layer)


def no_layers(model):
    model.model.layers = torch.nn.Sequential(*model.model.layers)


def unmakeable(model):
    model.model.layers[-1] = OtherLayer(model.model.layers[-1])


def uncallable(model):
    model.model.layers[-1] = FixedLayer(layer=model.model.layers[-1])


def no_linear_head(model):
    model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T


def two_norms(model):
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Dropout(0.0))
    forward = model.model.forward

    def doubled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    model.model.forward = doubled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_layers, "decoder layers cannot be found"),
        (unmakeable, "cannot make a OtherLayer"),
        (uncallable, "cannot be called alone"),
        (no_linear_head, "its head is a Linear, not a plain"),
        (two_norms, "something other than one norm"),
    ],
)
def test_models_that_cannot_be_served_are_refused_in_one_sentence(llama, change, message):
    change(llama)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MTPHeads(llama, 2)
    assert "\n" not in str(error.value)
    assert "LlamaForCausalLM" in str(error.value) or "OtherLayer" in str(error.value)


def test_wrong_arguments_are_refused(llama):
    with pytest.raises(ValueError, match="at least 2"):
        MTPHeads(llama, 1)
    with pytest.raises(ValueError, match="kind must be"):
        MTPHeads(llama, 2, "tree")
    heads = MTPHeads(llama, 2)
    with pytest.raises(ValueError, match="loss_weight must be"), multi_token_prediction(llama, heads, -1.0):
        pass
    with (
        multi_token_prediction(llama, heads),
        pytest.raises(RuntimeError, match="already"),
        multi_token_prediction(llama, copy.deepcopy(heads)),
    ):
        pass
    assert not hasattr(llama, "mtp_heads")
    with pytest.raises(ValueError, match="not a causal language model"):
        MTPHeads(torch.nn.Linear(2, 2), 2)
