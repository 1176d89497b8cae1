"""Every ablation: it parses, changes what its name says and nothing else, and a tiny version of it trains."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainerState

from hf_tst import TSTTrainer, TSTTrainingArguments
from hf_tst.bags.phases import PhaseSchedule
from hf_tst.pretraining import pretrain
from hf_tst.pretraining.options import (
    DataArguments,
    ModelArguments,
    parse_arguments,
    parse_values,
)
from hf_tst.pretraining.recipes import read_config
from hf_tst.training.callbacks.reinitialize import ReinitializeCallback

FOLDER = Path(__file__).parent.parent / "scripts" / "configs" / "ablations"
ABLATIONS = {
    "reference": {},
    "input-only": {"tst_mode": "input"},
    "output-only": {"tst_mode": "output"},
    "weighting-uniform-s8": {"tst_bag_size": 8},
    "weighting-power-law": {"tst_offset_weighting": "power_law", "tst_bag_size": 8},
    "weighting-fitted-power-law": {"tst_offset_weighting": "fitted_power_law", "tst_bag_size": 8},
    "weighting-exponential": {"tst_offset_weighting": "exponential", "tst_bag_size": 8},
    "weighting-first-token": {"tst_offset_weighting": "first_token", "tst_bag_size": 8},
    "ratio-0.9": {"tst_phase_ratio": 0.9},
    "ratio-1.0": {"tst_phase_ratio": 1.0},
    "reinit-embeddings": {"reinit_at_switch": "embeddings"},
    "reinit-head": {"reinit_at_switch": "head"},
}


def test_these_are_all():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_it_differs_from_the_quick_start_in_what_its_name_says(name):
    def values(argv):
        model, data, args, _ = parse_arguments(argv)
        found = vars(model) | vars(data) | args.to_dict()
        return {key: value for key, value in found.items() if not key.endswith("_dir")}

    plain, ablated = values([]), values([str(FOLDER / f"{name}.yaml")])
    assert {key: value for key, value in ablated.items() if plain[key] != value} == ABLATIONS[name]


@pytest.mark.parametrize("name", ABLATIONS)
def test_its_first_lines_name_itself_and_flags_that_do_the_same(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"scripts/configs/ablations/(\S+).yaml", text)) == {name}
    (command,) = re.findall(r"hf-tst train (270m\S+) (.*)", text)
    kinds = [ModelArguments, DataArguments, TSTTrainingArguments]
    values = vars(parse_values([command[0], *command[1].split()], kinds, ""))
    settings = read_config(str(FOLDER / f"{name}.yaml"))
    assert settings.pop("output_dir") == f"runs/ablations/{name}"
    assert {key: values[key] for key in settings} == settings


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_tiny_version_trains(tiny_recipe, tmp_path, name):
    settings = yaml.safe_load(tiny_recipe.read_text()) | yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    settings |= {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 10,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    trainer = pretrain.main([str(path)])
    assert trainer.state.global_step == 10
    switch = round(10 * settings.get("tst_phase_ratio", 0.3))
    assert trainer.schedule.switch_step == switch
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert all(0 < entry["eval_loss"] < 10 for entry in state["log_history"] if "eval_loss" in entry)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 512


@pytest.mark.parametrize("parts", ["embeddings", "head", "both"])
def test_weights_are_new_at_the_switch_and_only_those(llama, make_args, parts):
    from conftest import make_blocks

    seen = {}

    class Watched(TSTTrainer):
        def training_step(self, *args, **kwargs):
            seen[self.state.global_step] = {
                name: p.detach().clone() for name, p in self.model.named_parameters()
            }
            return super().training_step(*args, **kwargs)

    trainer = Watched(
        model=llama, args=make_args(learning_rate=1e-9, tst_bag_size=2), train_dataset=make_blocks(60)
    )
    trainer.add_callback(ReinitializeCallback(parts, lambda: trainer.schedule))
    trainer.train()
    names = {"embeddings": ["model.embed_tokens.weight"], "head": ["lm_head.weight"]}
    names["both"] = names["embeddings"] + names["head"]
    moved = [name for name, weight in seen[3].items() if not torch.allclose(weight, seen[2][name], atol=1e-6)]
    assert sorted(moved) == sorted(names[parts])
    for name in moved:
        assert seen[3][name].std() == pytest.approx(llama.config.initializer_range, rel=0.1)
    saved = AutoModelForCausalLM.from_pretrained(Path(trainer.args.output_dir) / "checkpoint-3").state_dict()
    assert all(torch.equal(saved[name], weight) for name, weight in seen[3].items())
    assert all(torch.allclose(seen[step][n], seen[step - 1][n], atol=1e-6) for step in (1, 2, 4, 9) for n in seen[0])  # fmt: skip


def test_all_ranks_draw_the_same_and_training_goes_on_as_it_would(llama, make_args):
    callback = ReinitializeCallback("both", lambda: PhaseSchedule(10, 0.3, 2))
    weights = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        before = torch.get_rng_state()
        callback.on_step_end(make_args(), TrainerState(global_step=3), None, model=llama)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(llama.lm_head.weight.detach().clone())
    assert torch.equal(*weights)


def test_unknown_parts_are_refused():
    with pytest.raises(
        ValueError, match="reinit_at_switch must be one of embeddings, head, both, but is 'all'"
    ):
        ReinitializeCallback("all", lambda: None)
