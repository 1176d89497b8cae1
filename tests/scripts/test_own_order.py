"""The order of the data where a script decides it: own samplers and streams on resume, passes and epochs, `ignore_data_skip`."""

import random

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from conftest import make_model
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler
from transformers import TrainerCallback, default_data_collator

from hf_tst import DataCollatorForTokenSuperposition, PhaseSchedule, TSTError, TSTTrainer
from hf_tst.batches.folded_batches import FoldedBatches
from hf_tst.batches.rows import EpochSampler

LENGTH = 12
# Block i holds the token i alone, so that a batch says which blocks it reads.
BLOCKS = [{"input_ids": [i] * LENGTH, "labels": [i] * LENGTH} for i in range(60)]


class Reads(TSTTrainer):
    """Notes the blocks of each micro-batch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.read = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.read.append(inputs["input_ids"].flatten()[::LENGTH].tolist())
        return super().training_step(model, inputs, num_items_in_batch)


class Subset(Reads):
    """A sampler that draws its order from torch's global generator."""

    def _get_train_sampler(self, dataset=None):
        return SubsetRandomSampler(range(len(BLOCKS)))


class Draws(IterableDataset):
    """A stream that draws its order from a global generator: at its beginning, or block by block."""

    def __init__(self, kind):
        self.kind = kind

    def __iter__(self):
        order = [*range(len(BLOCKS))]
        if self.kind == "random":
            random.shuffle(order)
        for place in range(len(order)):
            if self.kind == "numpy, one by one":
                swapped = np.random.randint(place, len(order))
                order[place], order[swapped] = order[swapped], order[place]
            yield BLOCKS[order[place]]


class OwnLoader(Reads):
    """A loader over a stream that draws one by one."""

    def get_train_dataloader(self):
        return DataLoader(Draws("numpy, one by one"), batch_size=2, collate_fn=default_data_collator)


