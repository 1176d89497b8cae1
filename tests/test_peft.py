"""LoRA continued pre-training: the hook finds the model through the wrapper, and the adapter is an ordinary one."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import make_blocks, make_model
from safetensors.torch import load_file
from test_superposition import make_bags
from transformers import AutoModelForCausalLM

from hf_tst import TSTTrainer, token_superposition
from hf_tst.pretraining.model import load_model
from hf_tst.pretraining.options import ModelArguments
from hf_tst.records.card import why_kept

peft = pytest.importorskip("peft")

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
KINDS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "saved_embedding_and_head": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


def adapt(model, kind):
    return peft.get_peft_model(model, peft.LoraConfig(**LORA, **KINDS[kind]))


def logits(model):
    tokens = make_bags()[0].flatten(1)
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_adapter_is_an_ordinary_one(llama, make_args, tmp_path, kind, fused):
    base = copy.deepcopy(llama)
    plain = adapt(copy.deepcopy(llama), kind)
    plain.save_pretrained(tmp_path / "untrained")
    model = adapt(llama, kind)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    args = make_args(tst_fused_loss=fused, save_strategy="steps", save_steps=5)
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(200))
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not llama._forward_pre_hooks
    assert not model._forward_pre_hooks
    assert "_loss_function" not in vars(llama)

    trainer.save_model(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-3"):  # of the end, and of the switch
        assert not (folder / "model.safetensors").exists()
        config, expected = (
            json.loads((path / "adapter_config.json").read_text())
            for path in (folder, tmp_path / "untrained")
        )
        assert {key for key in config if config[key] != expected.get(key)} == set()
        saved, ordinary = (
            set(load_file(path / "adapter_model.safetensors")) for path in (folder, tmp_path / "untrained")
        )
        assert saved == ordinary
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))
    merged = loaded.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "saved_embedding_and_head"])
def test_the_mean_is_that_of_the_adapted_embeddings(llama, kind):
    bags, labels = make_bags()
    model = adapt(llama, kind)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    with token_superposition(model, 4, input_weighting="linear"), torch.no_grad():
        found = model.eval()(input_ids=bags, labels=labels).logits
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        weight = merged.get_input_embeddings().weight
        assert (weight - make_model("llama").get_input_embeddings().weight).abs().max() > 0.1
        expected = merged(
            inputs_embeds=(weight[bags] * torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]).sum(2)
        ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 3, 6])
def test_an_adapter_resumes(llama, make_args, tmp_path, stop):
    blocks, other = make_blocks(200), copy.deepcopy(llama)
    whole = TSTTrainer(
        adapt(llama, "attention"), make_args(save_strategy="steps", save_steps=stop), train_dataset=blocks
    )
    whole.train()
    resumed = TSTTrainer(
        adapt(other, "attention"), make_args(output_dir=str(tmp_path / "resumed")), train_dataset=blocks
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{stop}"))
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_the_auxiliary_loss_and_the_load_of_experts_go_through_the_wrapper(make_args):
    model = adapt(make_model("qwen3_moe", router_aux_loss_coef=10.0), "attention")
    trainer = TSTTrainer(model, make_args(), train_dataset=make_blocks(200))
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] > 10 * 1.9
    assert first["tst_expert_load_max"] >= 1


def test_an_adapter_names_the_revision_of_its_base_model(llama, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    args = ModelArguments(
        model_name_or_path=str(tmp_path / "base"),
        model_revision="v2",
        lora_rank=2,
        lora_target_modules="q_proj",
    )
    load_model(args, None).save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["revision"] == "v2"


def test_prompt_learning_is_refused(llama, make_args):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        TSTTrainer(peft.get_peft_model(llama, config), make_args(), train_dataset=make_blocks(200))


def test_the_card_of_an_adapter_tells_of_the_run(llama, make_args):
    """PEFT saves an adapter with a card in which nothing is filled in; one that somebody has written stays."""
    trainer = TSTTrainer(adapt(llama, "attention"), make_args(), train_dataset=make_blocks(200))
    trainer.train()
    trainer.save_model()
    path = Path(trainer.args.output_dir) / "README.md"
    assert "More Information Needed" in path.read_text()
    trainer.create_model_card()
    assert "More Information Needed" not in path.read_text()
    assert "superposition" in path.read_text()
    for _ in range(2):  # PEFT adds its version to the card, which is no edit
        trainer.save_model()
        trainer.create_model_card()
    assert why_kept(path) is None
    path.write_text(path.read_text() + "\nMy words.\n")
    trainer.create_model_card()
    assert "My words." in path.read_text()
