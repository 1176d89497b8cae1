"""The count of operations against PyTorch's own, of real forward and backward passes."""

import pytest
import torch
from conftest import make_model
from mtp_by_hand import logits_by_hand
from tiny_families import FAMILIES as EVERY_FAMILY
from tiny_families import VOCAB_SIZE
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from versions import fails_before, params

from hf_tst import MTPHeads, token_superposition
from hf_tst.mtp.heads import MTP_KINDS
from hf_tst.planning.flops import step_flops

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
FAMILIES = {
    "llama": SIZES,
    "mixtral": SIZES | {"head_dim": 16, "intermediate_size": 48},
    "qwen3_moe": SIZES | {"head_dim": 24, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3},
    "gpt2": {"vocab_size": 160, "n_embd": 64, "n_layer": 3, "n_head": 4},
}  # fmt: skip
# Experts under other names, of which the configuration says how many there are under others, too.
OTHER_EXPERTS = {
    "dbrx": {
        "vocab_size": 160, "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 3, "hidden_size": 64},
    },
    "jetmoe": {
        "vocab_size": 160, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "kv_channels": 16, "num_local_experts": 8, "num_experts_per_tok": 3,
    },
}  # fmt: skip
ROWS, LENGTH = 2, 24
TIED = {"llama": [False, True]}
CASES = [(family, tied) for family in FAMILIES for tied in TIED.get(family, [True])]


def make(family, tied):
    return make_model(
        family,
        **FAMILIES[family],
        tie_word_embeddings=tied,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()  # the count is that of training: only dropout is off


def counted(step):
    with FlopCounterMode(display=False) as counter:
        step().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_step_of_either_phase(family, tied):
    model = make(family, tied)
    ids = torch.randint(0, 160, (ROWS, LENGTH))
    bags = torch.randint(0, 160, (ROWS, LENGTH, 4))
    ordinary = counted(lambda: model(input_ids=ids, labels=ids).loss)
    with token_superposition(model, 4, fused_loss="off"):
        superposed = counted(lambda: model(input_ids=bags, labels=bags).loss)
    assert step_flops(model, ROWS, LENGTH) == pytest.approx(ordinary, rel=0.02)
    assert step_flops(model.config, ROWS, LENGTH, phase="superposition") == pytest.approx(
        superposed, rel=0.02
    )


@pytest.mark.parametrize(
    "model_type",
    params(OTHER_EXPERTS, ["dbrx"], fails_before("transformers", "5.23", "its experts have other shapes")),
)
def test_experts_that_are_not_used_are_not_counted_whatever_they_are_called(model_type):
    config = CONFIG_MAPPING[model_type](**OTHER_EXPERTS[model_type])
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    ids = torch.randint(0, 160, (ROWS, LENGTH))
    assert step_flops(model, ROWS, LENGTH) == pytest.approx(
        counted(lambda: model(input_ids=ids, labels=ids).loss), rel=0.02
    )


@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize("num_heads", [2, 4])
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_a_step_with_extra_heads(family, tied, num_heads, kind):
    """Of layers and heads called one by one, as the fused loss keeps its products to itself."""
    model = make(family, tied)
    heads = MTPHeads(model, num_heads, kind)
    ids = torch.randint(0, 160, (ROWS, LENGTH))
    found = counted(lambda: sum(z.sum() for z in logits_by_hand(model, heads, ids)))
    given = step_flops(model, ROWS, LENGTH, mtp_num_heads=num_heads, mtp_kind=kind)
    assert given == pytest.approx(found, rel=0.02)
    superposed = step_flops(model, ROWS, LENGTH, phase="superposition", mtp_num_heads=num_heads)
    assert superposed == step_flops(model, ROWS, LENGTH)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "rwkv"])
def test_a_model_without_attention_has_no_pairs_of_positions(model_type):
    (family,) = [family for family in EVERY_FAMILY if family.model_type == model_type]
    config = CONFIG_MAPPING[model_type](vocab_size=VOCAB_SIZE, **family.config)
    assert step_flops(config, 1, 64) == 64 * step_flops(config, 1, 1) > 0


@pytest.mark.parametrize("wrong", [{"mtp_num_heads": 0}, {"mtp_kind": "tree"}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        step_flops(make("llama", True), ROWS, LENGTH, **wrong)
