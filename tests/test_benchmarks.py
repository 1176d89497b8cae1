"""The benchmark scripts in a tiny form: what they compare is the same thing, and what they write is whole."""

import csv
import itertools
import json
from pathlib import Path

import pytest
from processes import run_script
from versions import fails_before

from hf_tst.data.quickstart import train_tokenizer

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run(script, *flags, cwd):
    for _ in range(2):  # the second run appends
        done = run_script(SCRIPTS / script, *flags, "--csv", "rows.csv", "--rounds", 1, cwd=cwd)
        assert done.returncode == 0, done.stderr[-3000:]
    with (cwd / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert row["hardware"]
        assert row["torch"]
        assert row["date"].startswith("20")
        assert f"python {SCRIPTS / script}" in row["command"]
        assert float(row["seconds"]) > 0
    half = len(rows) // 2
    return rows[:half], rows[half:]


def test_the_losses_that_are_compared_are_equal(tmp_path):
    shapes = ("--rows", 64, "--hidden_size", 8, "--vocab_size", 500, 300, "--bag_sizes", 1, 4)
    flags = (*shapes, "--chunk_rows", 5, "--repeats", 2, "--plot", "plot.png")
    rows, again = run("benchmark_loss.py", *flags, cwd=tmp_path)
    assert [row["candidate"] for row in rows] == [row["candidate"] for row in again]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for shape in itertools.product(("500", "300"), ("1", "4")):
        of_shape = {row["candidate"]: row for row in rows if (row["V"], row["s"]) == shape}
        assert set(of_shape) == {"ours", "ours_5_rows", "products", "loop", "gather", "one_target"}
        assert of_shape["products"]["loss"] == ""
        equal = ("ours", "ours_5_rows", "gather", *(["one_target"] if shape[1] == "1" else []))
        for name in equal:
            assert float(of_shape[name]["loss"]) == pytest.approx(float(of_shape["loop"]["loss"]), rel=1e-5)
        peaks = {name: float(row["peak_over_logits"]) for name, row in of_shape.items()}
        assert 0 < peaks["ours_5_rows"] < 0.1 < peaks["ours"] < peaks["one_target"] <= peaks["loop"]


def test_steps_of_both_phases_are_measured(tmp_path):
    tiny = "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1,vocab_size=97"
    flags = ("--config_overrides", tiny, "--batch_size", 2, "--length", 8, "--bag_sizes", 4)
    rows, _ = run("benchmark_step.py", *flags, cwd=tmp_path)
    assert [(row["step"], row["s"]) for row in rows] == [
        ("next_token_fused", "1"),
        ("next_token", "1"),
        ("evaluation_fused", "1"),
        ("evaluation", "1"),
        ("superposition", "4"),
        ("superposition_loop", "4"),
    ]
    assert float(rows[0]["time_over_next_token_fused"]) == 1


def test_a_peak_adds_tokens_a_second_and_the_share_of_the_peak(tmp_path):
    tiny = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1,vocab_size=97,num_experts=4,num_experts_per_tok=2,moe_intermediate_size=8"
    flags = ("--model_type", "qwen3_moe", "--config_overrides", tiny, "--batch_size", 2, "--length", 8)
    rows, _ = run("benchmark_step.py", *flags, "--bag_sizes", 4, "--peak_tflops", 0.001, cwd=tmp_path)
    for row in rows:
        seconds, tokens = float(row["seconds"]), 2 * 8 * int(row["s"])
        assert float(row["raw_tokens_per_second"]) == pytest.approx(tokens / seconds)
        width = 8 * 2  # of the attention
        met = 16 * (2 * width + 2 * 8) + 2 * 8 + 16 * 4 + 2 * 3 * 16 * 8 + 3 * 16 + 97 * 16
        passes = 1 if row["step"].startswith("evaluation") else 3
        flops = 2 * 8 * passes * (2 * met + 4 * width * 8)
        assert float(row["share_of_peak"]) == pytest.approx(flops / seconds / 1e9)


def test_a_checkpoint_is_measured_and_leaves_nothing(tmp_path):
    rows, _ = run("benchmark_checkpoint.py", "--gigabytes", 0.001, 0.002, cwd=tmp_path)
    assert [row["gigabytes"] for row in rows] == ["0.001", "0.002"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@fails_before("torch", "2.9", "it has no Muon")
def test_muon_and_adamw_are_compared_with_the_best_rate_of_each(tmp_path):
    documents = [{"text": " ".join(f"{word} {word * number}" for word in range(40))} for number in range(100)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    train_tokenizer((document["text"] for document in documents), 300).save_pretrained(tmp_path / "tokenizer")
    flags = ("--text", text, "--tokenizer", tmp_path / "tokenizer", "--steps", 20, "--csv", "rows.csv")
    flags = (*flags, "--learning_rates", 1e-3, 1e-2, "--seeds", 1, 2, "--output_dir", "runs")
    written = []
    for _ in range(2):  # nothing is trained in the second run
        done = run_script(SCRIPTS / "benchmark_muon.py", *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        results = (tmp_path / "runs").rglob("eval_results.json")
        written.append(sorted((path, path.stat().st_mtime_ns) for path in results))
    assert written[0] == written[1]
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    half = rows[: len(rows) // 2]
    assert [row["eval_loss"] for row in half] == [row["eval_loss"] for row in rows[len(half) :]]
    losses = {
        (row["optimizer"], row["arm"], row["learning_rate"], row["seed"]): float(row["eval_loss"])
        for row in half
    }
    assert len(losses) == len(half) == 12
    for optimizer, arm in itertools.product(("adamw", "muon"), ("baseline", "tst")):
        chosen = [rate for *pair, rate, seed in losses if pair == [optimizer, arm] and seed == "2"]
        tried = {rate: losses[optimizer, arm, rate, "1"] for rate in ("0.001", "0.01")}
        assert chosen == [min(tried, key=tried.__getitem__)]
    assert len(set(losses.values())) == 12
