"""What `hf-tst train` and the script say of bad files, flags and configurations: one sentence, before the first step."""

import json

import numpy as np
import pytest
import yaml
from conftest import write_corpus
from transformers import CONFIG_MAPPING, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_tst.errors import TSTError
from hf_tst.pretraining.model import make_config
from hf_tst.pretraining.options import ModelArguments, parse_arguments
from hf_tst.pretraining.pretrain import main

OVERRIDES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    write_corpus(folder)
    files = {
        "blank.txt": " \n" * 20_000,
        "short.txt": "one line\n",
        "broken.jsonl": '{"text": "abc"}\n{"text": \n',
        "numbers.jsonl": '{"body": 3}\n' * 50,
        "broken.csv": 'a,b\n1,2,3\n"x\n',
        "broken.parquet": "this is none",
        "broken.yaml": "a: [1\nb: 2",
        "list.yaml": "- 1\n",
    }
    (folder / "[D]").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def values(folder, **changes):
    return {
        "output_dir": str(folder / "out"), "model_type": "llama", "config_overrides": OVERRIDES, "block_size": 16,
        "max_steps": 6, "per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "train_file": "corpus.txt", "tokenizer_name": "tokenizer",
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_steps": 6.5}, "max_steps.* invalid int value: '6.5'"),
        ({"max_steps": [1, 2]}, r"max_steps.* invalid int value: '\[1, 2\]'"),
        ({"train_file": ["a.txt", "b.txt"]}, r"train_file .* takes one value, but is the list \['a.txt', 'b.txt'\]"),
        ({"max_steps": None}, "max_steps in the configuration file has no value"),
        ({"learning_rate": "fast"}, "learning_rate.* invalid float value: 'fast'"),
        ({"lr_scheduler_kwargs": "{bad"}, "lr_scheduler_kwargs is not JSON"),
        ({"config_overrides": "hidden_size=abc"}, "config_overrides: hidden_size .*'abc'"),
        ({"config_overrides": "{bad"}, "config_overrides must be name=value,… or JSON"),
        ({"config_overrides": OVERRIDES | {"hidden_size": 15}}, "config_overrides make no llama: .* multiple"),
        ({"model_type": "falcon", "config_overrides": {"head_dim": 8}}, "config_overrides make no falcon: .*'head_dim'"),
        ({"config_overrides": OVERRIDES | {"hidden_siz": 16}}, "did you mean 'hidden_size'"),
        ({"dtype": "bogus"}, "dtype must be auto, float32, bfloat16 or float16, but is 'bogus'"),
        ({"model_type": "t5", "config_overrides": None}, "Cannot load a model of type t5"),
        ({"attn_implementation": "flash_attention_2"}, "Cannot load a model of type llama: .*[Ff]lash"),
        ({"tokenizer_name": "./nowhere"}, "Cannot load ./nowhere"),
        ({"train_file": "blank.txt"}, "blank.txt holds no text"),
        ({"train_file": None, "dataset_name": "[D]"}, r"dataset_name=\[D\] is the folder .* takes for a pattern"),
        ({"train_file": "short.txt"}, "validation_split_percentage=5 of the 1 rows .* is 0 rows"),
        ({"train_file": "broken.jsonl"}, "Cannot read line 2 of broken.jsonl as JSON"),
        ({"train_file": "numbers.jsonl"}, "column 'body' of numbers.jsonl holds 3 in line 1, not text"),
        ({"train_file": "broken.csv"}, "broken.csv has no column 'text'"),
        ({"train_file": "broken.parquet"}, "Cannot read broken.parquet: "),
        ({"output_dir": "corpus.txt"}, "Cannot make output_dir=corpus.txt"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, but is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, but is 0"),
        ({"max_eval_samples": 0}, "max_eval_samples must be at least 1, but is 0"),
    ],
)  # fmt: skip
def test_bad_values_of_a_file(in_folder, tmp_path, wrong, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path, **wrong)), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        main([str(path)])
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "message"), [("broken.yaml", "is not YAML"), ("list.yaml", "must hold a mapping")]
)
def test_files_that_hold_no_arguments(in_folder, file, message):
    with pytest.raises(ValueError, match=message) as caught:
        main([file])
    assert len(str(caught.value).splitlines()) == 1


def test_the_file_that_the_bad_ones_are_made_of_trains(in_folder, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values(tmp_path, validation_file=None)), encoding="utf-8")
    assert main([str(path)]).state.global_step == 6


