"""FSDP2 as accelerate starts it, on one GPU: `HF_TST_TEST_DEVICE=cuda python -m pytest tests/gpu`.

With `HF_TST_TEST_DEVICE=cpu` the launches are tried without FSDP, which accelerate has on accelerators alone.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE, losses, make_blocks, make_model
from fsdp_gpu_run import train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from hf_tst import TSTTrainer

DEVICE = os.environ.get("HF_TST_TEST_DEVICE")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="needs a CUDA device, and HF_TST_TEST_DEVICE=cuda"),
]
needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "hf_tst" / "pretraining" / "accelerate"
# options of the run, configuration of accelerate
CASES = {
    "bf16": ({}, "fsdp2"),
    "full_state_dict": ({}, "fsdp2 --fsdp_state_dict_type=FULL_STATE_DICT"),
    "unfused": ({"tst_fused_loss": "off"}, "fsdp2"),
    "compiled": ({"torch_compile": True}, "fsdp2"),
    "tied": ({"config": {"tie_word_embeddings": True}}, "fsdp2"),
    "mixture": ({"model_type": "qwen3_moe"}, "fsdp2"),
    "mtp": ({"mtp_num_heads": 3, "mtp_loss_weight": 0.2}, "fsdp2"),
    "mtp_sequential": ({"mtp_num_heads": 3, "mtp_kind": "sequential"}, "fsdp2_cpu_offload"),
    "mtp_checkpointing": ({"mtp_num_heads": 2, "mtp_loss_weight": 0.3}, "fsdp2_activation_checkpointing"),
    "activation_checkpointing": ({}, "fsdp2_activation_checkpointing"),
    "cpu_offload": ({}, "fsdp2_cpu_offload"),
    "flash": ({"attention": "flash_attention_2"}, "fsdp2"),
}
PLAIN: dict[str, list[float]] = {}


def launch(out, options, config):
    name, *flags = config.split()
    command = [
        sys.executable, "-m", "accelerate.commands.launch", f"--config_file={CONFIGS / name}.yaml",
        "--num_processes=1", "--main_process_port=0", *flags,
        str(Path(__file__).with_name("fsdp_gpu_run.py")), str(out), json.dumps(options),
    ]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads((out / "result.json").read_text())


def run_without_fsdp(tmp_path_factory, options):
    """The losses of the same run in bfloat16 on one device that holds the whole model."""
    config = {key: value for key, value in options.items() if key in ("model_type", "config") or "mtp" in key}
    key = json.dumps(config, sort_keys=True)
    if key not in PLAIN:
        PLAIN[key] = losses(train(tmp_path_factory.mktemp("plain"), config | {"bf16": True}))
    return PLAIN[key]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_flash) if name == "flash" else name for name in CASES]
)
def test_fsdp2_trains_through_the_switch(tmp_path, tmp_path_factory, name):
    options, config = CASES[name]
    result = launch(tmp_path, options, config)
    if DEVICE != "cpu":
        assert result["distributed"] == "FSDP"
        assert result["fsdp2"]
        assert result["sharded"]
    assert result["losses"][0] == pytest.approx(math.log(VOCAB_SIZE), rel=0.05) or name == "mixture"
    # FSDP2 hands on losses in bfloat16, which has steps of 0.03 between 4 and 8; a model that does not train, or a resume
    # without its weights, would be further off than the 0.8 that the loss falls by.
    expected = run_without_fsdp(tmp_path_factory, options)
    assert expected[-1] < expected[0] - 0.5
    torch.testing.assert_close(result["losses"], expected, rtol=0, atol=0.15)
    torch.testing.assert_close(result["resumed"], result["losses"], rtol=0, atol=0.15)

    checkpoint = tmp_path / "run" / "checkpoint-3"
    sharded = "full" not in name and DEVICE != "cpu"
    assert any(checkpoint.glob("pytorch_model_fsdp_*")) == sharded
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert ("lm_head.weight" in final) == (name != "tied")
    ids = torch.tensor([make_blocks(1, length=32)[0]["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize(
    "attention",
    ["sdpa", "flex_attention", pytest.param("flash_attention_2", marks=needs_flash)],
)
def test_attention_implementations(make_args, attention):
    found = {}
    for implementation in ("eager", attention):
        model = make_model("llama", hidden_size=64, head_dim=32, num_key_value_heads=2)
        model.set_attn_implementation(implementation)
        args = make_args(use_cpu=False, bf16=True, learning_rate=1e-3)
        trainer = TSTTrainer(model, args, train_dataset=make_blocks(200, length=32))
        trainer.train()
        found[implementation] = losses(trainer)
    torch.testing.assert_close(found[attention], found["eager"], rtol=0, atol=0.03)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("fused", ["on", "off"])
def test_fp16(llama, make_args, fused, heads):
    args = make_args(use_cpu=False, fp16=True, learning_rate=1e-3, tst_fused_loss=fused, mtp_num_heads=heads)
    trainer = TSTTrainer(llama, args, train_dataset=make_blocks(200))
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(VOCAB_SIZE), rel=0.02)
    assert found[-1] < found[3]


def test_the_load_of_experts_waits_for_the_device_only_when_it_is_logged(make_args):
    model = make_model("qwen3_moe")
    trainer = TSTTrainer(model, make_args(use_cpu=False), train_dataset=make_blocks(200))
    logits = tuple(torch.randn(64, 4, device="cuda") for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._expert_load.add(logits, 2, torch.ones(2, 32, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer._expert_load.report()["tst_expert_load_max"] >= 1
