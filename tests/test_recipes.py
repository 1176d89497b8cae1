"""Every recipe: it parses, its model has the size it claims, it plans within memory, and a tiny version of it trains."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from tiny_recipes import shrink
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_tst import TSTTrainingArguments
from hf_tst.cli.plan import plan_from_arguments
from hf_tst.pretraining import pretrain
from hf_tst.pretraining.options import (
    DataArguments,
    ModelArguments,
    micro_batches,
    parse_arguments,
    parse_values,
)
from hf_tst.pretraining.recipes import read_config

FOLDER = Path(__file__).parent.parent / "hf_tst" / "pretraining" / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SIZES = {  # parameters, and how far from the number in the name they may be
    "270m-20k": (267_225_408, 270e6),
    "270m-100k": (267_225_408, 270e6),
    "600m-20k": (600_208_320, 600e6),
    "3b-20k": (3_337_766_912, 3e9),
    "10b-a1b": (9_695_628_288, 10e9),
    "100m-one-gpu": (99_188_224, 100e6),
    "30m-laptop": (32_551_680, 30e6),
}


def kind_and_name(recipe):
    name, kind = recipe.removesuffix(".yaml").rsplit("-", 1)
    return kind, name


def plan_command(recipe):
    """The flags of the plan that the recipe's first lines show."""
    text = (FOLDER / recipe).read_text(encoding="utf-8")
    (command,) = re.findall(r"hf-tst plan (\S+) ?(.*)", text)
    assert f"{command[0]}.yaml" == recipe
    return command[1].split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tokenizer, a corpus and the trained model that LoRA continues, with the shape of SmolLM2-135M."""
    from hf_tst.data.quickstart import train_tokenizer

    folder = tmp_path_factory.mktemp("recipes")
    texts = [f"line {i} of the text, which says {i * i}\n" for i in range(600)]
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    config.save_pretrained(folder / "base")
    small = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(small).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    return folder


@pytest.fixture
def plan(workspace):
    def make(recipe, *flags):
        base = ["--model_name_or_path", str(workspace / "base")] if recipe.startswith("lora") else []
        return plan_from_arguments([str(FOLDER / recipe), *plan_command(recipe), *base, *flags])[0]

    return make


def test_each_run_has_a_baseline_that_differs_in_superposition_only():
    assert len(RECIPES) == 16
    for recipe in RECIPES:
        kind, name = kind_and_name(recipe)
        if kind != "tst":
            continue
        tst, baseline = (read_config(str(FOLDER / f"{name}-{kind}.yaml")) for kind in ("tst", "baseline"))
        assert tst["tst_phase_ratio"] > 0
        assert baseline["tst_phase_ratio"] == 0
        different = {key for key in tst.keys() | baseline.keys() if tst.get(key) != baseline.get(key)}
        different -= {
            "output_dir",
            "tst_phase_ratio",
            "tst_bag_size",
            "tst_offset_weighting",
            "tst_fused_loss",
        }
        if name == "10b-a1b":  # the published baseline trains until it is as good
            different -= {"max_steps", "lr_scheduler_kwargs"}
        assert not different


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_has_the_size_of_its_name_and_the_run_fits(plan, recipe):
    made = plan(recipe)
    made.check_memory()
    kind, name = kind_and_name(recipe)
    assert (made.switch_step > 0) == (kind == "tst")
    if name == "lora-continued":
        assert made.model.trainable_parameters < 0.05 * made.model.parameters
        assert made.model.parameters - made.model.trainable_parameters == 134_515_008
        return
    exact, named = SIZES[name]
    assert made.model.parameters == exact
    assert exact == pytest.approx(named, rel=0.12)
    if name == "10b-a1b":
        assert made.model.active_parameters == pytest.approx(1e9, rel=0.05)
    json.dumps(asdict(made))


@pytest.mark.parametrize(
    ("recipe", "steps", "switch", "tokens_per_step", "lr"),
    [
        ("270m-20k-tst", 20_000, 6_000, 2**21, 2e-3),
        ("270m-100k-tst", 100_000, 30_000, 2**21, 2e-3),
        ("600m-20k-tst", 20_000, 6_000, 2**21, 1e-3),
        ("3b-20k-tst", 20_000, 6_000, 2**21, 2e-4),
        ("10b-a1b-tst", 49_983, 12_483, 2**23, 3e-4),
        ("10b-a1b-baseline", 125_000, 0, 2**23, 3e-4),
    ],
)
def test_the_papers_runs_are_the_papers(plan, recipe, steps, switch, tokens_per_step, lr):
    made = plan(f"{recipe}.yaml")
    assert (made.max_steps, made.switch_step) == (steps, switch)
    assert made.layout.latent_tokens == tokens_per_step
    values = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8"))
    assert (values["learning_rate"], values["adam_beta1"], values["adam_beta2"]) == (lr, 0.9, 0.95)
    assert (values["lr_scheduler_type"], values["warmup_steps"]) == ("warmup_stable_decay", 2000)
    assert values["lr_scheduler_kwargs"]["num_decay_steps"] == round(steps / 10)
    assert values["config_overrides"]["vocab_size"] == 128_256
    assert values["config_overrides"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tiny_version_trains(workspace, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(workspace)
    values = yaml.safe_load((FOLDER / recipe).read_text(encoding="utf-8"))
    values = shrink(values) | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    trainer = pretrain.main([str(tmp_path / "tiny.yaml")])
    assert trainer.state.global_step == 4
    assert trainer.args.gradient_accumulation_steps == 2
    sizes = [entry["tst_current_bag_size"] for entry in trainer.state.log_history if "loss" in entry]
    superposed = round(4 * values["tst_phase_ratio"])
    assert sizes == [trainer.args.tst_bag_size] * superposed + [1] * (4 - superposed)
    saved = "adapter_model.safetensors" if recipe.startswith("lora") else "model.safetensors"
    assert (tmp_path / "run" / saved).is_file()


def test_unknown_keys_are_refused_with_the_nearest(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, message in (
        ("tst_bagsize: 6", "'tst_bagsize': did you mean 'tst_bag_size'?"),
        ("model_type: llama\nconfig_overrides: {hiden_size: 3}\nmax_steps: 3", "did you mean 'hidden_size'?"),
        ("max_steps: 1.5", "--max_steps/--max-steps: invalid int value: '1.5'"),
        ("a: [", "is not YAML"),
        ("tokens_per_step: 100\nblock_size: 16\nper_device_train_batch_size: 2", "set it to 96"),
        ("tokens_per_step: 64", "is not a multiple of the 1024 tokens"),
        ("tokens_per_step: 2048\ngradient_accumulation_steps: 2", "leave one out"),
        ("lora_rank: 4", "name it with model_name_or_path"),
        ("lora_rank: 0", "at least 1"),
        ("model_name_or_path: nowhere", "name the data with train_file or dataset_name"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            plan_from_arguments([str(path)])
        assert "\n" not in str(error.value)


def test_a_step_has_the_same_tokens_on_any_number_of_gpus():
    recipe = str(FOLDER / "270m-20k-tst.yaml")
    values = parse_values([recipe], [ModelArguments, DataArguments, TSTTrainingArguments], "")
    for gpus in (1, 8, 64):
        rows = gpus * values.per_device_train_batch_size * micro_batches(values, gpus)
        assert rows * values.block_size == 2**21
    with pytest.raises(ValueError, match="96 processes"):
        micro_batches(values, 96)


def test_yaml_reads_on_and_no_as_booleans(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("tst_fused_loss: on\nsave_strategy: no\nmax_steps: 20\n", encoding="utf-8")
    args = parse_arguments([str(path)])[2]
    assert (args.tst_fused_loss, args.save_strategy) == ("on", "no")
    assert parse_arguments([str(path), "--tst_fused_loss", "off"])[2].tst_fused_loss == "off"