ORDERS = {
    "sampler": (Subset, BLOCKS),
    "stream": (Reads, Draws("random")),
    "stream, one by one": (Reads, Draws("numpy, one by one")),
    "loader": (OwnLoader, BLOCKS),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_an_order_drawn_from_global_random_numbers_is_resumed(kind, make_args):
    kind, data = ORDERS[kind]
    args = make_args(tst_phase_ratio=0.5, max_steps=8, save_strategy="steps", save_steps=6)

    def run(resume):
        random.seed(7 + bool(resume)), np.random.seed(7 + bool(resume))
        model = make_model("llama", attention_dropout=0.1)  # draws in each step
        trainer = kind(model, args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.read

    whole = run(None)
    assert len({block for blocks in whole for block in blocks}) > 30
    assert run(f"{args.output_dir}/checkpoint-6") == whole[6:]


class OneBuffer(Dataset):
    """Rows, or batches of one row, that are all made in the same memory."""

    def __init__(self, form, shape):
        ids = torch.zeros(shape, dtype=torch.long)
        self.row = dict.fromkeys(("input_ids", "labels"), ids if form == "torch" else ids.numpy())

    def __len__(self):
        return len(BLOCKS)

    def __getitem__(self, index):
        self.row["input_ids"][...] = index
        return self.row


class StreamOfOneBuffer(OneBuffer, IterableDataset):
    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


class LoaderOfOneBuffer(Reads):
    def get_train_dataloader(self):
        return self.train_dataset


@pytest.mark.parametrize(
    ("kind", "form"),
    [("rows", "torch"), ("rows", "numpy"), ("stream", "torch"), ("stream", "numpy"), ("loader", "torch")],
)
def test_rows_that_are_made_in_the_same_memory_stay_what_they_were(kind, form, make_args):
    """Plain training with one row per batch uses each before the next one is made; a row of bags joins several."""
    shape = (1, LENGTH) if kind == "loader" else (LENGTH,)
    data = (OneBuffer if kind == "rows" else StreamOfOneBuffer)(form, shape)
    args = make_args(
        tst_phase_ratio=0.5, max_steps=8, per_device_train_batch_size=1, train_sampling_strategy="sequential"
    )
    cls = LoaderOfOneBuffer if kind == "loader" else Reads
    trainer = cls(make_model("llama"), args, train_dataset=data)
    trainer.train()
    assert [block for blocks in trainer.read for block in blocks] == [*range(4 * args.tst_bag_size + 4)]


@pytest.mark.parametrize("seed", [None, 3])
def test_a_shuffled_stream_resumes_in_its_order_or_is_refused(seed, make_args):
    """Without a seed, `datasets` draws another order in each process."""
    args = make_args(max_steps=8, save_strategy="steps", save_steps=6)

    def run(resume):
        stream = datasets.Dataset.from_list(BLOCKS).to_iterable_dataset(4).map(lambda row: row)
        trainer = Reads(make_model("llama"), args, train_dataset=stream.shuffle(seed=seed, buffer_size=20))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.read

    whole = run(None)
    if seed is not None:
        assert run(f"{args.output_dir}/checkpoint-6") == whole[6:]
    else:
        with pytest.raises(TSTError, match=r"order \w+ and is .*needs its own seed"):
            run(f"{args.output_dir}/checkpoint-6")


def test_random_numbers_of_the_data_are_not_those_of_training(make_args):
    """A sampler that draws more does not change dropout."""

    def run(stream):
        model = make_model("llama", attention_dropout=0.1)
        args = make_args(tst_phase_ratio=0.5, train_sampling_strategy="sequential")
        trainer = Reads(model, args, train_dataset=stream)
        trainer.train()
        return trainer.state.log_history[-1]["train_loss"]

    class Wastes(Draws):
        def __iter__(self):
            for block in BLOCKS:
                torch.rand(3), random.random()
                yield block

    assert run(Wastes("")) == run(Draws("in order"))


class Seeks(IterableDataset):
    """A stream that begins at a cursor of its own."""

    def __init__(self, cursor):
        self.cursor = cursor

    def __iter__(self):
        return iter(BLOCKS[self.cursor :])


class SeeksByItself(Reads):
    cursor = 0

    def get_train_dataloader(self):
        return DataLoader(Seeks(self.cursor), batch_size=2, collate_fn=default_data_collator)


@pytest.mark.parametrize("kind", ["loader", "stream", "data set"])
def test_data_that_seeks_by_itself_is_not_skipped_again(kind, make_args):
    def run(cursor, resume=None, **options):
        args = make_args(
            tst_phase_ratio=0.5, max_steps=8, save_strategy="steps", save_steps=4, tst_bag_size=4, **options
        )
        stream = datasets.Dataset.from_list(BLOCKS).to_iterable_dataset()
        rows = (stream.skip(cursor) if cursor else stream) if kind == "data set" else Seeks(cursor)
        trainer = (SeeksByItself if kind == "loader" else Reads)(
            make_model("llama"), args, train_dataset=rows
        )
        trainer.cursor = cursor
        trainer.train(resume_from_checkpoint=resume and f"{args.output_dir}/checkpoint-4")
        return trainer.read

    whole = run(0)
    assert [block for blocks in whole for block in blocks] == [*range(40)]
    assert run(32, resume=True, ignore_data_skip=True) == whole[4:]
    if kind == "data set":
        with pytest.raises(TSTError, match="position in the stream does not fit this stream"):
            run(32, resume=True)


def test_trainer_and_callbacks_reach_the_data_set_behind_the_loader(make_args):
    class Stages(torch.utils.data.Dataset):
        stage, epochs = 0, ()

        def __len__(self):
            return len(BLOCKS)

        def __getitem__(self, index):
            return BLOCKS[index]

        def set_stage(self, stage):
            self.stage = stage

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    class Curriculum(TrainerCallback):
        def on_step_begin(self, args, state, control, train_dataloader=None, **kwargs):
            train_dataloader.dataset.set_stage(state.global_step)

    data = Stages()
    args = make_args(tst_phase_ratio=0.3, max_steps=-1, num_train_epochs=2)
    TSTTrainer(make_model("llama"), args, train_dataset=data, callbacks=[Curriculum()]).train()
    assert data.stage > 5
    assert sorted({*data.epochs}) == [0, 1]


class ByEpoch:
    """A batch sampler whose order follows from the epoch that it is told."""

    batch_size, drop_last, epoch = 1, True, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 8

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter([[i] for i in torch.randperm(8, generator=generator).tolist()])


def test_a_batch_sampler_that_accelerate_has_wrapped_is_told_the_pass():
    """As with two processes: this one gets every other batch."""
    sampler = ByEpoch()
    shard = BatchSamplerShard(sampler, num_processes=2, process_index=0)
    loader = DataLoaderShard(BLOCKS, batch_sampler=shard, collate_fn=default_data_collator)
    rows = FoldedBatches(
        loader,
        DataCollatorForTokenSuperposition(4),
        PhaseSchedule(12, 0.0, 4),
        EpochSampler(12, 1, 12, lambda: 0),
    )
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += [batch[0] for batch in list(sampler)[::2]]
    assert [batch["input_ids"][0, 0].item() for batch in rows] == expected


def test_epochs_of_an_own_loader_are_as_long_as_in_trainer(make_args):
    class OwnSampler(TSTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SubsetRandomSampler(range(16))

    ends = []

    class Ends(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            ends.append(state.global_step)

    args = make_args(tst_phase_ratio=0.5, max_steps=20, gradient_accumulation_steps=2)
    trainer = OwnSampler(make_model("llama"), args, train_dataset=BLOCKS, callbacks=[Ends()])
    trainer.train()
    assert ends == [4, 8, 12, 16, 20]  # eight batches of two, two to a step
    assert trainer.state.epoch == 5


def test_a_second_train_is_warned_of(make_args, caplog):
    trainer = TSTTrainer(make_model("llama"), make_args(tst_phase_ratio=0.5), train_dataset=BLOCKS)
    for warns in (False, True):
        trainer.train()
        assert ("begins with superposition again" in caplog.text) == warns
