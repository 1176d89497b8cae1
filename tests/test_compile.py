"""Gradients of models compiled by inductor, the backend that training uses, against those of the same models as they are."""

import pytest
import torch
from conftest import make_model
from processes import start_process
from test_fused import gradients
from test_superposition import make_bags
from versions import fails_before, params

from hf_tst import TSTError, fused_next_token_loss, token_superposition
from hf_tst.bags.folding import next_window_labels
from hf_tst.bags.weighting import INPUT_WEIGHTINGS
from hf_tst.models.fused import TSTLoss

NEEDS_NEWER_DYNAMO = fails_before("torch", "2.13", "dynamo does not trace the fused head")


@pytest.fixture(autouse=True, scope="module")
def _compiled_anew(tmp_path_factory):
    """Nothing that an earlier version compiled. The cases share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", params(["on", "off"], ["on"], NEEDS_NEWER_DYNAMO))
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


@NEEDS_NEWER_DYNAMO
@pytest.mark.parametrize("boundaries", ["ignore", "respect"])
@pytest.mark.parametrize("weighting", INPUT_WEIGHTINGS)
def test_weighted_input_is_traced_whole(weighting, boundaries):
    model = make_model("llama", num_hidden_layers=1).train()
    bags, labels = make_bags()
    if boundaries == "respect":
        bags[0, 1, 2:] = -100
    with token_superposition(model, 4, input_weighting=weighting, document_boundaries=boundaries):
        expected = gradients(model, input_ids=bags, labels=labels)
        found = gradients(
            torch.compile(model, backend="eager", fullgraph=True), input_ids=bags, labels=labels
        )
    assert torch.equal(found[0].loss, expected[0].loss)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][f"_orig_mod.{name}"], gradient, rtol=1e-5, atol=1e-7)


def test_a_body_that_was_compiled_before_averages_bags():
    """Dynamo takes no notice of hooks that come later: what the body is given must tell bags from tokens."""
    model, compiled = (make_model("llama", num_hidden_layers=1).train() for _ in range(2))
    compiled.model.compile(backend="eager")
    bags, labels = make_bags()
    tokens = bags[..., 0].contiguous()
    for _ in range(2):
        assert torch.equal(compiled(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss)
        with token_superposition(model, 4), token_superposition(compiled, 4):
            assert torch.equal(compiled(tokens, labels=tokens).loss, model(tokens, labels=tokens).loss)
            assert torch.equal(compiled(bags, labels=labels).loss, model(bags, labels=labels).loss)


def test_hooks_that_run_as_they_are_in_a_compiled_model_give_the_loss():
    """Dynamo leaves a function alone for good once it has failed on it, and compiles what the function calls."""
    process = start_process(train_with_a_skipped_hook)
    process.join(120)
    assert process.exitcode == 0


def train_with_a_skipped_hook() -> None:
    torch._dynamo.eval_frame.skip_code(TSTLoss.after_forward.__code__)
    model = make_model("llama", num_hidden_layers=1).train()
    tokens = make_bags()[0][..., 0].contiguous()
    with fused_next_token_loss(model):
        expected = model(tokens, labels=tokens).loss
        found = torch.compile(model, backend="eager")(tokens, labels=tokens)
    torch.testing.assert_close(found.loss, expected)
    with pytest.raises(TSTError):
        found.logits.mean()
