"""Finding out how a model treats embeddings that it is given, against those that it looks up."""

import pytest
import torch
from tiny_families import FAMILIES, make_family

from hf_tst import token_superposition
from hf_tst.models.embedding import first_layer, inputs_embeds_scale


def make(model_type):
    return make_family(next(family for family in FAMILIES if family.model_type == model_type))


def with_own_way(model, change):
    """`model` whose body does `change` to the embeddings that it looks up itself."""
    body = type(model.model)

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = change(self.embed_tokens(input_ids))
        return body.forward(self, inputs_embeds=inputs_embeds, **kwargs)

    model.model.__class__ = type(body.__name__, (body,), {"forward": forward})
    return model


@pytest.mark.parametrize(
    ("model_type", "scale"), [("llama", 1), ("gemma2", 1), ("granite", 1), ("falcon_h1", 5)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_is_found_and_nothing_runs_or_remains(model_type, scale, dtype):
    model = make(model_type).to(dtype).train()
    layer = first_layer(model)
    layer.register_forward_hook(lambda *_: pytest.fail("a layer ran"))
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    modules, state = list(model.modules()), torch.get_rng_state()
    assert inputs_embeds_scale(model) == pytest.approx(scale, rel=1e-6)
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert list(model.modules()) == modules
    assert torch.equal(torch.get_rng_state(), state)


def test_a_scale_is_put_on_the_mean():
    model = with_own_way(make("llama"), lambda embedded: 3 * embedded).eval()
    bags = torch.arange(1, 49).view(2, 6, 4)
    with torch.no_grad(), token_superposition(model, 4):
        single = model(input_ids=bags[..., 0]).logits
        found = model(input_ids=bags[..., :1].expand_as(bags)).logits
    torch.testing.assert_close(found, single)


@pytest.mark.parametrize("change", [torch.tanh, lambda embedded: embedded.cumsum(1)])
def test_another_way_is_refused(change):
    model = with_own_way(make("llama"), change)
    with (
        pytest.raises(ValueError, match="cannot be fed averaged embeddings: what it does"),
        token_superposition(model, 4),
    ):
        pass


def test_a_model_that_cannot_be_followed_is_taken_for_an_ordinary_one():
    def fail(embedded):
        raise KeyError

    assert inputs_embeds_scale(with_own_way(make("llama"), fail)) == 1


def test_dropout_of_embeddings_does_not_disturb():
    model = make("gpt2").train()
    model.transformer.drop.p = 0.5
    assert inputs_embeds_scale(model) == 1
