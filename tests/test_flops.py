"""The count of FLOPs against PyTorch's own, of real forward and backward passes, and the utilization that follows from it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BLOCK_LENGTH, make_blocks, make_model
from mtp_by_hand import logits_by_hand
from peft import LoraConfig, get_peft_model
from tiny_families import FAMILIES as EVERY_FAMILY
from tiny_families import VOCAB_SIZE, make_family
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from versions import fails_before, params

from hf_tst import MTPHeads, TSTTrainer, token_superposition
from hf_tst.experiments.arms import make_arm
from hf_tst.models.shape import ModelShape
from hf_tst.mtp.heads import MTP_KINDS
from hf_tst.planning.estimate import Layout, plan_run
from hf_tst.planning.flops import step_flops
from hf_tst.planning.reference import ACCELERATORS, peak_tflops
from hf_tst.training.callbacks import token_meter

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
        superposed = counted(lambda: model(input_ids=bags, labels=bags.flip(1)).loss)
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


def products(model, length):
    """FLOPs of the matrix products of a forward pass over two rows, without scans, and 2 per norm weight and bias."""
    ids = torch.randint(1, VOCAB_SIZE, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)

    def of(module, kind=""):
        path = f"{type(model).__name__}.{module}" if module else "Global"
        return sum(
            count for name, count in counter.get_flop_counts().get(path, {}).items() if kind in str(name)
        )

    scans = 0
    for name, module in model.named_modules():
        # What stands in the place of attention there: projections, which some do as batched products, too, and a scan.
        if re.search("Mixer$|MambaLayer$|DeltaNet$|Lightning", type(module).__name__):
            parts = [
                f"{name}.{part}" for part, child in module.named_modules() if isinstance(child, nn.Linear)
            ]
            scans += of(name, "bmm") - sum(of(part, "bmm") for part in parts)
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
    return of("") - scans + 2 * vectors * ids.numel()


COUNTED = [family for family in EVERY_FAMILY if not family.refused]


@pytest.mark.parametrize(
    "family",
    params(
        COUNTED,
        ["DiffLlama", "RecurrentGemma"],
        fails_before("transformers", "5.23", "it has no attention by matrix products, which are counted"),
    ),
)
def test_every_family_is_counted(family):
    """On rows so long that a layer with or without scores of pairs of positions makes a difference."""
    # Llama 4 computes all experts, and sets what it does not use to 0.
    more = {"num_experts_per_tok": 4} if family.name == "Llama 4" else {}
    model = make_family(family, attn_implementation="eager", **more)
    model.config._experts_implementation = "eager"
    assert step_flops(model, 2, 64) == pytest.approx(3 * products(model.eval(), 64), rel=0.05)


def test_deepseek_v3_by_hand():
    """Multi-head latent attention: queries and keys of 128 + 64 numbers, values of 128. The default configuration has 671B."""
    d, length = 7168, 4096
    queries = d * 1536 + 1536 + 1536 * 128 * (128 + 64)
    keys_and_values = d * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    attention = queries + keys_and_values + 128 * 128 * d
    dense, expert = 3 * d * 18432, 3 * d * 2048
    router = 256 * d  # and 256 corrections, which are no parameters with a gradient
    layers = 61 * (attention + 2 * d) + 3 * dense + 58 * (router + (8 + 1) * expert)
    scores = 61 * 128 * (192 + 128) * length
    expected = 6 * (layers + d + 129280 * d) + 6 * scores
    config = CONFIG_MAPPING["deepseek_v3"]()
    assert step_flops(config, 1, length) == pytest.approx(length * expected, rel=1e-4)
    assert ModelShape.from_config(config).active_parameters == pytest.approx(36.6e9, rel=0.01)


def test_qwen3_next_by_hand():
    """48 layers, of which every fourth has softmax attention. The default configuration has 80B, 3B of them active."""
    d, length = 2048, 4096
    attention = (
        d * 16 * 2 * 256 + 2 * d * 2 * 256 + 16 * 256 * d + 2 * 256
    )  # queries and their gates, keys, values, output
    keys, values = 16 * 128, 32 * 128
    linear = d * (2 * keys + 2 * values) + d * 2 * 32 + 4 * (2 * keys + values) + values * d + 32 + 32 + 128
    experts = d * 512 + (10 + 1) * 3 * d * 512 + d
    layers = 12 * attention + 36 * linear + 48 * (experts + 2 * d)
    expected = 6 * (layers + d + 151936 * d) + 6 * 12 * 16 * (256 + 256) * length
    assert step_flops(CONFIG_MAPPING["qwen3_next"](), 1, length) == pytest.approx(length * expected, rel=1e-4)


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


# Utilization

PEAK = 1e-6  # TFLOP/s, of which a tiny model uses a share that shows


class CountingTrainer(TSTTrainer):
    """Counts the FLOPs of its steps with PyTorch's counter."""

    counted = 0

    def training_step(self, *args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            loss = super().training_step(*args, **kwargs)
        self.counted += counter.get_total_flops()
        return loss


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by half a second in each forward pass of a model that it is added to."""
    now = [0.0]
    monkeypatch.setattr(token_meter, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda model: model.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 0.5))


def utilizations(trainer):
    return [
        entry["tst_model_flops_utilization"]
        for entry in trainer.state.log_history
        if "tst_model_flops_utilization" in entry
    ]


@pytest.mark.parametrize("ratio", [0, 0.3])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_utilization_is_the_flops_of_the_steps_over_their_time_and_the_peak(family, ratio, make_args, clock):
    model = make(family, True)
    clock(model)
    args = make_args(
        tst_phase_ratio=ratio, tst_peak_tflops=PEAK, tst_fused_loss="off", gradient_accumulation_steps=2,
        save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=1,
    )  # fmt: skip
    trainer = CountingTrainer(model, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(3))
    trainer.train()
    assert trainer.state.total_flos == pytest.approx(trainer.counted, rel=0.02)
    # 10 steps of two forward passes, so of a second each: evaluation moves the clock, too, and does not count.
    expected = [pytest.approx(trainer.counted / 10 / (PEAK * 1e12), rel=0.02)] * 10
    assert utilizations(trainer) == expected
    trainer.create_model_card()
    mean = sum(utilizations(trainer)) / 10
    card = (Path(args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert f"| model FLOPs utilization | {mean:.1%} of {PEAK:g} TFLOP/s per device |" in card

    resumed = CountingTrainer(model, args, train_dataset=make_blocks(200), eval_dataset=make_blocks(3))
    resumed.train(resume_from_checkpoint=str(Path(args.output_dir, "checkpoint-4")))
    assert utilizations(resumed) == expected
    assert resumed.state.total_flos == trainer.state.total_flos


def test_more_rows_take_less_attention(make_args):
    found = {}
    for rows in ("longer", "more"):
        model = make("llama", False)
        trainer = CountingTrainer(
            model,
            make_args(tst_superposition_rows=rows, tst_fused_loss="off"),
            train_dataset=make_blocks(200),
        )
        trainer.train()
        assert trainer.state.total_flos == pytest.approx(trainer.counted, rel=0.02)
        found[rows] = trainer.state.total_flos
        layout = Layout(1, 1, rows=2, length=BLOCK_LENGTH)
        plan = plan_run(ModelShape.from_config(model.config), trainer.schedule, layout, ACCELERATORS["h100"])
        assert plan.flops == found[rows]
        arm = make_arm(
            "x",
            {},
            {"max_steps": 10, "tst_bag_size": 4, "tst_superposition_rows": rows},
            plan.model,
            BLOCK_LENGTH,
        )
        assert arm.flops_until(10, plan.latent_tokens) == found[rows]
    assert found["more"] < found["longer"]


def test_rows_of_several_lengths_count_as_long_as_they_are(make_args, clock):
    model = make("llama", True)
    clock(model)
    args = make_args(tst_phase_ratio=0, tst_peak_tflops=PEAK, per_device_train_batch_size=1)
    blocks = [
        {"input_ids": block["input_ids"][:n]} for block, n in zip(make_blocks(10), range(3, 13), strict=True)
    ]
    trainer = CountingTrainer(model, args, train_dataset=blocks)
    trainer.train()
    assert trainer.state.total_flos == pytest.approx(trainer.counted, rel=0.02)
    assert sum(utilizations(trainer)) == pytest.approx(trainer.counted / 0.5 / (PEAK * 1e12), rel=0.02)


def test_frozen_weights_of_an_adapted_model_have_no_gradient_to_count(make_args):
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = get_peft_model(make("llama", True), lora)
    args = make_args(tst_fused_loss="off")
    trainer = CountingTrainer(model, args, train_dataset=make_blocks(200))
    trainer.train()
    # The first layer's input needs no gradient, so that a little less is computed than counted.
    assert 0 <= trainer.state.total_flos / trainer.counted - 1 < 0.05
    whole = 10 * step_flops(model.config, 2, BLOCK_LENGTH)
    assert trainer.state.total_flos < 0.75 * whole


def test_without_a_peak_no_utilization_is_logged(make_args):
    args = make_args()
    trainer = TSTTrainer(make("llama", True), args, train_dataset=make_blocks(200))
    trainer.train()
    trainer.create_model_card()
    assert trainer.state.total_flos > 0
    assert not utilizations(trainer)
    assert "utilization" not in (Path(args.output_dir) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("ratio", [0, 0.3])
def test_a_model_that_cannot_be_counted_trains_with_one_warning(ratio, make_args, caplog):
    model = make("llama", True)

    class Own(type(model)):
        def __init__(self, config):
            raise TypeError("I want two arguments")

    model.__class__ = Own
    args = make_args(tst_phase_ratio=ratio, tst_peak_tflops=PEAK)
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(200))
    trainer.train()
    assert trainer.state.global_step == 10
    assert trainer.state.total_flos == 0
    assert not utilizations(trainer)
    assert [record.levelname for record in caplog.records if "I want two arguments" in record.message] == [
        "WARNING"
    ]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_whole_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0)) == peak
    assert peak_tflops(torch.device("cpu")) is None
