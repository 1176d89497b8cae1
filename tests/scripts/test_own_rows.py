"""Training data of other kinds than rows with columns: rows that are only ids, of several lengths, drawn at random."""

import datasets
import numpy as np
import pytest
import torch
from conftest import losses, make_blocks, make_model, weights_equal
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import default_data_collator

from hf_tst import TSTError, TSTTrainer, pack_blocks

BLOCKS = make_blocks(100)
IDS = [block["input_ids"] for block in BLOCKS]
ALONE = {
    "tensors": [torch.tensor(ids) for ids in IDS],
    "arrays": [np.array(ids) for ids in IDS],
    "tuples": [tuple(ids) for ids in IDS],
    "lists": IDS,
    "one tensor": torch.tensor(IDS),
    "TensorDataset": TensorDataset(torch.tensor(IDS)),
}


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def train(args, rows, **options):
    trainer = TSTTrainer(make_model("llama"), args, train_dataset=rows, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def of_columns():
    """The run over the same blocks with columns, by what it runs with; each is trained once."""
    return {}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("kind", ALONE)
def test_rows_of_ids_alone_train_as_rows_with_columns_do(kind, ratio, streamed, of_columns, make_args):
    args, make = make_args(tst_phase_ratio=ratio), Stream if streamed else lambda rows: rows
    if (ratio, streamed) not in of_columns:
        of_columns[ratio, streamed] = train(args, make(BLOCKS))
    expected, rows = of_columns[ratio, streamed], ALONE[kind]
    trainer = train(args, make(rows))
    assert weights_equal(trainer.model, expected.model)
    assert trainer.evaluate(rows)["eval_loss"] == expected.evaluate(BLOCKS)["eval_loss"]
    assert (trainer.predict(rows).predictions == expected.predict(BLOCKS).predictions).all()


@pytest.mark.parametrize("streamed", [False, True])
def test_an_own_collator_gets_the_rows_as_they_are(streamed, make_args):
    def stack(rows):
        return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    rows = ALONE["tensors"]
    own, ours = (
        train(make_args(tst_phase_ratio=0.5), Stream(rows) if streamed else rows, data_collator=collator)
        for collator in (stack, None)
    )
    assert losses(own) == losses(ours)


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_of_several_lengths_are_refused_with_the_call_that_packs_them(streamed, make_args):
    rows = [ids[: 4 + i % 9] for i, ids in enumerate(IDS)]
    args = make_args(tst_phase_ratio=0.5, max_steps=2)
    with pytest.raises(TSTError, match=r"pack the rows with hf_tst\.pack_blocks\(dataset, block_size\)"):
        train(args, Stream(rows) if streamed else rows)
    packed = pack_blocks(datasets.Dataset.from_dict({"input_ids": rows}), block_size=12)
    assert train(args, packed).state.global_step == 2


class OwnBatches(TSTTrainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=2)


@pytest.mark.parametrize("kind", ["rows", "stream", "collator", "loader"])
def test_labels_that_are_shifted_already_are_refused(kind, make_args):
    """As a loop reads them, which leaves the shift to the data: `x = data[i : i + L]`, `y = data[i + 1 : i + 1 + L]`."""
    text = np.concatenate(IDS)
    starts = range(0, len(text) - 12, 12)
    rows = [{"input_ids": text[i : i + 12], "labels": text[i + 1 : i + 13].copy()} for i in starts]
    rows[0]["labels"][:5] = -100
    args = make_args(tst_phase_ratio=0.5, max_steps=2)
    trainer = (OwnBatches if kind == "loader" else TSTTrainer)(
        make_model("llama"), args, train_dataset=Stream(rows) if kind == "stream" else rows
    )
    if kind == "collator":
        trainer.train_dataset = IDS
        trainer.data_collator = lambda ids: default_data_collator(
            [{"input_ids": row, "labels": [*row[1:], 0]} for row in ids]
        )
    with pytest.raises(TSTError, match=r"labels that are its tokens shifted by one"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_windows_drawn_at_random_without_a_seed_resume_with_the_option_that_the_refusal_names(make_args):
    class Windows(torch.utils.data.Dataset):
        def __init__(self):
            self.text, self.draws = np.concatenate(IDS), np.random.default_rng()

        def __len__(self):
            return 100

        def __getitem__(self, index):
            start = int(self.draws.integers(len(self.text) - 12))
            return torch.from_numpy(self.text[start : start + 12])

    def run(resume=None, **options):
        args = make_args(tst_phase_ratio=0.5, save_strategy="steps", save_steps=4, **options)
        trainer = TSTTrainer(make_model("llama"), args, train_dataset=Windows())
        trainer.train(resume and f"{args.output_dir}/checkpoint-4")
        return trainer.state.global_step

    run()
    with pytest.raises(TSTError, match=r"at random needs its own seed.*or set tst_allow_data_change=True"):
        run(resume=True)
    assert run(resume=True, tst_allow_data_change=True) == 10
