"""Loss, perplexity and bits per byte of a checkpoint; the metric of `evaluate`; lm-evaluation-harness."""

import json
import math
import shutil
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MptConfig
from transformers.modeling_outputs import CausalLMOutput

from hf_tst.data.quickstart import train_tokenizer
from hf_tst.evaluation import breakdown
from hf_tst.evaluation.breakdown import LossTally, tally_blocks
from hf_tst.evaluation.scores import METRIC_FILE, evaluate_checkpoint, score_texts

TEXTS = [
    "line 7 of the text, which says 49\n",
    "",
    "é\n",
    "".join(f"{i} squared is {i * i}\n" for i in range(40)),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([f"line {i} of the text, which says {i * i}\n" for i in range(400)], 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer), max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.5,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_and_tokenizer(checkpoint):
    from transformers import AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)


def naive_nats(model, tokenizer, text, length):
    """One token at a time, from what is before it in its window; the last window is full."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nats = 0.0
    for position in range(1, len(ids)):
        start = (position - 1) // length * length
        if start + length + 1 > len(ids):
            start = max(0, len(ids) - length - 1)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:position]])).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[position]].item()
    return nats


@pytest.mark.parametrize("length", [None, 5, 1])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_token_is_predicted_once_from_its_window(model_and_tokenizer, length, batch_size):
    model, tokenizer = model_and_tokenizer
    scores = score_texts(model, tokenizer, TEXTS, max_length=length, batch_size=batch_size)
    expected = sum(naive_nats(model, tokenizer, text, length or 32) for text in TEXTS)
    assert scores.nats == pytest.approx(expected, rel=1e-5)
    assert scores.tokens == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    assert scores.bytes == sum(len(text.encode()) for text in TEXTS)
    assert scores.loss == pytest.approx(expected / scores.tokens)
    assert scores.perplexity == pytest.approx(math.exp(scores.loss))
    assert scores.bits_per_byte == pytest.approx(expected / math.log(2) / scores.bytes)


def test_where_the_loss_is_by_frequency_and_position(model_and_tokenizer):
    """Against a loop over single tokens, sorted and cut by hand."""
    model, _ = model_and_tokenizer
    rows = [{"input_ids": row} for row in torch.randint(0, 9, (7, 21)).square().tolist()]
    tally = tally_blocks(model, rows, batch_size=3)
    found = []
    for row in rows:
        ids = row["input_ids"]
        with torch.no_grad():
            losses = -model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found += [(ids[i], i - 1, losses[i - 1, ids[i]].item()) for i in range(1, 21)]
    assert tally.nats == pytest.approx(sum(loss for *_, loss in found), rel=1e-5)
    by_position = [[loss for _, place, loss in found if place // 2 == tenth] for tenth in range(10)]
    assert tally.loss_by_position() == pytest.approx([sum(x) / len(x) for x in by_position], rel=1e-5)
    counts = Counter(token for token, *_ in found)
    classes, before = [[] for _ in range(10)], 0
    for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        classes[int((before + count / 2) / len(found) * 10)] += [loss for t, _, loss in found if t == token]
        before += count
    expected = [sum(x) / len(x) if x else None for x in classes]
    assert any(x is None for x in expected)  # nine tokens cannot fill ten classes
    for ours, theirs in zip(tally.loss_by_frequency(), expected, strict=True):
        assert ours == theirs if theirs is None else ours == pytest.approx(theirs, rel=1e-5)


def test_rows_are_read_as_they_are_evaluated(model_and_tokenizer):
    read, ahead = [], []

    def rows():
        for row in torch.randint(0, 9, (7, 12)).tolist():
            read.append(row)
            yield {"input_ids": row}

    class Model(torch.nn.Module):
        device, evaluated = "cpu", 0

        def forward(self, ids, use_cache):
            ahead.append(len(read) - self.evaluated)
            self.evaluated += len(ids)
            return CausalLMOutput(logits=torch.zeros(*ids.shape, 9))

    tally = tally_blocks(Model(), rows(), batch_size=3)
    assert ahead == [3, 3, 1]
    assert tally.nats == pytest.approx(7 * 11 * math.log(9))


def test_no_copy_of_all_logits_is_made(monkeypatch):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, (tuple, list)) else [made]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != storage:
                    self.numbers = max(self.numbers, tensor.numel())
            return made

    monkeypatch.setattr(breakdown, "NUMBERS_AT_ONCE", 1000)
    logits = torch.randn(2, 65, 50, dtype=torch.bfloat16)[:, :-1]
    storage = logits.untyped_storage().data_ptr()
    targets = torch.randint(0, 50, (2, 64))
    targets[0, :5] = -100
    tally = LossTally()
    with Largest() as largest:
        tally.add(logits, targets)
    assert largest.numbers <= 1000
    expected = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="sum"
    )
    assert tally.nats == pytest.approx(expected.item(), rel=1e-5)


def test_the_model_is_left_in_the_mode_it_was_in(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    for mode in (True, False):
        model.train(mode)
        score_texts(model, tokenizer, ["x"])
        assert model.training is mode


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one text", {}, "texts is a str, which would be scored letter by letter: put it in a list"),
        ([{"text": "a"}], {}, r"texts must hold text, but holds \{'text': 'a'\}: give the texts"),
        ([], {}, "There is no text"),
        ([""], {}, "There is no text"),
        (["x"], {"max_length": 33}, "from 1 to the model's context of 32, but is 33"),
        (["x"], {"max_length": 0}, "but is 0"),
    ],
)
def test_bad_input_is_one_sentence(model_and_tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=message):
        score_texts(*model_and_tokenizer, texts, **options)


def test_bad_texts_are_refused_before_the_checkpoint_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="texts must hold text"):
        evaluate_checkpoint(tmp_path / "none", iter([{"text": "a"}]))


def test_the_context_is_found_under_the_name_that_the_model_has_for_it(model_and_tokenizer):
    """MPT has a table of 16 attention biases, which a text of more tokens must be cut for; Mamba has no limit."""
    _, tokenizer = model_and_tokenizer
    sizes = {"vocab_size": len(tokenizer), "expansion_ratio": 2}
    mpt = AutoModelForCausalLM.from_config(
        MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=16, **sizes)
    )
    default, cut = (score_texts(mpt, tokenizer, TEXTS, max_length=length).nats for length in (None, 16))
    assert default == cut
    with pytest.raises(ValueError, match="context of 16, but is 17"):
        score_texts(mpt, tokenizer, TEXTS, max_length=17)
    unlimited = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=1)
    mamba = AutoModelForCausalLM.from_config(unlimited)
    assert score_texts(mamba, tokenizer, ["x"], max_length=4096).tokens == 1
    with pytest.raises(ValueError, match="at least 1, but is 0"):
        score_texts(mamba, tokenizer, ["x"], max_length=0)


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        evaluate_checkpoint(tmp_path, TEXTS)
    expected = evaluate_checkpoint(checkpoint, TEXTS)
    assert evaluate_checkpoint(tmp_path, TEXTS, trust_remote_code=True) == expected


def test_the_metric_is_loaded_by_its_path_without_a_network(checkpoint, tmp_path):
    import evaluate

    metric = evaluate.load(str(METRIC_FILE), cache_dir=str(tmp_path))
    scores = metric.compute(
        predictions=[text for text in TEXTS if text], model_id=str(checkpoint), max_length=5
    )
    assert scores == evaluate_checkpoint(checkpoint, TEXTS, max_length=5)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_the_harness_runs_a_local_task_and_agrees(checkpoint, tmp_path):
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS if text)
    )
    task = {
        "task": "local_texts", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "texts.jsonl")}},
        "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    (tmp_path / "local_texts.yaml").write_text(yaml.safe_dump(task))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path))
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint)},
        tasks=["local_texts"],
        task_manager=manager,
        device="cpu",
        batch_size=2,
    )["results"]
    ours = evaluate_checkpoint(checkpoint, TEXTS, device="cpu")["bits_per_byte"]
    assert found["local_texts"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-4)
