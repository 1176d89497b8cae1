"""Pushing to, and loading from, a Hub on the loopback interface, with the real client in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_corpus
from huggingface_hub import ModelCard
from safetensors.torch import load
from server import TOKEN, LocalHub

CLIENT = Path(__file__).with_name("client.py")
PUSHING_RUN = Path(__file__).with_name("pushing_run.py")
ORDINARY = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with LocalHub() as server:
        yield server


@pytest.fixture
def hub(server):
    """The Hub, with nothing on it."""
    server.clear()
    return server


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    return os.environ | {
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }


@pytest.fixture(scope="module")
def jobs(environment):
    """The process from which clients of this Hub are forked, and where its jobs are written."""
    with subprocess.Popen(
        [sys.executable, str(CLIENT)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def client(jobs, tmp_path):
    """Run a script by `client.py` in a folder of its own; its status, and what it printed."""

    def run(*command, token=TOKEN):
        command, files = [str(word) for word in command], [tmp_path / name for name in ("stdout", "stderr")]
        job = [command, str(tmp_path), {"HF_TOKEN": token}, [str(file) for file in files]]
        print(json.dumps(job), file=jobs.stdin, flush=True)
        status = int(jobs.stdout.readline())
        printed = [file.read_text(encoding="utf-8") for file in files]
        assert TOKEN not in "".join(printed)
        return subprocess.CompletedProcess(command, status, *printed)

    return run


@pytest.fixture
def push(client, tmp_path):
    def run(name="mine", token=TOKEN, **options):
        folder = tmp_path / name
        result = client(PUSHING_RUN, folder, json.dumps(options), token=token)
        assert result.stdout, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1]), folder

    return run


def test_a_pushed_model_is_loaded_by_people_without_this_package(hub, push, environment):
    result, folder = push(hub_model_id="someone/model", hub_private_repo=True)
    assert result == {"step": 6, "saved": True}
    files = hub.files("someone/model")
    assert set(files) >= ORDINARY
    assert hub.repositories["someone/model"].private
    assert not [path for path in files if "checkpoint" in path or "data_position" in path]
    assert b"tst" not in files["config.json"].lower()
    ours, pushed = (
        load((folder / "reference" / "model.safetensors").read_bytes()),
        load(files["model.safetensors"]),
    )
    assert all(bool((ours[name] == pushed[name]).all()) for name in ours)
    assert set(ours) == set(pushed)
    code = (
        "import sys; sys.modules['hf_tst'] = None\n"
        "from transformers import AutoModelForCausalLM, pipeline\n"
        "model = AutoModelForCausalLM.from_pretrained('someone/model')\n"
        "generate = pipeline('text-generation', model='someone/model')\n"
        "options = {'min_new_tokens': 2, 'max_new_tokens': 2, 'return_tensors': True}\n"
        "ids = generate('w3', **options)[0]['generated_token_ids']\n"
        "print(model.num_parameters(), len(ids) > 2)\n"
    )
    # In a Python that has not loaded this package yet.
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split()[-1] == "True", result.stderr[-2000:]


def test_the_card_on_the_hub_is_valid_and_tells_of_the_run(hub, push):
    push(
        hub_model_id="someone/model", push={"license": "apache-2.0", "dataset": "some/data", "language": "en"}
    )
    files = hub.files("someone/model")
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.datasets == ["some/data"]
    assert card.data.license == "apache-2.0"
    assert {"token-superposition", "generated_from_trainer"} <= set(card.data.tags)
    assert {result.metric_type for result in card.data.eval_results} == {"loss", "perplexity"}
    assert "first 2 of 6 optimizer steps (r = 0.3)" in card.text
    assert "(loss_curve.png)" in card.text
    assert files["loss_curve.png"].startswith(b"\x89PNG")
    assert "POST /api/validate-yaml" in hub.requests


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("end", None),
        ("every_save", None),
        ("checkpoint", "last-checkpoint/"),
        ("all_checkpoints", "checkpoint-6/"),
    ],
)
def test_every_strategy(hub, push, strategy, expected):
    # Else Trainer skips a checkpoint while the one before is still on its way.
    result, _ = push(hub_strategy=strategy, hub_always_push=True)
    assert "error" not in result
    files = hub.files("someone/mine")
    assert set(files) >= ORDINARY
    commits = hub.repositories["someone/mine"].commits
    assert commits[-1] == "End of training"
    assert (len(commits) > 1) == (strategy != "end")
    if expected:
        assert f"{expected}trainer_state.json" in files


def test_the_token_of_the_arguments_goes_into_no_file(hub, push):
    """Nor does it on the Hub, where Trainer's `training_args.bin` would have it."""
    result, folder = push(token="", hub_token=TOKEN, hub_strategy="all_checkpoints", hub_always_push=True)
    assert result == {"step": 6, "saved": True}
    files = hub.files("someone/mine")
    assert {"training_args.bin", "checkpoint-6/training_args.bin", "checkpoint-6/manifest.json"} <= set(files)
    assert not [name for name, content in files.items() if TOKEN.encode() in content]
    assert not [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_pushing_again_replaces_and_a_branch_of_its_own_is_left_alone(hub, push):
    push(name="first", hub_model_id="someone/model")
    first = hub.files("someone/model")["model.safetensors"]
    hub.repositories["someone/model"].branches["other"] = {}
    result, _ = push(name="branch", hub_model_id="someone/model", hub_revision="other", max_steps=4)
    assert "error" not in result
    assert hub.files("someone/model")["model.safetensors"] == first
    assert hub.files("someone/model", "other")["model.safetensors"] != first
    push(name="second", hub_model_id="someone/model", max_steps=4)
    assert hub.files("someone/model")["model.safetensors"] != first


def test_a_branch_that_is_not_there_is_made_before_training(hub, push):
    result, _ = push(hub_model_id="someone/model", hub_revision="tst", hub_strategy="end")
    assert result == {"step": 6, "saved": True}
    assert set(hub.files("someone/model", "tst")) >= ORDINARY
    assert not hub.files("someone/model")
    made = hub.requests.index("POST /api/models/someone/model/branch/tst")
    assert not [request for request in hub.requests[:made] if "/commit/" in request]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "hf_wrong"}, "token is wrong or missing (401)"),
        ({"token": ""}, "token is wrong or missing (401)"),
        ({"hub_model_id": "others/model"}, "may not write there (403)"),
    ],
)
def test_what_the_hub_refuses_is_said_before_the_first_step(hub, push, options, message):
    result, _ = push(**options)
    assert result["error"] == "HubError"
    assert message in result["message"]
    assert "\n" not in result["message"]
    assert not result["saved"]
    assert not hub.repositories


