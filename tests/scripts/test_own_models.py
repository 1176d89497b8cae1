"""Small models of the user's own, as scripts that train from scratch have: trained on the targets of bags, or refused in a sentence."""

import pytest
import torch
from conftest import VOCAB_SIZE, losses, make_blocks
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_tst import TSTError, TSTTrainer


class SmallConfig(PretrainedConfig):
    model_type = "small"


class Body(nn.Module):
    """Returns a tuple, as the bodies of many small models do."""

    def __init__(self):
        super().__init__()
        self.wte, self.mix = nn.Embedding(VOCAB_SIZE, 16), nn.GRU(16, 16, batch_first=True)

    def forward(self, input_ids):
        hidden, _ = self.mix(self.wte(input_ids))
        return hidden, None, 0.1 * hidden.pow(2).mean()


class SmallForCausalLM(PreTrainedModel):
    """Calls `loss_function`."""

    config_class = SmallConfig
    form = dict

    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = Body(), nn.Linear(16, VOCAB_SIZE, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.wte

    def own_loss(self, logits, labels, extra):
        return self.loss_function(logits, labels, VOCAB_SIZE)

    def forward(self, input_ids, labels=None):
        hidden, _, extra = self.model(input_ids)
        if labels is None:  # as nanoGPT does in generation
            hidden = hidden[:, -1:]
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.own_loss(logits, labels, extra)
        if self.form is tuple:
            return (logits,) if loss is None else (loss, logits)
        return self.form(loss=loss, logits=logits)


class OwnForCausalLM(SmallForCausalLM):
    """Computes its loss itself."""

    def own_loss(self, logits, labels, extra):
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-1)


class PenalizedForCausalLM(OwnForCausalLM):
    def own_loss(self, logits, labels, extra):
        return super().own_loss(logits, labels, extra) + extra


class UnshiftedForCausalLM(OwnForCausalLM):
    def own_loss(self, logits, labels, extra):
        return cross_entropy(logits.flatten(0, 1), labels.flatten())


class PaddedForCausalLM(OwnForCausalLM):
    """Leaves out a token that packed text holds."""

    def own_loss(self, logits, labels, extra):
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)


class NamelessForCausalLM(SmallForCausalLM):
    """Does not say which module is its embedding."""

    get_input_embeddings = PreTrainedModel.get_input_embeddings


class HeadlessForCausalLM(SmallForCausalLM):
    def get_output_embeddings(self):
        return None


def train(make_args, kind, form=dict, prefix="", **options):
    torch.manual_seed(0)
    own = type(kind.__name__, (kind,), {"form": staticmethod(form), "base_model_prefix": prefix})
    if form is tuple:
        own.form = tuple
    args = make_args(tst_phase_ratio=0.5, max_steps=6, learning_rate=1e-2, **options)
    trainer = TSTTrainer(own(SmallConfig(vocab_size=VOCAB_SIZE)), args, train_dataset=make_blocks(100))
    trainer.train()
    return trainer


# With a prefix, the model's body is known, and the checks before training replace it.
@pytest.mark.parametrize("prefix", ["", "model"])
@pytest.mark.parametrize("form", [dict, tuple, CausalLMOutputWithPast])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_next_token_loss_of_its_own_trains_as_loss_function_does(prefix, form, accumulation, make_args):
    options = {"gradient_accumulation_steps": accumulation, "prefix": prefix, "form": form}
    usual = train(make_args, SmallForCausalLM, tst_fused_loss="off", **options)
    own = train(make_args, OwnForCausalLM, **options)
    assert losses(own) == pytest.approx(losses(usual), rel=1e-5)
    assert own.evaluate(make_blocks(4))["eval_loss"] == pytest.approx(
        usual.evaluate(make_blocks(4))["eval_loss"], rel=1e-5
    )


@pytest.mark.parametrize("kind", [SmallForCausalLM, OwnForCausalLM])
def test_a_class_of_its_own_may_have_any_name(kind, make_args):
    usual, other = train(make_args, kind), train(make_args, type("SmallGPT", (kind,), {}))
    assert losses(other) == losses(usual)
    with pytest.raises(TSTError, match="causal language model"):
        train(make_args, type("SmallForMaskedLM", (kind,), {}))


@pytest.mark.parametrize("form", [dict, tuple, CausalLMOutputWithPast])
def test_the_loss_of_any_form_of_output_is_fused(form, make_args):
    fused = train(make_args, SmallForCausalLM, form, "model", tst_fused_loss="on")
    usual = train(make_args, SmallForCausalLM, form, "model", tst_fused_loss="off")
    assert losses(fused) == pytest.approx(losses(usual), rel=1e-5)


@pytest.mark.parametrize("prefix", ["", "model"])
@pytest.mark.parametrize("kind", [PenalizedForCausalLM, UnshiftedForCausalLM, PaddedForCausalLM])
def test_another_loss_of_its_own_is_refused(prefix, kind, make_args):
    with pytest.raises(TSTError, match="computes its loss itself"):
        train(make_args, kind, prefix=prefix)


@pytest.mark.parametrize("kind", [NamelessForCausalLM, HeadlessForCausalLM])
def test_a_model_that_hides_its_embedding_or_head_is_refused(kind, make_args):
    with pytest.raises(TSTError, match="get_input_embeddings"):
        train(make_args, kind)


class PenalizedInTrainingForCausalLM(OwnForCausalLM):
    """A part of it adds to the loss in training, as routers do; `from_pretrained` gives a model in evaluation mode."""

    def own_loss(self, logits, labels, extra):
        return super().own_loss(logits, labels, extra) + (extra if self.model.training else 0)


@pytest.mark.parametrize("prefix", ["", "model"])
def test_a_term_that_only_training_adds_is_not_dropped(prefix, make_args):
    PenalizedInTrainingForCausalLM.base_model_prefix = prefix
    model = PenalizedInTrainingForCausalLM(SmallConfig(vocab_size=VOCAB_SIZE)).eval()
    with pytest.raises(TSTError, match="computes its loss itself"):
        TSTTrainer(model, make_args(), train_dataset=make_blocks(100))
    assert not any(part.training for part in model.modules())
