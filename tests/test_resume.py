"""Resumed runs against uninterrupted ones: map-style and streamed, twice in a row, at the worst places."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import BLOCK_LENGTH, VOCAB_SIZE, make_blocks, set_dropout
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from versions import fails_before

from hf_tst import TSTError, TSTTrainer
from hf_tst.batches.read_order import Permutation
from hf_tst.batches.resume_position import DataPosition
from hf_tst.data.streams import BlockStream
from hf_tst.records.run_record import RunRecord

EOS = VOCAB_SIZE - 1


class StopAt(TrainerCallback):
    """Ends training after a step, as a job that is killed once it has saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


class Fed(TrainerCallback):
    """Notes the ids that the model is fed in training, by optimizer step."""

    def __init__(self, model):
        self.rows = {}
        self.step = 0
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def note(self, module, args, kwargs):
        if module.training:
            self.rows.setdefault(self.step, []).append(kwargs["input_ids"].flatten(1).tolist())


def history(trainer):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(e["step"], e["epoch"], e["loss"], e["learning_rate"], e["tst_raw_tokens"]) for e in entries]


def documents(count=400, seed=0):
    generator = np.random.default_rng(seed)
    lengths = generator.choice([0, 1, 3, 17, 40], size=count)
    return [[*generator.integers(0, EOS, size=length).tolist(), EOS] for length in lengths]


def packed_stream(shards=3):
    rows = datasets.Dataset.from_dict({"input_ids": documents()})
    # A batched map in front, as tokenizing has: its state lies inside a batch of documents.
    stream = rows.to_iterable_dataset(num_shards=shards).map(lambda batch: batch, batched=True, batch_size=7)
    return BlockStream(stream, BLOCK_LENGTH)


def block_stream():
    return datasets.Dataset.from_list(make_blocks(200)).to_iterable_dataset(num_shards=2)


def short_stream():
    """Ends within the run, in either phase."""
    return datasets.Dataset.from_list(make_blocks(45)).to_iterable_dataset()


class Plain(IterableDataset):
    """A stream that cannot say where it stands."""

    def __iter__(self):
        return iter(make_blocks(200))


STREAMS = {
    "packed stream": lambda: packed_stream(shards=4),
    "block stream": block_stream,
    "short stream": lambda: datasets.Dataset.from_list(make_blocks(45)).to_iterable_dataset(num_shards=2),
    "shuffled stream": lambda: block_stream().shuffle(seed=1, buffer_size=20),
    "shuffled short stream": lambda: STREAMS["short stream"]().shuffle(seed=1, buffer_size=20),
}
SOURCES = {
    "blocks": lambda: make_blocks(200),
    "dataset": lambda: datasets.Dataset.from_list(make_blocks(200)),
    "packed stream": packed_stream,
    "block stream": block_stream,
    "short stream": short_stream,
    "stream without state": Plain,
    "shuffled stream": lambda: block_stream().shuffle(seed=1, buffer_size=20),
}


def run_in_pieces(model, args, source, stops, make_args):
    """Train with a stop and a resume, in a new trainer on new data, at each of `stops`."""
    folder = Path(args.output_dir)
    fed = Fed(model)
    trainer = checkpoint = None
    for stop in [*stops, args.max_steps]:
        torch.manual_seed(stop)  # what a fresh process would have, or anything else
        trainer = TSTTrainer(model, args, train_dataset=source(), callbacks=[StopAt(stop), fed])
        trainer.train(resume_from_checkpoint=checkpoint)
        checkpoint = str(folder / f"checkpoint-{stop}")
    return trainer, fed


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("stops", [(1, 2), (2, 3), (3, 4), (6, 9)], ids=str)
def test_two_resumes_in_a_row_give_the_uninterrupted_run(llama, make_args, tmp_path, source, stops):
    """Within superposition, before and at the switch, at it and right after it, and within recovery."""
    other = copy.deepcopy(set_dropout(llama))
    common = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    whole, fed = run_in_pieces(llama, make_args(**common), SOURCES[source], (), make_args)
    args = make_args(**common, output_dir=str(tmp_path / "pieces"))
    resumed, fed_again = run_in_pieces(other, args, SOURCES[source], stops, make_args)
    assert fed_again.rows == fed.rows
    assert history(resumed) == history(whole)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), other.parameters(), strict=True))
    last = f"checkpoint-{args.max_steps}"
    positions = [DataPosition.load(Path(t.args.output_dir) / last) for t in (whole, resumed)]
    assert positions[0] == positions[1]


