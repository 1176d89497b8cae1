"""The plan's arithmetic, against real models (without memory) and by hand."""

import pytest
import scaling
import torch
from peft import LoraConfig
from tables import read_table
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig
from versions import fails_before

from hf_tst.planning.estimate import (
    Layout,
    ModelShape,
    Precision,
    checkpoint_bytes,
    communication_per_step,
    memory_per_gpu,
)
from hf_tst.planning.flops import flops_per_token

SMALL = ModelShape.from_config(
    LlamaConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        vocab_size=100, tie_word_embeddings=False,
    )
)  # fmt: skip


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
    inside = (
        6 * 8 + 2 * 8 + (4 + 2) * 4 + 4 * 16
    )  # numbers of two bytes a position: norms, their results, attention, MLP
    assert memory["activations"] == 2 * 2 * 10 * inside
    assert memory["loss"] == 10 * 100 * 2 + 6 * 800  # one chunk
    assert memory["embedding"] == 2 * 10 * 3 * 8
    assert memory["peak"] == sum(memory[key] for key in ("state", "gathered", "activations", "loss"))
    recomputed = Layout(4, 1, 2, 5, activation_checkpointing=True)
    assert memory_per_gpu(SMALL, recomputed)["activations"] == 2 * 10 * (2 * 8 + inside)
    assert memory_per_gpu(SMALL, layout, fused_loss=False)["loss"] == 12 * 10 * 100 + 2 * 800


def test_communication_by_hand():
    layout = Layout(shard_size=4, replicas=2, rows=2, length=5, micro_batches=3)
    whole, shard = 2 * SMALL.parameters * 3 // 4, 2 * SMALL.parameters // 4
    traffic = communication_per_step(SMALL, layout)
    assert traffic == {"gather": 3 * (2 * whole - 1200), "scatter": whole, "replicate": shard}
    each = Layout(shard_size=4, replicas=2, rows=2, length=5, micro_batches=3, sync_each_batch=True)
    assert communication_per_step(SMALL, each) == traffic | {"scatter": 3 * whole, "replicate": 3 * shard}
    assert memory_per_gpu(SMALL, layout)["unreduced"] == 2 * SMALL.parameters
    assert memory_per_gpu(SMALL, each)["unreduced"] == 0
    assert communication_per_step(SMALL, Layout(1, 1, 2, 5)) == dict.fromkeys(traffic, 0)


def test_superposition_costs_no_memory_at_its_peak_and_nothing_else():
    for name, shape in scaling.SHAPES.items():
        for layout in scaling.layouts(name, scaling.PlanArguments()).values():
            one, bags = (memory_per_gpu(shape, layout, bag_size=s) for s in (1, scaling.BAG_SIZES[name]))
            assert one["peak"] == bags["peak"] < 80 * 2**30


def test_the_document_is_up_to_date():
    assert read_table("docs/scaling.md", "plan") == scaling.make_table(scaling.PlanArguments()), (
        "run `python scripts/scaling.py`"
    )


def saved_bytes(config, layers, weights, autocast):
    """What autograd saves of a body of so many layers, without parameters and copies of them, a position."""
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    body = AutoModelForCausalLM.from_config(config).to(weights).train().model
    own = {tensor.untyped_storage().data_ptr() for tensor in (*body.parameters(), *body.buffers())}
    sizes = {parameter.numel() for parameter in body.parameters() if autocast}
    found, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        copy_of_weight = tensor.dim() == 2 and tensor.numel() in sizes and tensor.shape[0] != 512
        if storage.data_ptr() not in own and not copy_of_weight:
            found[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    ids = torch.randint(0, 97, (2, 256))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        body(input_ids=ids, use_cache=False)
    return sum(found.values()) / 512


@fails_before("transformers", "5.23", "autograd saves other activations of its models")
@pytest.mark.parametrize(
    ("model_type", "weights", "autocast"),
    [
        ("llama", torch.float32, True),
        ("llama", torch.float32, False),
        ("llama", torch.bfloat16, False),
        ("qwen3", torch.float32, True),
        ("qwen3", torch.bfloat16, False),
        ("qwen3_moe", torch.float32, False),
        ("qwen3_moe", torch.bfloat16, False),
    ],
)
def test_activations_are_what_autograd_saves(model_type, weights, autocast):
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = CONFIG_MAPPING[model_type](
        vocab_size=97, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        **(mixture if model_type == "qwen3_moe" else {}),
    )  # fmt: skip
    layer = saved_bytes(config, 2, weights, autocast) - saved_bytes(config, 1, weights, autocast)
    shape = ModelShape.from_config(config)
    # One GPU holds weights as they are stored; shards are computed with in bfloat16.
    layout = Layout(2 if weights == torch.bfloat16 else 1, 1, 1, 1)
    precision = Precision(compute=2 if autocast or weights == torch.bfloat16 else 4)
    expected = memory_per_gpu(shape, layout, precision=precision)["activations"] / shape.layers
    assert expected == pytest.approx(layer, rel=0.05)


def test_the_shapes_of_families_are_counted():
    tied = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
                       vocab_size=100, tie_word_embeddings=True)  # fmt: skip
    shape = ModelShape.from_config(tied)
    assert shape.parameters == SMALL.parameters - 800
    assert shape.active_parameters == SMALL.active_parameters == shape.parameters
    mixture = Qwen3MoeConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4, num_experts=4,
                             num_experts_per_tok=1, moe_intermediate_size=16, vocab_size=100, tie_word_embeddings=False)  # fmt: skip
    shape = ModelShape.from_config(mixture)
    assert shape.parameters - shape.active_parameters == 800 + 3 * 3 * 8 * 16
    gpt2 = ModelShape.from_config(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=100, n_positions=16))
    assert (gpt2.layers, gpt2.hidden_size, gpt2.intermediate_size) == (2, 8, 32)
    assert gpt2.active_parameters == gpt2.parameters - 16 * 8  # its positions are looked up


def test_an_adapter_is_all_that_is_trained():
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    shape = ModelShape.from_config(
        LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
                    vocab_size=100, tie_word_embeddings=False), lora
    )  # fmt: skip
    adapter = 2 * 2 * (8 + 8)
    assert shape.trainable_parameters == adapter
    assert shape.parameters == SMALL.parameters + adapter
    attention = 12 * 2 * 8 * 5
    assert flops_per_token(shape, 5) == 4 * shape.active_parameters + 2 * adapter + attention
    assert checkpoint_bytes(shape) == {"model": 4 * adapter, "checkpoint": 12 * adapter}
    one = memory_per_gpu(shape, Layout(1, 1, 1, 1))
    assert one["state"] == 4 * shape.parameters + 12 * adapter
