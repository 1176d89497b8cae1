"""Gradients of models compiled by inductor, the backend that training uses, against those of the same models as they are."""

import pytest
import torch
from conftest import make_model
from test_fused import gradients
from test_superposition import make_bags
from versions import fails_before

from hf_tst import token_superposition
from hf_tst.bags.folding import next_window_labels


@pytest.fixture(autouse=True, scope="module")
def _compiled_anew(tmp_path_factory):
    """Nothing that an earlier version compiled. The cases share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


@fails_before("torch", "2.13", "dynamo does not trace the cache that Transformers makes")
@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("mode", ["full", "input", "output"])
def test_compiled_gradients_are_those_of_the_model(mode, fused):
    model = make_model("llama", num_hidden_layers=1).train()
    bags, labels = make_bags()
    inputs = {"input_ids": bags, "labels": labels, "num_items_in_batch": torch.tensor(11.0)}
    if mode == "output":
        tokens = bags.flatten(1)
        inputs |= {"input_ids": tokens, "labels": next_window_labels(tokens, 4)}
    with token_superposition(model, 4, mode=mode, fused_loss=fused):
        expected = gradients(model, **inputs)
        found = gradients(torch.compile(model, backend="inductor", fullgraph=True), **inputs)
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-5, atol=1e-6)
    assert len(found[1]) == len(expected[1])
    for name, gradient in expected[1].items():
        assert (found[1][f"_orig_mod.{name}"] - gradient).norm() <= 1e-5 * gradient.norm(), name