def test_a_stream_may_be_resumed_again_in_the_same_process(llama, make_args):
    """The data set object of the first run still holds the state that it was resumed from."""
    args = make_args(save_strategy="steps", save_steps=1)
    stream = block_stream()
    fed = []
    for checkpoint in (None, "checkpoint-4", None):
        path = checkpoint and str(Path(args.output_dir) / checkpoint)
        model = copy.deepcopy(llama)
        fed.append(Fed(model))
        TSTTrainer(model, args, train_dataset=stream, callbacks=[fed[-1]]).train(path)
    assert fed[1].rows == {k: v for k, v in fed[0].rows.items() if k >= 4}
    assert fed[2].rows == fed[0].rows


@pytest.mark.parametrize("source", STREAMS)
@pytest.mark.parametrize(("accumulation", "stops"), [(1, (1, 6)), (2, (2, 5))], ids=str)
def test_streams_read_by_workers_resume_too(llama, make_args, tmp_path, source, accumulation, stops):
    """Also where it is not the first worker's turn, and before a worker has made a batch."""
    other = copy.deepcopy(set_dropout(llama))
    common = {
        "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": 2, "tst_phase_ratio": 0.2,
    }  # fmt: skip
    whole, fed = run_in_pieces(llama, make_args(**common), STREAMS[source], (), make_args)
    args = make_args(**common, output_dir=str(tmp_path / "pieces"))
    resumed, fed_again = run_in_pieces(other, args, STREAMS[source], stops, make_args)
    assert fed_again.rows == fed.rows
    assert history(resumed) == history(whole)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), other.parameters(), strict=True))
    assert len(fed.rows) == args.max_steps
    state = torch.load(Path(args.output_dir) / "checkpoint-4" / "stream_state_0.pt", weights_only=True)
    assert sorted(state["workers"]) == [0, 1]
    assert all((worker["stream"] is None) == ("shuffled" in source) for worker in state["workers"].values())
    if source in ("block stream", "packed stream"):
        rows = [tuple(row) for batches in fed.rows.values() for batch in batches for row in batch]
        assert len(set(rows)) == len(rows)


LOADER = {
    "persistent_workers": True,
    "prefetch_factor": 3,
    "multiprocessing_context": "spawn",
    "pin_memory": False,
}


@fails_before("transformers", "5.23", "it has no dataloader_multiprocessing_context")
@pytest.mark.parametrize("source", ["dataset", "block stream"])
def test_every_option_of_the_loader_counts(llama, make_args, source):
    """Loader processes that are started in another way read the same."""
    fed, other = Fed(llama), copy.deepcopy(llama)
    TSTTrainer(
        llama, make_args(dataloader_num_workers=1), train_dataset=SOURCES[source](), callbacks=[fed]
    ).train()
    args = make_args(
        **{f"dataloader_{name}": value for name, value in LOADER.items()}, dataloader_num_workers=1
    )
    fed_again = Fed(other)
    trainer = TSTTrainer(other, args, train_dataset=SOURCES[source](), callbacks=[fed_again])
    trainer.train()
    assert fed_again.rows == fed.rows
    loader = trainer.get_train_dataloader()
    context = loader.multiprocessing_context
    assert context.get_start_method() == "spawn"
    assert {name: getattr(loader, name) for name in LOADER} == LOADER | {"multiprocessing_context": context}
    assert loader.worker_init_fn is not None


@fails_before("transformers", "5.23", "it has no dataloader_in_order")
@pytest.mark.parametrize("source", ["dataset", "packed stream"])
def test_batches_that_come_in_any_order_are_refused(llama, make_args, source):
    args = make_args(dataloader_num_workers=1, dataloader_in_order=False)
    with pytest.raises(ValueError, match="dataloader_in_order=False"):
        TSTTrainer(llama, args, train_dataset=SOURCES[source]()).train()
    if source == "packed stream":
        args = make_args(accelerator_config={"dispatch_batches": True})
        with pytest.raises(ValueError, match="dispatch_batches=True"):
            TSTTrainer(llama, args, train_dataset=SOURCES[source]()).train()


