"""The plan's arithmetic, against real models (without memory) and by hand."""

from pathlib import Path

import pytest
import scaling
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from hf_tst.plan import Layout, ModelShape, communication_per_step, memory_per_gpu, operations_per_gpu

SMALL = ModelShape(
    hidden_size=8, layers=2, heads=2, kv_heads=1, head_dim=4, intermediate_size=16, vocab_size=100
)


def count(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def make_config(name):
    shape = scaling.SHAPES[name]
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": False,
    }
    if shape.experts == 1:
        return LlamaConfig(intermediate_size=shape.intermediate_size, **sizes)
    return Qwen3MoeConfig(
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        **sizes,
    )


@pytest.mark.parametrize("name", scaling.SHAPES)
def test_parameters_are_those_of_the_model(name):
    assert count(make_config(name)) == scaling.SHAPES[name].parameters


def test_the_recipes_have_the_sizes_of_their_names():
    dense, mixture = scaling.SHAPES["3B"], scaling.SHAPES["10B-A1B"]
    assert 3e9 < dense.parameters < 3.5e9
    assert dense.active_parameters == dense.parameters - dense.embedding_parameters
    assert 9.5e9 < mixture.parameters < 10.5e9
    assert 0.9e9 < mixture.active_parameters < 1.2e9
    tokens = {
        name: {layout.latent_tokens for layout in scaling.layouts(name, scaling.PlanArguments()).values()}
        for name in scaling.SHAPES
    }
    assert tokens == {"3B": {2**21}, "10B-A1B": {2**23}}


def test_memory_by_hand():
    layout = Layout(shard_size=4, replicas=1, rows=2, length=5)
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 2 * 8 + 3 * 8 * 16
    parameters = 2 * layer + 2 * 800 + 8
    assert SMALL.parameters == parameters
    memory = memory_per_gpu(SMALL, layout, bag_size=3)
    assert memory["state"] == 16 * parameters // 4
    assert memory["gathered"] == 2 * (3 * layer + 800)
    inside = 4 * 8 + (4 + 2) * 4 + 3 * 16  # numbers a position
    assert memory["activations"] == 2 * 2 * 10 * inside
    assert memory["loss"] == 1 * 100 * 2 + 6 * 800  # chunks of one row
    assert memory["embedding"] == 2 * 10 * 3 * 8
    assert memory["peak"] == sum(memory[key] for key in ("state", "gathered", "activations", "loss"))
    recomputed = Layout(4, 1, 2, 5, activation_checkpointing=True)
    assert memory_per_gpu(SMALL, recomputed)["activations"] == 2 * 10 * (2 * 8 + inside)
    assert memory_per_gpu(SMALL, layout, fused_loss=False)["loss"] == 12 * 10 * 100 + 2 * 800


def test_communication_and_work_by_hand():
    layout = Layout(shard_size=4, replicas=2, rows=2, length=5, micro_batches=3)
    whole, shard = 2 * SMALL.parameters * 3 // 4, 2 * SMALL.parameters // 4
    traffic = communication_per_step(SMALL, layout)
    assert traffic == {"gather": 3 * (2 * whole - 1200), "scatter": 3 * whole, "replicate": 3 * shard}
    assert communication_per_step(SMALL, Layout(1, 1, 2, 5)) == dict.fromkeys(traffic, 0)
    assert operations_per_gpu(SMALL, layout) == 30 * (6 * SMALL.active_parameters + 6 * 2 * 8 * 5)


def test_superposition_costs_no_memory_at_its_peak_and_nothing_else():
    for name, shape in scaling.SHAPES.items():
        for layout in scaling.layouts(name, scaling.PlanArguments()).values():
            one, bags = (memory_per_gpu(shape, layout, bag_size=s) for s in (1, scaling.BAG_SIZES[name]))
            assert one["peak"] == bags["peak"] < 80 * 2**30


def test_the_document_is_up_to_date():
    text = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    table = text.split(scaling.BEGIN)[1].split(scaling.END)[0].strip()
    assert table == scaling.make_table(scaling.PlanArguments()), "run `python scripts/scaling.py`"