def test_a_repository_with_another_model_is_refused(hub, push):
    push(name="first", hub_model_id="someone/model")
    before = dict(hub.files("someone/model"))
    result, _ = push(name="second", hub_model_id="someone/model", hidden_size=32)
    assert result["error"] == "HubError"
    assert "hidden_size 16 there, 32 here" in result["message"]
    assert hub.files("someone/model") == before


def test_a_run_that_was_not_to_be_pushed_is_pushed_on_request(hub, push):
    result, folder = push(push_to_hub=False, hub_model_id="someone/later")
    assert result == {"step": 6, "saved": True}
    files = hub.files("someone/later")
    assert set(files) >= ORDINARY
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert "tst" not in files["config.json"].decode().lower()


@pytest.mark.parametrize(("part", "kind"), [("/lfs/", "500"), ("/lfs/", "reset"), ("/preupload/", "500")])
def test_a_passing_fault_is_tried_again(hub, push, part, kind):
    fault = hub.fail(part, kind, times=2)
    result, _ = push(hub_strategy="end")
    assert fault.seen == 2
    assert result == {"step": 6, "saved": True}
    assert set(hub.files("someone/mine")) >= ORDINARY


def test_a_token_that_ends_during_the_run_costs_the_push_only(hub, push):
    hub.fail("/commit/", "401", times=1000)
    result, folder = push(hub_strategy="end")
    assert result["error"] == "HubError"
    assert "the token is wrong or missing (401)" in result["message"]
    assert f"The model is saved in {folder}." in result["message"]
    assert result["saved"]


@pytest.mark.parametrize("kind", ["500", "reset"])
def test_a_lasting_fault_is_reported_and_the_model_kept(hub, push, kind):
    hub.fail("/commit/", kind, times=1000)
    result, folder = push(hub_strategy="end")
    assert result["error"] == "HubError"
    assert f"The model is saved in {folder}." in result["message"]
    assert result["saved"]


def test_a_fault_during_training_does_not_stop_it(hub, push):
    fault = hub.fail("/commit/", "500", times=1)
    result, _ = push(hub_strategy="every_save")
    assert fault.seen == 1
    assert result == {"step": 6, "saved": True}
    assert set(hub.files("someone/mine")) >= ORDINARY


def test_the_script_ends_with_its_summary_and_one_sentence_when_the_hub_fails(hub, client, tmp_path):
    write_corpus(tmp_path, 300)
    sizes = "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2,max_position_embeddings=32"
    flags = (
        "--train_file corpus.txt --tokenizer_name tokenizer --model_type llama --block_size 16 --max_steps 4 "
        "--per_device_train_batch_size 2 --logging_steps 1 --report_to none --disable_tqdm True --use_cpu --push_to_hub --output_dir out "
        f"--config_overrides {sizes}"
    )
    hub.fail("/commit/", "500", times=1000)
    script = CLIENT.parents[2] / "scripts" / "run_clm_tst.py"
    result = client(script, *flags.split())
    assert result.returncode == 2, result.stderr[-3000:]
    assert "recovery       1-3" in result.stdout
    assert "final evaluation loss" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("run_clm_tst.py: Pushing out failed")
    assert (tmp_path / "out" / "model.safetensors").is_file()
