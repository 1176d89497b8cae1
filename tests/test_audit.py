"""The plan against what models are fed: one process, two processes, any world size, any number of workers."""

import json
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import BLOCK_LENGTH, make_blocks, plan_for_passes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from processes import Script, run_script
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback

from hf_tst import PhaseSchedule, TSTTrainer, TSTTrainingArguments
from hf_tst.batches.read_order import BatchLayout, DataPlan
from hf_tst.batches.resume_position import DataPosition
from hf_tst.batches.rows import EpochSampler, PlannedRows
from hf_tst.data.streams import BlockStream
from hf_tst.training.audit import audit_step, plan_of_arguments, plan_of_position, verify_plan

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "scripts" / "audit.py"


class Recorder(TrainerCallback):
    """Notes the rows that the model is fed in training, by optimizer step and micro-batch."""

    def __init__(self, model):
        self.rows = {}
        self.step = 0
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def note(self, module, args, kwargs):
        if module.training:
            self.rows.setdefault(self.step, []).append(kwargs["input_ids"].flatten(1).tolist())


def numbered_blocks(count=200):
    """Blocks that say their own number, in two digits of base 97."""
    return [{"input_ids": [i % 97, i // 97, *[1] * (BLOCK_LENGTH - 2)]} for i in range(count)]


def sharded_stream():
    documents = datasets.Dataset.from_list(numbered_blocks(400)).to_iterable_dataset(num_shards=4)
    return BlockStream(documents, BLOCK_LENGTH)


SOURCES = {
    "blocks": lambda: datasets.Dataset.from_list(numbered_blocks()),
    "sharded stream": sharded_stream,
    "whole stream": lambda: datasets.Dataset.from_list(numbered_blocks(400)).to_iterable_dataset(
        num_shards=1
    ),
}


def block_numbers(row):
    return [row[i] + 97 * row[i + 1] for i in range(0, len(row), BLOCK_LENGTH)]


def fed_blocks(rows_by_step):
    return {
        step: [[block_numbers(row) for row in batch] for batch in batches]
        for step, batches in rows_by_step.items()
    }


def all_blocks(record):
    """The blocks of all ranks, in the order of the plan, which no world size changes."""
    return [b for ranks in zip(*record["blocks"], strict=True) for rows in ranks for row in rows for b in row]


# Against real runs


@pytest.mark.parametrize("mode", ["full", "output"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_model_is_fed_what_the_audit_says(llama, make_args, mode, workers):
    args = make_args(gradient_accumulation_steps=3, tst_mode=mode, dataloader_num_workers=workers)
    recorder = Recorder(llama)
    TSTTrainer(llama, args, train_dataset=SOURCES["blocks"](), callbacks=[recorder]).train()
    plan, layout = plan_of_arguments(args, 200)
    fed = fed_blocks(recorder.rows)
    assert sorted(fed) == list(range(10))
    for step in fed:
        record = audit_step(plan, layout, step, BLOCK_LENGTH)
        assert record["blocks"] == [fed[step]]
        assert record["raw_tokens"] == len(all_blocks(record)) * BLOCK_LENGTH
    with pytest.raises(ValueError, match="There is no step 10"):
        audit_step(plan, layout, 10, BLOCK_LENGTH)


def launch(folder, processes, **options):
    """Train in so many processes and return what each rank was fed."""
    defaults = {
        "output_dir": str(folder), "max_steps": 10, "tst_bag_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "source": "blocks",
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script, values = TESTS / "distributed" / "train.py", json.dumps(defaults | options)
    running = []
    for rank in range(processes):
        environment = {}
        if processes > 1:
            environment = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
                "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
        running.append(Script(script, values, **environment))
    for done in [script.finish() for script in running]:
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(processes)]


def test_two_processes_read_the_global_batches_of_one(tmp_path):
    # Adam would make differences of rounding in small gradients as large as any other.
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
    one = launch(tmp_path / "one", 1, per_device_train_batch_size=2, **options)[0]
    two = launch(tmp_path / "two", 2, per_device_train_batch_size=1, **options)
    args = TSTTrainingArguments(
        output_dir="x",
        max_steps=10,
        tst_bag_size=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    plan, layout = plan_of_arguments(args, 200, world_size=2)
    ranks = [fed_blocks(rank["rows"]) for rank in two]
    for step, micro_batches in fed_blocks(one["rows"]).items():
        record = audit_step(plan, layout, step, BLOCK_LENGTH)
        assert record["blocks"] == [rank[step] for rank in ranks]
        assert all_blocks(record) == [b for rows in micro_batches for row in rows for b in row]
    np.testing.assert_allclose(two[0]["losses"], one["losses"], rtol=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(two[0]["weights"][name], two[1]["weights"][name])


@pytest.mark.parametrize("source", ["sharded stream", "whole stream"])
def test_two_processes_share_a_stream_and_resume_it(tmp_path, source):
    options = {"source": source, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1}
    whole = launch(tmp_path / "whole", 2, **options)
    fed = [fed_blocks(rank["rows"]) for rank in whole]
    blocks = [[b for step in rank.values() for rows in step for row in rows for b in row] for rank in fed]
    together = blocks[0] + blocks[1]
    assert len(set(together)) == len(together) == PhaseSchedule(10, 0.3, 4).blocks_needed(4)
    if source == "whole stream":
        assert sorted(together) == list(range(len(together)))  # nothing is passed over
    for step in (2, 3):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = launch(tmp_path / f"from {step}", 2, **options, resume_from=checkpoint)
        for rank in range(2):
            assert fed_blocks(resumed[rank]["rows"]) == {k: v for k, v in fed[rank].items() if k >= step}
            assert all(torch.equal(resumed[rank]["weights"][k], v) for k, v in whole[rank]["weights"].items())

    if source == "whole stream":
        # One process may go on where two stopped.
        options |= {"per_device_train_batch_size": 2, "resume_from": checkpoint}
        alone = fed_blocks(launch(tmp_path / "alone", 1, **options)[0]["rows"])
        for step, micro_batches in alone.items():
            by_rank = zip(fed[0][step], fed[1][step], strict=True)
            assert micro_batches == [one + other for one, other in by_rank]


# Any shape of run


RUNS = {
    "ratio": st.floats(0, 1),
    "bag_size": st.integers(2, 6),
    "steps": st.integers(1, 12),
    "batch": st.integers(1, 3),
    "accumulation": st.integers(1, 3),
    "world_size": st.integers(1, 4),
    "spare": st.integers(0, 9),
    "seed": st.integers(0, 2**31),
}


@given(**RUNS)
@settings(deadline=None, max_examples=200)
def test_ranks_together_read_the_plan_and_no_block_twice(
    ratio, bag_size, steps, batch, accumulation, world_size, spare, seed
):
    schedule = PhaseSchedule(steps, ratio, bag_size)
    layout = BatchLayout(batch, accumulation, world_size)
    needed = schedule.blocks_needed(layout.rows_per_step)
    plan = DataPlan(needed + spare, schedule, layout.rows_per_step, seed)
    everything = []
    for step in range(steps):
        record = audit_step(plan, layout, step, block_length=1)
        rows = range(step * layout.rows_per_step, (step + 1) * layout.rows_per_step)
        assert all_blocks(record) == [block for row in rows for block in plan.row_blocks(row)]
        assert record["phase"] == schedule.phase(step)
        owners = [(layout.rows(step, r).ravel() // batch % world_size).tolist() for r in range(world_size)]
        assert owners == [[r] * (batch * accumulation) for r in range(world_size)]
        everything += [b for rank in record["blocks"] for rows in rank for row in rows for b in row]
    assert len(everything) == len(set(everything)) == needed
    assert verify_plan(plan)["blocks_read"] == needed
    assert verify_plan(plan)["unread"] == spare
    assert verify_plan(plan)["passes"] == 1


@given(**RUNS)
@settings(deadline=None, max_examples=60)
def test_the_loaders_of_all_ranks_read_what_the_audit_says(
    ratio, bag_size, steps, batch, accumulation, world_size, spare, seed
):
    """With accelerate's own way of dealing out batches, from the step that is reached."""
    schedule = PhaseSchedule(steps, ratio, bag_size)
    layout = BatchLayout(batch, accumulation, world_size)
    plan = DataPlan(
        schedule.blocks_needed(layout.rows_per_step) + spare, schedule, layout.rows_per_step, seed
    )
    rows = PlannedRows([{"input_ids": [i]} for i in range(plan.num_blocks)], plan, ["input_ids"])
    reached = seed % steps
    for rank in range(world_size):
        sampler = BatchSampler(
            EpochSampler(steps, layout.rows_per_step, steps, lambda: reached), batch, drop_last=False
        )
        shard = BatchSamplerShard(sampler, world_size, rank)
        loader = DataLoader(rows, batch_sampler=shard, collate_fn=lambda batch: batch)
        fed = [[list(row.columns["input_ids"]) for row in batch] for batch in loader]
        expected = [audit_step(plan, layout, step, 1)["blocks"][rank] for step in range(reached, steps)]
        assert fed == [micro_batch for step in expected for micro_batch in step]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_the_batches(workers):
    plan = DataPlan(60, PhaseSchedule(8, 0.4, 3), rows_per_step=4, seed=1)
    rows = PlannedRows(datasets.Dataset.from_list(make_blocks(60)), plan, ["input_ids"])

    def batches(workers):
        loader = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=_tokens)
        return list(loader)

    assert batches(workers) == batches(0)


def _tokens(batch):
    return [(row.superposed, row.columns["input_ids"].tolist()) for row in batch]


@given(
    global_batch=st.sampled_from([4, 6, 12]),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=50)
def test_a_fixed_global_batch_is_the_same_on_any_world_size(global_batch, ratio, seed):
    plan = DataPlan(400, PhaseSchedule(6, ratio, 3), global_batch, seed)
    splits = [
        BatchLayout(global_batch // world // accumulation, accumulation, world)
        for world in (1, 2, 3, 4)
        for accumulation in (1, 2)
        if global_batch % (world * accumulation) == 0
    ]
    assert len(splits) > 2
    for step in range(6):
        assert len({tuple(all_blocks(audit_step(plan, split, step, 1))) for split in splits}) == 1


@given(
    blocks=st.integers(20, 200),
    passes=st.sampled_from([0.5, 1, 2, 2.5]),
    ratio=st.floats(0, 1),
    bag_size=st.integers(2, 5),
    rows=st.integers(1, 5),
)
@settings(deadline=None, max_examples=100)
def test_no_block_is_read_twice_in_a_pass_of_several(blocks, passes, ratio, bag_size, rows):
    try:
        plan = plan_for_passes(blocks, passes, lambda n: PhaseSchedule(n, ratio, bag_size), rows, seed=5)
    except ValueError:
        assume(False)
    summary = verify_plan(plan)
    assert summary["blocks_read"] == plan.schedule.blocks_needed(rows)
    assert summary["passes"] <= np.ceil(passes)


def test_a_wrong_plan_is_found_out():
    class Repeating(DataPlan):
        def first_blocks_of_groups(self, rows):
            return super().first_blocks_of_groups(rows // 2 * 2)

    with pytest.raises(ValueError, match="read more than once in pass 0"):
        verify_plan(Repeating(100, PhaseSchedule(5, 0.5, 2), 4, seed=0))


# The script


def test_the_script_lists_steps_from_arguments_and_from_a_checkpoint(llama, make_args, tmp_path):
    args = make_args(save_strategy="steps", save_steps=5, gradient_accumulation_steps=2)
    TSTTrainer(llama, args, train_dataset=SOURCES["blocks"]()).train()
    checkpoint = Path(args.output_dir) / "checkpoint-5"
    plan, layout = plan_of_position(DataPosition.load(checkpoint))
    expected = [audit_step(plan, layout, step, BLOCK_LENGTH) for step in (0, 5)]
    (tmp_path / "config.yaml").write_text(
        "max_steps: 10\ntst_bag_size: 4\nlearning_rate: 0.1\nmodel_type: llama\n"
    )
    from_arguments = [
        str(tmp_path / "config.yaml"), "--num_blocks", "200", "--block_size", str(BLOCK_LENGTH),
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
    ]  # fmt: skip
    for flags in (from_arguments, ["--checkpoint", str(checkpoint)]):
        lines = run_script(SCRIPT, *flags, "--steps", "0,5", "--verify").stdout.splitlines()
        *steps, summary = map(json.loads, lines)
        assert [step["blocks"] for step in steps] == [record["blocks"] for record in expected]
        assert [step["phase"] for step in steps] == ["superposition", "recovery"]
        assert summary["blocks_read"] == PhaseSchedule(10, 0.3, 4).blocks_needed(4)
    # A recipe's batch is given in tokens: here two micro-batches of two rows.
    with open(tmp_path / "config.yaml", "a") as recipe:
        recipe.write(
            f"tokens_per_step: {4 * BLOCK_LENGTH}\nper_device_train_batch_size: 2\nblock_size: {BLOCK_LENGTH}\n"
        )
    listed = run_script(SCRIPT, tmp_path / "config.yaml", "--num_blocks", 200, "--steps", 5)
    record = json.loads(listed.stdout)
    assert (record["blocks"], record["raw_tokens"]) == (expected[1]["blocks"], 4 * BLOCK_LENGTH)
    of_unknown_length = run_script(SCRIPT, "--num_blocks", 200, "--max_steps", 10, "--steps", 0)
    assert json.loads(of_unknown_length.stdout)["raw_tokens"] is None
    failed = run_script(SCRIPT, "--num_blocks", 200, "--max_steps", 10, "--steps", "first")
    assert "steps must be a comma-separated list of int" in failed.stderr.splitlines()[-1]
    failed = run_script(SCRIPT)
    assert failed.returncode == 2
    assert "set num_blocks" in failed.stderr.splitlines()[-1]


def test_there_is_no_plan_without_superposition_or_for_a_stream(make_args):
    with pytest.raises(ValueError, match="no plan to audit"):
        plan_of_arguments(make_args(tst_phase_ratio=0), 200)
    position = DataPosition(
        step=0, max_steps=1, phase_ratio=0.5, bag_size=2, document_boundaries="ignore", seed=0, shuffle=False,
        per_device_batch_size=1, accumulation_steps=1, world_size=1, block_length=8, num_blocks=None, data="stream", split_by_rank=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="stream"):
        plan_of_position(position)