def test_workers_share_a_stream_without_loss(llama, make_args):
    """Two workers read two shards, batch by batch in turn; together they read what the stream holds, each block once."""
    args = make_args(dataloader_num_workers=2, max_steps=20, tst_phase_ratio=0.3)
    fed = Fed(llama)
    blocks = make_blocks(6 * 2 * 4 + 14 * 2)
    stream = datasets.Dataset.from_list(blocks).to_iterable_dataset(num_shards=2)
    TSTTrainer(llama, args, train_dataset=stream, callbacks=[fed]).train()
    read = [
        tuple(row[i : i + BLOCK_LENGTH])
        for batches in fed.rows.values()
        for batch in batches
        for row in batch
        for i in range(0, len(row), BLOCK_LENGTH)
    ]
    assert sorted(read) == sorted(tuple(block["input_ids"]) for block in blocks)


def test_another_number_of_stream_workers_is_refused(llama, make_args):
    args = {"save_strategy": "steps", "save_steps": 2}
    first = TSTTrainer(llama, make_args(**args, dataloader_num_workers=2), train_dataset=block_stream())
    first.train()
    checkpoint = str(Path(first.args.output_dir) / "checkpoint-2")
    with pytest.raises(ValueError, match="dataloader_num_workers was 2 and is 0"):
        TSTTrainer(llama, make_args(**args), train_dataset=block_stream()).train(checkpoint)


