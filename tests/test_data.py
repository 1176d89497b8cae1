import pickle
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from conftest import BLOCK_LENGTH, make_blocks, plan_for_passes, plan_for_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_script

from hf_tst import PhaseSchedule, TSTError
from hf_tst.batches.block_reader import BlockReader
from hf_tst.batches.blocks import BlockFacts, BlockRules, check_blocks
from hf_tst.batches.read_order import BatchLayout, DataPlan, Permutation
from hf_tst.batches.resume_position import DataPosition
from hf_tst.batches.rows import EpochSampler, PlannedRows, StreamedRows
from hf_tst.data.streams import open_stream


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_permutation_is_one(size, seed):
    order = Permutation(size, (seed,))(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


def test_permutation_answers_alone_what_it_answers_together():
    permutation = Permutation(10**12, (7,))
    positions = np.array([0, 5, 999_999_999_999])
    assert permutation(positions).tolist() == [permutation(np.array([p])).item() for p in positions]
    assert permutation(positions).max() < 10**12


def test_permutation_shuffles():
    order = Permutation(1000, (0,))(np.arange(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert (order != Permutation(1000, (1,))(np.arange(1000))).mean() > 0.9


def read_all(plan):
    """Blocks of all rows, by phase."""
    superposed = plan.first_blocks_of_groups(np.arange(plan.superposed_rows))
    size = plan.schedule.blocks_per_row
    groups = (superposed[:, None] + np.arange(size)).ravel().tolist()
    return groups, plan.recovery_blocks(np.arange(plan.superposed_rows, plan.total_rows)).tolist()


@given(
    blocks=st.integers(1, 400),
    passes=st.sampled_from([0.5, 1, 1.5, 2, 3]),
    ratio=st.floats(0, 1),
    bag_size=st.integers(1, 7),
    rows=st.integers(1, 9),
    shuffle=st.booleans(),
)
@settings(deadline=None)
def test_no_block_is_read_more_often_than_there_are_passes(blocks, passes, ratio, bag_size, rows, shuffle):
    def schedule(steps):
        return PhaseSchedule(steps, ratio, bag_size)

    try:
        plan = plan_for_passes(blocks, passes, schedule, rows, seed=3, shuffle=shuffle)
    except ValueError:
        assert blocks * passes < 2 * rows * bag_size or blocks < bag_size
        return
    superposed, recovery = read_all(plan)
    assert len(superposed) + len(recovery) == plan.schedule.blocks_needed(rows)
    counts = np.bincount(superposed + recovery, minlength=blocks)
    assert len(counts) == blocks
    assert counts.max() <= np.ceil(passes)
    # One step more would not have fitted.
    bigger = DataPlan(blocks, schedule(plan.schedule.max_steps + 1), rows, seed=3)
    assert bigger.groups_per_pass == 0 or bigger.blocks_consumed > passes * blocks - 1


def test_superposition_reads_consecutive_blocks_and_recovery_the_others():
    plan = plan_for_steps(47, PhaseSchedule(10, 0.5, 4), rows_per_step=1, seed=0)
    superposed, recovery = read_all(plan)
    assert [block % 4 for block in superposed[::4]] == [0] * 5
    assert not set(superposed) & set(recovery)
    assert sorted(set(superposed + recovery)) == sorted(superposed + recovery)


def test_the_seed_decides_the_order_of_both_phases():
    def orders(seed):
        return read_all(plan_for_steps(47, PhaseSchedule(10, 0.5, 4), rows_per_step=1, seed=seed))

    assert orders(1) == orders(1)
    for one, another in zip(orders(1), orders(2), strict=True):
        assert one != another


def test_without_shuffling_the_order_is_that_of_the_data():
    plan = plan_for_steps(12, PhaseSchedule(4, 0.5, 3), rows_per_step=1, seed=0, shuffle=False)
    assert read_all(plan) == ([0, 1, 2, 3, 4, 5], [6, 7])


def test_too_few_blocks_say_how_many_and_what_to_change():
    schedule = PhaseSchedule(10, 0.3, 6)
    with pytest.raises(ValueError, match=r"needs 50 blocks .* has 49: lower max_steps to about 9,"):
        plan_for_steps(49, schedule, rows_per_step=2, seed=0)
    assert plan_for_steps(50, schedule, rows_per_step=2, seed=0).blocks_consumed == 50
    with pytest.raises(ValueError, match="too few for one optimizer step"):
        plan_for_passes(7, 1, lambda steps: PhaseSchedule(steps, 1, 4), rows_per_step=2, seed=0)
    with pytest.raises(
        ValueError, match="has 3 blocks, too few for one optimizer step of 2 rows with 4 blocks each"
    ):
        plan_for_passes(3, 10, lambda steps: PhaseSchedule(steps, 0.3, 4), rows_per_step=2, seed=0)


def as_variable_lists(blocks):
    return datasets.Dataset.from_list(blocks)


def as_fixed_lists(blocks):
    length = len(blocks[0]["input_ids"])
    kind = datasets.Sequence(datasets.Value("int32"), length=length)
    return datasets.Dataset.from_list(blocks, features=datasets.Features({"input_ids": kind, "labels": kind}))


def in_chunks(blocks):
    """Groups of blocks lie across chunks of the table, and chunks are slices of larger ones."""
    pieces = [as_fixed_lists(blocks[i : i + 10]).select(range(1, 8)) for i in range(0, 56, 7)]
    whole = datasets.concatenate_datasets([as_fixed_lists(blocks[:1]), *pieces])
    order = [b["input_ids"] for b in blocks]
    found = [b["input_ids"] for b in whole]
    assert found[:8] == order[:8]
    return whole


def reordered(blocks):
    """A table with an index in front of it."""
    order = list(reversed(range(len(blocks))))
    return datasets.Dataset.from_list([blocks[i] for i in order]).select(order)


@pytest.mark.parametrize("source", [as_variable_lists, as_fixed_lists, in_chunks, reordered])
def test_blocks_are_read_the_same_however_they_are_stored(source, tmp_path):
    stored = source(make_blocks(70))
    expected = [(block["input_ids"], block["labels"]) for block in stored]
    stored.save_to_disk(tmp_path / "stored")
    for data in (stored, datasets.load_from_disk(tmp_path / "stored")):
        reader = BlockReader(data, ["input_ids", "labels"])
        numbers = [len(data) - 1, 0, 13, 13]
        found = [tuple(block[name].tolist() for name in reader.columns) for block in reader.read(numbers)]
        assert found == [expected[i] for i in numbers]
        for start in range(len(data) - 5):
            (joined,) = reader.read([start], 5)
            assert joined["input_ids"].tolist() == [t for ids, _ in expected[start : start + 5] for t in ids]
        again = pickle.loads(pickle.dumps(reader))
        assert again.read([5])[0]["input_ids"].tolist() == expected[5][0]


def test_a_block_of_another_length_is_found_when_it_is_read():
    """Beyond the lengths that are looked at before training."""
    blocks = make_blocks(6)
    blocks[3]["input_ids"] = blocks[3]["input_ids"][:-1]
    with pytest.raises(ValueError, match="block 3 has 11"):
        BlockReader(datasets.Dataset.from_list(blocks), ["input_ids"]).read([2], 3)


def test_starting_on_a_billion_tokens_takes_no_memory(tmp_path):
    """A sparse file of 10⁹ tokens behind a `datasets.Dataset` and behind a class of the user's own."""
    code = """
import resource, sys
import datasets, numpy as np, pyarrow as pa
from conftest import make_model
from hf_tst import TSTTrainer, TSTTrainingArguments

path, kind = sys.argv[1:]
tokens = np.memmap(path, dtype=np.int32, mode="r")
class Mapped:
    def __len__(self):
        return len(tokens) // 1024
    def __getitem__(self, i):
        return {"input_ids": tokens[i * 1024 : (i + 1) * 1024]}
if kind == "own":
    blocks = Mapped()
else:
    if kind == "fixed":
        column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), 1024)
    else:
        column = pa.ListArray.from_arrays(pa.array(np.arange(0, len(tokens) + 1, 1024, dtype=np.int32)), pa.array(tokens))
    blocks = datasets.Dataset(datasets.table.InMemoryTable(pa.table({"input_ids": column})), fingerprint="sparse")
assert len(blocks) == 10**9 // 1024
args = TSTTrainingArguments(output_dir=sys.argv[1] + ".out", max_steps=20000, per_device_train_batch_size=8,
                            tst_bag_size=6, use_cpu=True, report_to="none")
trainer = TSTTrainer(make_model("llama"), args, train_dataset=blocks)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
batches = iter(trainer.get_train_dataloader())
for _ in range(5):
    assert next(batches)["input_ids"].shape == (8, 1024, 6)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    path = tmp_path / "tokens"
    with open(path, "wb") as file:
        file.truncate(10**9 // 1024 * 1024 * 4)
    script = tmp_path / "start.py"
    script.write_text(code)
    for kind in ("fixed", "variable", "own"):
        result = run_script(script, path, kind)
        assert result.returncode == 0, result.stderr[-2000:]
        assert float(result.stdout.split()[-1]) < 100, f"{kind}: {result.stdout} MB for 4 GB of tokens"


@pytest.mark.parametrize("as_dataset", [False, True])
def test_rows_hold_the_tokens_of_their_blocks(as_dataset):
    blocks = make_blocks(40)
    source = datasets.Dataset.from_list(blocks) if as_dataset else blocks
    plan = plan_for_steps(40, PhaseSchedule(8, 0.5, 3), rows_per_step=2, seed=1)
    rows = PlannedRows(source, plan, ["input_ids"])
    assert len(rows) == 16
    superposed, recovery = read_all(plan)
    for i in range(8):
        expected = [token for block in superposed[3 * i : 3 * i + 3] for token in blocks[block]["input_ids"]]
        assert rows[i].superposed
        assert list(rows[i].columns["input_ids"]) == expected
    for i in range(8, 16):
        assert not rows[i].superposed
        assert list(rows[i].columns["input_ids"]) == blocks[recovery[i - 8]]["input_ids"]


def read_stream(rows, step=0, rank=0):
    """Rows of a rank from a step on, as a loader asks for them."""
    layout = rows.layout
    steps = range(step, rows.schedule.max_steps)
    batches = [batch for k in steps for batch in layout.rows(k, rank).tolist()]
    return [row for batch in batches for row in rows.__getitems__(batch)]


def test_a_stream_keeps_its_order_and_starts_again_with_a_warning(caplog):
    blocks = [{"input_ids": [i, 50]} for i in range(10)]
    rows = read_stream(StreamedRows(blocks, PhaseSchedule(6, 0.5, 3), BatchLayout(1)))
    assert [row.superposed for row in rows] == [True] * 3 + [False] * 3
    assert [list(row.columns["input_ids"][::2]) for row in rows] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9],
        [0],
        [1],
    ]
    with pytest.raises(ValueError, match="empty"):
        read_stream(StreamedRows([], PhaseSchedule(6, 0.5, 3), BatchLayout(1)))
    unequal = [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}]
    with pytest.raises(ValueError, match="equal length"):
        read_stream(StreamedRows(unequal, PhaseSchedule(6, 0, 3), BatchLayout(1)))


@pytest.mark.parametrize("shards", [1, 3])
def test_each_pass_over_a_shuffled_stream_has_its_own_order(shards):
    """The one that `datasets` gives that epoch."""

    def stream(data_pass=0):
        blocks = datasets.Dataset.from_list([{"input_ids": [i, i]} for i in range(30)])
        shuffled = blocks.to_iterable_dataset(shards).shuffle(seed=1, buffer_size=10)
        shuffled.set_epoch(data_pass)
        return shuffled

    given = stream()
    rows = read_stream(StreamedRows(given, PhaseSchedule(90, 0, 2), BatchLayout(1)))
    read = [row.columns["input_ids"][0] for row in rows]
    passes = [read[start : start + 30] for start in (0, 30, 60)]
    assert passes == [[row["input_ids"][0] for row in stream(data_pass)] for data_pass in range(3)]
    assert len(set(map(tuple, passes))) == 3
    assert [row["input_ids"][0] for row in given] == passes[0]  # the user's own object stands where it stood


@pytest.mark.parametrize("kind", ["stored", "skip", "joined"])
def test_readers_of_one_stream_have_positions_of_their_own(kind):
    whole = datasets.Dataset.from_list([{"input_ids": [i, i]} for i in range(90)]).to_iterable_dataset(30)
    joined = datasets.concatenate_datasets([whole.take(30), whole.skip(30)])
    stream = {"stored": whole, "skip": whole.skip(30), "joined": joined}[kind]
    first = open_stream(stream, 0, 1, 0)
    rows = iter(first)
    for _ in range(20):
        next(rows)
    other = iter(open_stream(stream, 0, 1, 0))
    for _ in range(6):
        next(other)
    for _ in range(20):
        next(rows)
    resumed = open_stream(stream, 0, 1, 0)
    resumed.load_state_dict(first.state_dict())
    assert [*resumed] == [*rows]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["skip", "take", "joined"])
def test_skip_and_take_count_the_rows_of_the_whole_stream(kind, world_size):
    """Where `datasets` divides it, each share leaves out a part of the number, so rows held out for evaluation would be trained on."""

    def stream():
        whole = datasets.Dataset.from_list([{"input_ids": [i, i]} for i in range(90)]).to_iterable_dataset(4)
        first, others = whole.take(30), whole.skip(30)
        return {"skip": others, "take": first, "joined": datasets.concatenate_datasets([first, others])}[kind]

    schedule, layout = PhaseSchedule(4, 0.5, 3), BatchLayout(2, world_size=world_size)
    ranks = [read_stream(StreamedRows(stream(), schedule, layout), rank=rank) for rank in range(world_size)]
    read = {int(token) for rows in ranks for row in rows for token in row.columns["input_ids"]}
    given = [row["input_ids"][0] for row in stream()][: schedule.amount_read(4, layout.rows_per_step)]
    assert read == set(given)
    with pytest.raises(TSTError, match="cannot be divided"):
        StreamedRows(stream(), schedule, layout, workers=2)


@pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow"])
def test_a_stream_is_read_in_any_format(form):
    blocks = datasets.Dataset.from_list([{"input_ids": [i, i]} for i in range(10)])
    stream = blocks.to_iterable_dataset().with_format(form)
    rows = read_stream(StreamedRows(stream, PhaseSchedule(4, 0.5, 2), BatchLayout(1)))
    assert [list(map(int, row.columns["input_ids"])) for row in rows] == [
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [4, 4],
        [5, 5],
    ]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_state_behind_a_step_leads_on_from_there(rank, shards):
    """Although the rows of the other rank come in between, where the stream is not split; nothing is read twice."""
    schedule, layout = PhaseSchedule(4, 0.5, 2), BatchLayout(2, accumulation_steps=2, world_size=2)
    read = []

    def note(block):
        read.append(block)
        return block

    def make_rows():
        blocks = datasets.Dataset.from_list([{"input_ids": [i, i]} for i in range(60)])
        return StreamedRows(blocks.to_iterable_dataset(shards).map(note), schedule, layout)

    whole = read_stream(make_rows(), rank=rank)
    assert len(whole) == 16
    tokens = [list(row.columns["input_ids"]) for row in whole]
    for step in range(1, 4):
        again = make_rows()
        state = whole[4 * step - 1].stream_state
        again.load_states(step, {state.reader: state.values})
        read.clear()
        assert [list(row.columns["input_ids"]) for row in read_stream(again, step, rank)] == tokens[
            4 * step :
        ]
        assert len(read) == (schedule.amount_read(4, 8) - schedule.amount_read(step, 8)) // shards


def test_the_sampler_starts_where_training_is():
    def rows(step):
        return list(EpochSampler(10, rows_per_step=2, steps_per_epoch=4, current_step=lambda: step))

    assert rows(0) == list(range(8))
    assert rows(5) == list(range(10, 16))
    assert rows(8) == list(range(16, 20))


FULL = {"input_ids": [1, 2]}


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"text": "abc"}], "input_ids"),
        ([FULL] * 700 + [{"input_ids": [1]}] + [FULL] * 2, "block 700 has 1"),
        ([FULL | {"attention_mask": [1, 0]}], "Block 0 .* is padded"),
        ([{"input_ids": [96, 96]}], "padding token 96"),
        ([{"input_ids": [1, 100]}], "Block 0 .* holds the id 100, but the model has embeddings for 0 to 99"),
        ([{"input_ids": [1, -1]}], "Block 0 .* holds the id -1"),
        ([FULL | {"labels": [1]}], "2 input_ids and 1 labels"),
        ([{"input_ids": []}], "Block 0 .* holds no token"),
        ([{"input_ids": [[1, 2]]}], r"one row of whole numbers, but they are of shape \(1, 2\)"),
        ([{"input_ids": [1.0, 2.0]}], "one row of whole numbers, but they are .* float"),
        ([{"input_ids": "ab"}], r"one row of whole numbers, but they are of shape \(\) and type <U2"),
    ],
)
def test_data_that_is_no_blocks_is_refused(rows, message, as_dataset):
    if as_dataset:
        rows = datasets.Dataset.from_list(rows)
    with pytest.raises(ValueError, match=message):
        check_blocks(rows, BlockRules(pad_token_id=96, vocab_size=100))


class Blocks(torch.utils.data.Dataset):
    """A map-style data set of which nothing but single blocks can be looked at."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        return self.blocks[index]


BAD_BLOCKS = [
    ({"input_ids": [5] * (BLOCK_LENGTH - 1)}, "block 303 has 11"),
    ({"input_ids": [5] * BLOCK_LENGTH, "attention_mask": [1] * 11 + [0]}, "Block 303 .* is padded"),
    ({"input_ids": [5] * 10 + [96] * 2}, "Block 303 .* ends in the padding token 96"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_BLOCKS)
@pytest.mark.parametrize("source", [Blocks, datasets.Dataset.from_list])
def test_a_bad_block_that_was_not_looked_at_is_found_when_it_is_read(bad, message, source):
    full = {"input_ids": [5] * BLOCK_LENGTH} | (
        {"attention_mask": [1] * 12} if "attention_mask" in bad else {}
    )
    blocks = source([full] * 303 + [bad] + [full] * 600)
    rules = BlockRules(BLOCK_LENGTH, pad_token_id=96)
    plan = DataPlan(904, PhaseSchedule(226, 1, 4), rows_per_step=1, seed=0, shuffle=False)
    rows = PlannedRows(blocks, plan, list(full), rules=rules)
    if source is Blocks:
        check_blocks(blocks, BlockRules(pad_token_id=96))
    if source is Blocks or "has 11" not in message:  # stored lengths of a table are all looked at
        assert len(rows[74].columns["input_ids"]) == len(rows[76].columns["input_ids"]) == 4 * BLOCK_LENGTH
    with pytest.raises(ValueError, match=message):
        rows[75]


@pytest.mark.parametrize(("bad", "message"), BAD_BLOCKS)
def test_a_bad_block_of_a_stream_is_found_when_it_is_read(bad, message):
    full = {"input_ids": [5] * BLOCK_LENGTH}
    rows = StreamedRows(
        [full] * 303 + [bad], PhaseSchedule(200, 1, 4), BatchLayout(1), rules=BlockRules(pad_token_id=96)
    )
    with pytest.raises(ValueError, match=message):
        read_stream(rows)


def test_the_fingerprint_of_data_counts_its_blocks():
    """Where all blocks are equal, those that are looked at do not tell more blocks from fewer."""
    few, many = ([{"input_ids": [1, 2, 3]}] * count for count in (300, 301))
    assert check_blocks(few).data != check_blocks(many).data
    assert check_blocks(few).data == check_blocks(list(few)).data


@pytest.mark.parametrize("split_by_rank", [False, True])
def test_another_number_of_processes_is_refused_where_each_has_its_own_shards(split_by_rank):
    saved = DataPosition(
        step=2, **vars(PhaseSchedule(10, 0.3, 4)), **vars(BatchLayout(2, 2, 1)), **vars(BlockFacts(None, 12, "stream")),
        offset_weighting="uniform", input_weighting="uniform", document_boundaries="ignore", seed=1, shuffle=False,
        split_by_rank=split_by_rank, stream_workers=0,
    )  # fmt: skip
    now = replace(saved, **vars(BatchLayout(2, 1, 2)))
    if split_by_rank:
        with pytest.raises(TSTError):
            saved.check_resumable(now)
    else:
        saved.check_resumable(now)