def test_numbers_of_a_file_may_have_an_exponent(tmp_path):
    """PyYAML takes 2e4 for text."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "train_file: a.txt\noutput_dir: x\nmax_steps: 2e4\nlearning_rate: 1e-3\nreport_to: [none]\nrun_name: 1e3\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\n"
    )
    _, _, args, _ = parse_arguments([str(path)])
    assert (args.max_steps, args.learning_rate, args.run_name) == (20_000, 1e-3, "1e3")
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_a_model_type_alone_is_its_default_configuration():
    assert (
        make_config(ModelArguments(model_type="llama"), 99).to_dict() == LlamaConfig(vocab_size=99).to_dict()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 32}, "lora_alpha needs an adapter, but lora_rank is not set"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules needs an adapter, but lora_rank is not set"),
        ({"config_name": "x"}, "Both config_name and model_type are given: name the model with one"),
        ({"dataset_config_name": "part"}, "dataset_config_name=part is part of a data set: name that with dataset_name"),
        ({"train_file": "ids.npy", "append_eos": True}, "append_eos ends rows of text, but a file of token ids"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "validation_split_percentage": 0},
            "load_best_model_at_end needs evaluations, but there is no data to evaluate on",
        ),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss", "eval_strategy": "steps", "validation_split_percentage": 0},
            "save_strategy=best needs evaluations, but there is no data to evaluate on",
        ),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(in_folder, tmp_path, changes, message):
    np.save("ids.npy", np.arange(20_000, dtype=np.uint16) % 50)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values(tmp_path, **changes)), encoding="utf-8")
    with pytest.raises(TSTError, match=message):
        main([str(path)])
    assert not (tmp_path / "out").exists()


def test_evaluations_without_data_are_told(in_folder, tmp_path, caplog):
    path = tmp_path / "config.json"
    for strategy, told in (("no", False), ("steps", True)):
        changes = {"eval_strategy": strategy, "validation_split_percentage": 0, "save_strategy": "no"}
        path.write_text(json.dumps(values(tmp_path, **changes)), encoding="utf-8")
        main([str(path), "--overwrite_output_dir"])
        assert (f"eval_strategy={strategy} has no effect, because there is no data" in caplog.text) == told


@pytest.mark.parametrize("data", [[], ["--train_file", "corpus.txt"]], ids=["quick start", "own data"])
def test_a_flag_names_another_model_than_the_file(in_folder, tmp_path, data):
    LlamaConfig(**OVERRIDES).save_pretrained(tmp_path / "model")
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {"output_dir": "out", "model_type": "qwen3", "config_overrides": "hidden_size=64"}
            if data
            else {"output_dir": "out"}
        )
    )
    flags = [str(path), "--config_name", str(tmp_path / "model"), *data]
    model, _, _, _ = parse_arguments(flags)
    assert (model.config_name, model.model_type) == (str(tmp_path / "model"), None)
    assert model.config_overrides is None  # the changes were to the other model
    model, _, _, _ = parse_arguments([*flags, "--config_overrides", "hidden_size=32"])
    assert model.config_overrides == "hidden_size=32"
    model, _, _, _ = parse_arguments([str(path), "--model_type", "mistral", *data])
    assert "hidden_size=" in str(model.config_overrides)  # the sizes of another family


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "left out"])
@pytest.mark.parametrize(
    ("kind", "sizes", "changes"),
    [
        ("qwen3", {"num_hidden_layers": 4, "hidden_size": 32, "head_dim": 8}, {"num_hidden_layers": 2}),
        (
            "llama",
            {"num_attention_heads": 4, "hidden_size": 64},
            {"num_attention_heads": 2, "hidden_size": 48},
        ),
        ("gemma3_text", {"num_hidden_layers": 12}, {"num_hidden_layers": 6, "rms_norm_eps": 1e-5}),
        ("gpt2", {"n_embd": 64, "n_head": 4}, {"hidden_size": 32, "n_inner": 64}),
    ],
)
def test_changes_to_a_configuration_of_a_file_are_those_of_a_new_one(tmp_path, kind, sizes, changes, stated):
    """Saved configurations state what follows from their sizes, such as the kind of each layer. Those of the Hub may not."""
    make = CONFIG_MAPPING[kind]
    make(**sizes).save_pretrained(tmp_path)
    if not stated:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    overrides = json.dumps(changes)
    made = make_config(ModelArguments(config_name=str(tmp_path), config_overrides=overrides), 99)
    names = make().attribute_map
    wanted = make(**sizes | {names.get(name, name): value for name, value in changes.items()}, vocab_size=99)
    told = {"architectures", "_name_or_path", "dtype", "transformers_version"}
    assert {k: v for k, v in made.to_dict().items() if k not in told} == {
        k: v for k, v in wanted.to_dict().items() if k not in told
    }
    made.save_pretrained(tmp_path / "again")


def test_kinds_of_layers_that_are_no_pattern_are_one_sentence(tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    CONFIG_MAPPING["qwen3"](num_hidden_layers=3, layer_types=kinds, use_sliding_window=True).save_pretrained(
        tmp_path
    )
    with pytest.raises(TSTError, match=r"^config_overrides make no qwen3: .*layer_types") as caught:
        make_config(ModelArguments(config_name=str(tmp_path), config_overrides="num_hidden_layers=2"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(in_folder, tmp_path):
    """As some of the Hub: the generation configuration asks for a temperature without sampling."""
    sizes = dict(OVERRIDES, vocab_size=len(AutoTokenizer.from_pretrained("tokenizer")))
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    config = values(
        tmp_path, model_name_or_path=str(tmp_path / "model"), model_type=None, config_overrides=None
    )
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        TSTError, match=r"^The first checkpoint would fail, because the model's generation .*temperature"
    ):
        main([str(tmp_path / "config.json")])
    assert not (tmp_path / "out").exists()
    path.write_text("{}")
    assert main([str(tmp_path / "config.json")]).state.global_step == 6
