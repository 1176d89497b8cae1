"""Ways of running a model that must not change what superposition trains: each through the switch, against the plain one."""

import copy
import math

import pytest
import torch
from conftest import losses as logged_losses
from conftest import make_blocks, make_model
from transformers import TrainerCallback
from versions import fails_before

from hf_tst import TSTTrainer, TSTTrainingArguments

FIELDS = TSTTrainingArguments.__dataclass_fields__
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
)


def train(model, args, **options):
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(200), **options)
    trainer.train()
    return logged_losses(trainer)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses of ordinary runs by model type."""
    found = {}

    def losses(make_args, model_type, **overrides):
        key = (model_type, *sorted(overrides.items()))
        if key not in found:
            found[key] = train(make_model(model_type, **overrides), make_args(adam_epsilon=1e-3))
        return found[key]

    return losses


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize(
    ("model_type", "reentrant"),
    # Reentrant with routers: Transformers itself then loses the gradient of the auxiliary loss.
    [("llama", True), ("llama", False), ("qwen3_moe", False)],
)
def test_recomputed_activations(make_args, plain, model_type, reentrant, fused):
    recomputed = []
    model = make_model(model_type)
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda mlp, _: recomputed.append(1) if mlp.training else None
    )
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    args = make_args(adam_epsilon=1e-3, tst_fused_loss=fused, **options)
    torch.testing.assert_close(train(model, args), plain(make_args, model_type), rtol=1e-5, atol=1e-5)
    assert len(recomputed) == 2 * args.max_steps  # once forward, once more backward


def test_the_older_name_of_recomputed_activations(make_args, plain):
    model, passes = make_model("llama"), []
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda mlp, _: passes.append(1) if mlp.training else None
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(
        train(model, make_args(adam_epsilon=1e-3)), plain(make_args, "llama"), rtol=1e-5, atol=1e-5
    )
    assert len(passes) == 20


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("tied", [True, False])
def test_bf16_autocast(make_args, plain, tied, fused):
    model = make_model("llama", tie_word_embeddings=tied)
    expected = plain(make_args, "llama", tie_word_embeddings=tied)
    dtypes = set()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    losses = train(model, make_args(adam_epsilon=1e-3, bf16=True, tst_fused_loss=fused))
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(losses, expected, rtol=0, atol=0.03)
    assert losses != expected


@pytest.mark.parametrize("fused", ["on", "off"])
def test_fp16_autocast(llama, fused):
    """Trainer refuses fp16 on CPU, so here it is autocast itself, with a scaled loss."""
    from test_superposition import make_bags

    from hf_tst import token_superposition

    bags, labels = make_bags()
    gradients = {}
    for enabled in (False, True):
        model = copy.deepcopy(llama).train()
        with (
            token_superposition(model, 4, fused_loss=fused),
            torch.autocast("cpu", torch.float16, enabled=enabled),
        ):
            loss = model(input_ids=bags, labels=labels).loss
        assert loss.dtype == torch.float32
        (loss * 1024).backward()
        gradients[enabled] = [p.grad / 1024 for p in model.parameters()]
    for found, expected in zip(gradients[True], gradients[False], strict=True):
        assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(make_args, plain, model_type, implementation):
    overrides = {"attention_dropout": 0.0}
    expected = plain(make_args, model_type, **overrides)
    model = make_model(model_type, **overrides)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    losses = train(model, make_args(adam_epsilon=1e-3))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@fails_before("torch", "2.13", "it compiles more often")
@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_torch_compile_compiles_once_more_at_the_switch(make_args, plain, model_type, fused):
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

    args = make_args(
        adam_epsilon=1e-3, tst_fused_loss=fused, torch_compile=True, torch_compile_backend="aot_eager"
    )
    losses = train(make_model(model_type), args, callbacks=[Count()])
    torch.testing.assert_close(losses, plain(make_args, model_type), rtol=1e-5, atol=1e-5)
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * 3 + [graphs[0] + 1] * 7
    assert all(math.isfinite(loss) for loss in losses)