class OwnLoader(TSTTrainer):
    """Its batches have a size of their own."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=2, collate_fn=default_data_collator)


@pytest.mark.parametrize(
    ("trainer_class", "workers"), [(TSTTrainer, 2), (OwnLoader, 0)], ids=["stream", "own loader"]
)
def test_micro_batches_of_a_stream_or_own_loader_keep_their_size(llama, make_args, trainer_class, workers):
    """Which reader of a stream makes micro-batch i, and which batch of a loader it is, depends on i alone."""
    args = {"save_strategy": "steps", "save_steps": 1, "dataloader_num_workers": workers}
    blocks = [{**block, "labels": block["input_ids"]} for block in make_blocks(200)]
    data = datasets.Dataset.from_list(blocks).to_iterable_dataset(num_shards=2) if workers else blocks
    first = trainer_class(llama, make_args(**args), train_dataset=data, callbacks=[StopAt(1)])
    first.train()
    again = make_args(**args, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    with pytest.raises(TSTError, match="per_device_train_batch_size was 2 and is 1"):
        trainer_class(llama, again, train_dataset=data).train("last")


def test_workers_resume_like_the_main_process(llama, make_args, tmp_path):
    other = copy.deepcopy(set_dropout(llama))
    common = {"save_strategy": "steps", "save_steps": 1}
    whole, fed = run_in_pieces(llama, make_args(**common), SOURCES["dataset"], (), make_args)
    args = make_args(**common, output_dir=str(tmp_path / "pieces"), dataloader_num_workers=2)
    resumed, fed_again = run_in_pieces(other, args, SOURCES["dataset"], (2, 5), make_args)
    assert fed_again.rows == fed.rows
    assert history(resumed) == history(whole)


def test_epochs_resume_within_an_epoch(llama, make_args, tmp_path):
    other = copy.deepcopy(llama)
    common = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    whole = TSTTrainer(llama, make_args(**common), train_dataset=make_blocks(60))
    whole.train()
    steps = whole.state.global_step
    assert steps > 12
    args = make_args(**common, output_dir=str(tmp_path / "pieces"))
    checkpoint = None
    for stop in (steps // 2 - 1, steps // 2 + 2, steps):
        resumed = TSTTrainer(other, args, train_dataset=make_blocks(60), callbacks=[StopAt(stop)])
        resumed.train(resume_from_checkpoint=checkpoint)
        checkpoint = str(Path(args.output_dir) / f"checkpoint-{stop}")
    assert history(resumed) == history(whole)


def test_evaluation_by_processes_that_stay_draws_no_random_numbers_of_training(llama, make_args, tmp_path):
    """With dropout: an uninterrupted run starts them once, a resumed run once more."""
    other = copy.deepcopy(set_dropout(llama))
    common = {
        "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 1,
        "dataloader_num_workers": 1, "dataloader_persistent_workers": True,
    }  # fmt: skip
    data = {"train_dataset": make_blocks(200), "eval_dataset": make_blocks(2)}
    TSTTrainer(llama, make_args(**common), **data).train()
    args = make_args(**common, output_dir=str(tmp_path / "resumed"))
    TSTTrainer(other, args, **data).train(str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("ratio", "stop"), [(0, 30), (0, 20), (0.3, 16)])
def test_epochs_resume_with_loader_processes_that_stay(llama, make_args, tmp_path, ratio, stop):
    """At an epoch's end and within one, with dropout: a new loader draws a seed for its processes, one that stays does not."""
    other = copy.deepcopy(set_dropout(llama))
    common = {
        "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": stop, "tst_phase_ratio": ratio,
        "dataloader_num_workers": 1, "dataloader_persistent_workers": True,
    }  # fmt: skip
    TSTTrainer(llama, make_args(**common), train_dataset=make_blocks(60)).train()
    args = make_args(**common, output_dir=str(tmp_path / "resumed"))
    checkpoint = str(tmp_path / "run" / f"checkpoint-{stop}")
    TSTTrainer(other, args, train_dataset=make_blocks(60)).train(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("source", ["blocks", "block stream"])
@pytest.mark.parametrize(
    "length", [{}, {"tst_phase_ratio": 0}, {"max_steps": -1, "num_train_epochs": 2}], ids=str
)
def test_a_finished_run_trains_nothing_when_it_is_resumed_from_its_last_checkpoint(
    llama, make_args, source, length
):
    """Trainer would take one step more. What it writes again is what it wrote."""
    if source == "block stream" and "max_steps" in length:
        pytest.skip("a stream has no length")
    args = make_args(save_strategy="epoch" if "max_steps" in length else "steps", save_steps=10, **length)
    TSTTrainer(llama, args, train_dataset=SOURCES[source]()).train()
    weights = {name: weight.clone() for name, weight in llama.state_dict().items()}
    fed = Fed(llama)
    trainer = TSTTrainer(llama, args, train_dataset=SOURCES[source]())
    trainer.train("last")
    assert trainer.state.global_step == trainer.state.max_steps
    assert not fed.rows
    assert all(torch.equal(weight, weights[name]) for name, weight in llama.state_dict().items())
    newest = Path(args.output_dir) / f"checkpoint-{trainer.state.max_steps}"
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == trainer.state.max_steps


def test_a_batch_size_that_was_found_is_resumed_with(llama, make_args, tmp_path):
    """Rows that do not fit, twice: at the beginning, and when the run is resumed."""

    class OneTooLarge(TSTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if inputs["input_ids"].shape[0] > 1:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, num_items_in_batch)

    other = copy.deepcopy(set_dropout(llama))
    common = {
        "auto_find_batch_size": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "gradient_accumulation_steps": 2,
    }
    blocks = make_blocks(200)
    whole = OneTooLarge(llama, make_args(**common), train_dataset=blocks)
    whole.train()
    args = make_args(**common, output_dir=str(tmp_path / "pieces"))
    for stop, checkpoint in ((2, None), (5, "last"), (10, "last")):
        torch.manual_seed(stop)
        resumed = OneTooLarge(other, args, train_dataset=blocks, callbacks=[StopAt(stop)])
        resumed.train(resume_from_checkpoint=checkpoint)
    assert whole.state.train_batch_size == resumed.state.train_batch_size == 1
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), other.parameters(), strict=True))


# No skipping


class Enormous:
    """More blocks than fit anywhere, made when asked for; counts how often."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        self.reads += 1
        return {"input_ids": [index % VOCAB_SIZE] * BLOCK_LENGTH}


@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_resuming_at_step_a_million_costs_what_it_costs_at_step_ten(
    llama, make_args, tmp_path, monkeypatch, ratio
):
    computed = []
    permute = Permutation.__call__

    def counted(self, positions):
        computed.append(positions.size)
        return permute(self, positions)

    args = make_args(
        max_steps=2_000_000, tst_phase_ratio=ratio, gradient_accumulation_steps=2, save_strategy="steps",
        save_steps=10, logging_steps=10**7, learning_rate=0, tst_save_at_switch=False,
    )  # fmt: skip
    TSTTrainer(llama, args, train_dataset=Enormous(), callbacks=[StopAt(10)]).train()
    early = Path(args.output_dir) / "checkpoint-10"
    late = Path(args.output_dir) / "checkpoint-1000000"
    shutil.copytree(early, late, ignore=shutil.ignore_patterns("manifest.json"))
    state = json.loads((late / "trainer_state.json").read_text())
    (late / "trainer_state.json").write_text(json.dumps(state | {"global_step": 1_000_000}))
    replace(DataPosition.load(early), step=1_000_000).save(late)

    costs = []
    monkeypatch.setattr(Permutation, "__call__", counted)
    for checkpoint, step in ((early, 10), (late, 1_000_000)):
        computed.clear()
        blocks = Enormous()
        batches = []

        class Count(TrainerCallback):
            def on_substep_end(self, args, state, control, batches=batches, **kwargs):
                batches.append(state.global_step)

        trainer = TSTTrainer(llama, args, train_dataset=blocks, callbacks=[StopAt(step + 3), Count()])
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == step + 3
        assert trainer.state.epoch == (step + 3) / 2_000_000
        superposed = trainer.schedule.phase(step) == "superposition"
        costs.append(
            (len(batches), sum(computed) if ratio == 0.9 else None, blocks.reads - 3 * superposed * 3 * 4)
        )
    if ratio == 0.9:
        assert costs[0] == costs[1]
    else:
        # Recovery looks a row's block up in up to two permutations and reads it alone.
        assert costs[1][0] == costs[0][0]
        assert sum(computed) < 10_000
        assert blocks.reads < 300


# What a checkpoint says


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_checkpoint_says_which_data_it_was_trained_on(llama, make_args, accumulation):
    args = make_args(
        save_strategy="steps", save_steps=2, gradient_accumulation_steps=accumulation, save_only_model=True
    )
    TSTTrainer(llama, args, train_dataset=make_blocks(200)).train()
    rows = 2 * accumulation
    folders = sorted(Path(args.output_dir).glob("checkpoint-*"))
    assert {int(f.name.split("-")[1]) for f in folders} == {2, 3, 4, 6, 8, 10}
    for folder in folders:
        found = json.loads((folder / "data_position.json").read_text())
        step = int(folder.name.split("-")[1])
        superposed, recovered = min(step, 3) * rows * 4, max(0, step - 3) * rows
        assert found.pop("data")
        assert found == {
            "version": 1, "step": step, "max_steps": 10, "phase_ratio": 0.3, "bag_size": 4, "mode": "full", "superposition_rows": "longer",
            "document_boundaries": "ignore", "seed": 42, "shuffle": True, "rows_per_step": rows,
            "per_device_batch_size": 2, "accumulation_steps": accumulation, "world_size": 1,
            "block_length": BLOCK_LENGTH, "num_blocks": 200, "split_by_rank": False, "tokens_left_out": 0, "stream_workers": 0,
            "offset_weighting": "uniform", "input_weighting": "uniform",
            "consumed": {
                "superposition": {"blocks": superposed, "raw_tokens": superposed * BLOCK_LENGTH},
                "recovery": {"blocks": recovered, "raw_tokens": recovered * BLOCK_LENGTH},
            },
        }  # fmt: skip


CHANGES = {
    "r": ({"tst_phase_ratio": 0.5}, None, "tst_phase_ratio was 0.3 and is 0.5"),
    "s": ({"tst_bag_size": 2}, None, "tst_bag_size was 4 and is 2"),
    "N": ({"max_steps": 12}, None, "max_steps was 10 and is 12"),
    "batch": ({"per_device_train_batch_size": 4}, None, "rows_per_step was 2 and is 4"),
    "accumulation": ({"gradient_accumulation_steps": 3}, None, "was 2 and is 6"),
    "mode": ({"tst_mode": "input"}, None, "tst_mode was full and is input"),
    "rows": ({"tst_superposition_rows": "more"}, None, "tst_superposition_rows was longer and is more"),
    "offset weighting": ({"tst_offset_weighting": "power_law"}, None, "tst_offset_weighting was uniform and is power_law"),
    "input weighting": ({"tst_input_weighting": "linear"}, None, "tst_input_weighting was uniform and is linear"),
    "seed": ({"data_seed": 7}, None, "seed was 42 and is 7"),
    "order": ({"train_sampling_strategy": "sequential"}, None, "shuffle was True and is False"),
    "length": ({}, lambda: make_blocks(200, length=8), f"block_length was {BLOCK_LENGTH} and is 8"),
    "blocks": ({}, lambda: make_blocks(199), "num_blocks was 200 and is 199"),
    "text": ({}, lambda: make_blocks(200, seed=5), "the data's fingerprint was .* and is "),
    "stream": ({}, block_stream, "num_blocks was 200 and is None"),
}  # fmt: skip


@pytest.fixture
def stopped(llama, make_args):
    """A run that was stopped at step 5, and its checkpoint."""
    args = make_args(save_strategy="steps", save_steps=5)
    TSTTrainer(llama, args, train_dataset=make_blocks(200), callbacks=[StopAt(5)]).train()
    return llama, str(Path(args.output_dir) / "checkpoint-5")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_would_move_the_data_is_refused_with_both_values(stopped, make_args, caplog, change):
    model, checkpoint = stopped
    overrides, source, message = CHANGES[change]
    blocks = source() if source else make_blocks(200)
    steps = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    trainer = TSTTrainer(model, make_args(**overrides), train_dataset=blocks)
    with pytest.raises(ValueError, match=message) as error:
        trainer.train(resume_from_checkpoint=checkpoint)
    assert "tst_allow_data_change" in str(error.value)
    assert "\n" not in str(error.value)
    assert not steps
    trainer = TSTTrainer(model, make_args(**overrides, tst_allow_data_change=True), train_dataset=blocks)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert steps
    assert trainer.state.global_step == overrides.get("max_steps", 10)


def test_the_same_global_batch_may_be_split_otherwise(stopped, make_args):
    model, checkpoint = stopped
    args = make_args(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer = TSTTrainer(model, args, train_dataset=make_blocks(200))
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 10


def test_the_fingerprint_is_that_of_the_tokens_not_of_their_storage(stopped, make_args, tmp_path):
    model, checkpoint = stopped
    datasets.Dataset.from_list(make_blocks(200)).save_to_disk(tmp_path / "blocks")
    blocks = datasets.load_from_disk(tmp_path / "blocks")
    TSTTrainer(model, make_args(), train_dataset=blocks).train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_of_the_plain_trainer_is_resumed_with_a_warning(llama, make_args, tmp_path, caplog):
    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"), max_steps=2, save_steps=2, report_to="none", use_cpu=True
    )
    Trainer(copy.deepcopy(llama), args, train_dataset=make_blocks(20)).train()
    trainer = TSTTrainer(llama, make_args(), train_dataset=make_blocks(200))
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    assert "has no data_position.json" in caplog.text
    assert trainer.state.global_step == 10


@pytest.mark.parametrize(
    ("text", "message"), [('{"version": 2}', "version 2"), ("{", "damaged"), ('{"version": 1}', "damaged")]
)
def test_a_position_that_cannot_be_read_is_refused(stopped, make_args, text, message):
    model, checkpoint = stopped
    Path(checkpoint, "data_position.json").write_text(text)
    Path(checkpoint, "manifest.json").unlink()
    with pytest.raises(ValueError, match=message):
        TSTTrainer(model, make_args(), train_dataset=make_blocks(200)).train(checkpoint)


def test_what_the_resumed_optimizer_keeps_is_told_and_recorded(llama, make_args, caplog):
    """PyTorch restores its rates and weight decay; the function of the schedule is made from the arguments."""
    given = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    common = {"save_strategy": "steps", "save_steps": 2, "warmup_steps": 0, "logging_steps": 1}

    def train(resume=None, stop=10, **options):
        caplog.clear()
        trainer = TSTTrainer(
            llama, make_args(**common | options), train_dataset=make_blocks(200), callbacks=[StopAt(stop)]
        )
        with caplog.at_level("WARNING"):
            trainer.train(resume and str(Path(trainer.args.output_dir) / f"checkpoint-{resume}"))
        return trainer, RunRecord.from_state(vars(trainer.state)).arguments

    train(stop=4, **given)
    assert "resumed optimizer" not in caplog.text
    other = {"learning_rate": 1e-5, "weight_decay": 0.5, "lr_scheduler_type": "linear"}
    for resume in (4, 6):  # the second run is resumed from, too
        trainer, recorded = train(resume, stop=resume + 2, **other)
        assert (
            "The resumed optimizer keeps the checkpoint's learning_rate=0.01 and weight_decay=0.1, not learning_rate=1e-05 and "
            "weight_decay=0.5 of the arguments: "
        ) in caplog.text
        assert recorded.items() >= (given | {"lr_scheduler_type": "linear"}).items()
        last = next(e for e in reversed(trainer.state.log_history) if "learning_rate" in e)
        assert last["learning_rate"] == pytest.approx(1e-2 * (10 - last["step"] + 1) / 10)
        assert max(group["weight_decay"] for group in trainer.optimizer.param_groups) == 0.1
    trainer.create_model_card()
    assert "learning rate 0.01, schedule linear" in (Path(trainer.args.output_dir) / "README.md").read_text()
    train(8, **given)
    assert "resumed optimizer" not in caplog.text


def test_a_stream_without_its_state_file_is_refused(llama, make_args):
    args = make_args(save_strategy="steps", save_steps=5)
    TSTTrainer(llama, args, train_dataset=block_stream(), callbacks=[StopAt(5)]).train()
    checkpoint = Path(args.output_dir) / "checkpoint-5"
    os.remove(checkpoint / "stream_state_0.pt")
    os.remove(checkpoint / "manifest.json")
    with pytest.raises(ValueError, match=r"no stream_state_0\.pt"):
        TSTTrainer(llama, args, train_dataset=block_stream()).train(str(checkpoint))


def test_a_stream_without_state_says_how_much_it_reads_again(llama, make_args, caplog):
    args = make_args(save_strategy="steps", save_steps=5)
    TSTTrainer(llama, args, train_dataset=Plain(), callbacks=[StopAt(5)]).train()
    with caplog.at_level("WARNING"):
        TSTTrainer(llama, args, train_dataset=Plain()).train(str(Path(args.output_dir) / "checkpoint-5"))
    assert "10 rows (28 blocks)" in caplog.text


def test_a_stream_of_other_blocks_is_refused(llama, make_args):
    args = make_args(save_strategy="steps", save_steps=5)
    TSTTrainer(llama, args, train_dataset=packed_stream(), callbacks=[StopAt(5)]).train()
    checkpoint = str(Path(args.output_dir) / "checkpoint-5")
    shorter = BlockStream(packed_stream().documents, 8)
    with pytest.raises(ValueError, match=f"block_length was {BLOCK_LENGTH} and is 8"):
        TSTTrainer(llama, args, train_dataset=shorter).train(checkpoint)
    with pytest.raises(ValueError, match="stream of 3 shards and is stream of 4 shards"):
        TSTTrainer(llama, args, train_dataset=packed_stream(4)).train(checkpoint)


class Asks(TrainerCallback):
    """Asks for a loader during training and reads from it, as callbacks that look at the data do."""

    trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.look()

    def on_substep_end(self, args, state, control, **kwargs):
        self.look()

    def look(self):
        if self.trainer is not None:
            next(iter(self.trainer.get_train_dataloader()))


class Wraps(TSTTrainer):
    def get_train_dataloader(self):
        return super().get_train_dataloader()


class Own(TSTTrainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_size=2, collate_fn=self.data_collator, drop_last=True
        )


@pytest.mark.parametrize("trainer_class", [TSTTrainer, Wraps, Own])
@pytest.mark.parametrize("source", ["blocks", "packed stream"])
def test_a_loader_that_is_asked_for_in_training_changes_nothing(llama, make_args, source, trainer_class):
    if trainer_class is Own and source != "blocks":
        return
    found = []
    for asks in (False, True):
        callback, boundaries = Asks(), "ignore" if trainer_class is Own else "respect"
        args = make_args(
            max_steps=8, gradient_accumulation_steps=2, logging_steps=2, save_strategy="steps", save_steps=2,
            tst_document_boundaries=boundaries,
        )  # fmt: skip
        trainer = trainer_class(
            copy.deepcopy(llama), args, train_dataset=SOURCES[source](), callbacks=[callback]
        )
        trainer.model.config.eos_token_id = 5
        callback.trainer = trainer if asks else None
        trainer.train()
        logs = [
            {name: value for name, value in entry.items() if "second" not in name and "runtime" not in name and "wait" not in name}
            for entry in trainer.state.log_history
        ]  # fmt: skip
        states = [
            torch.load(path, weights_only=True)
            for path in sorted(Path(args.output_dir).rglob("stream_state_0.pt"))
        ]
        positions = [path.read_text() for path in sorted(Path(args.output_dir).rglob("data_position.json"))]
        found.append((logs, str(states), positions))
    assert found[0] == found[1]
