"""Bags, targets, positions and attention inside documents, against a naive loop and against each document alone."""

import copy
import math

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY, VOCAB_SIZE, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from hf_tst import (
    DataCollatorForTokenSuperposition,
    TSTTrainer,
    fused_next_token_loss,
    token_superposition,
)
from hf_tst.bags.folding import (
    average_embeddings,
    document_bags,
    document_starts,
    document_windows,
    fold_into_bags,
    next_bag_labels,
)
from hf_tst.data.token_file import TokenFile
from hf_tst.errors import TSTError
from hf_tst.models.probes import check_document_attention

EOS = VOCAB_SIZE - 1


def naive_bags(tokens, bag_size):
    """Bags of one row, their targets and positions, document by document."""
    documents, current = [], []
    for token in tokens:
        current.append(token)
        if token == EOS:
            documents.append(current)
            current = []
    documents += [current] if current else []
    bags, labels, positions = [], [], []
    for document in documents:
        cut = [document[i : i + bag_size] for i in range(0, len(document), bag_size)]
        cut = [bag + [-100] * (bag_size - len(bag)) for bag in cut]
        bags += cut
        labels += [*cut[1:], [-100] * bag_size]
        positions += range(len(cut))
    count = len(tokens) // bag_size
    labels = labels[:count]
    labels[-1] = [-100] * bag_size  # what would come after the row is not in it
    return bags[:count], labels, positions[:count]


@given(
    st.integers(2, 5).flatmap(
        lambda s: st.tuples(
            st.just(s),
            st.integers(1, 6).flatmap(
                lambda n: st.lists(st.sampled_from([1, 2, 3, 4, EOS]), min_size=n * s, max_size=n * s)
            ),
        )
    )
)
@settings(deadline=None, max_examples=200)
def test_bags_end_where_documents_end(case):
    bag_size, tokens = case
    row = torch.tensor([tokens])
    starts = document_starts(row[:, :-1] == EOS)
    found = document_bags(row, row, starts, bag_size)
    assert [part[0].tolist() for part in found] == list(naive_bags(tokens, bag_size))
    left_out = len(tokens) - int((found[0] >= 0).sum())
    assert left_out == int((found[0] < 0).sum())


def test_without_an_end_in_the_row_bags_are_the_ordinary_ones():
    row = torch.arange(24).view(2, 12)
    bags, labels, positions = document_bags(row, row, document_starts(row[:, :-1] == EOS), 3)
    assert torch.equal(bags, fold_into_bags(row, 3))
    assert torch.equal(labels, next_bag_labels(fold_into_bags(row, 3)))
    assert positions.tolist() == [[0, 1, 2, 3]] * 2


def test_windows_stay_inside_documents():
    row = torch.tensor([[1, 2, EOS, 3, 4, 5]])
    windows = document_windows(row, document_starts(row[:, :-1] == EOS), 2)
    assert windows.tolist() == [
        [[2, EOS], [EOS, -100], [-100, -100], [4, 5], [5, -100], [-100, -100]],
    ]


def test_the_collator_gives_the_tensors_of_its_docstring():
    row = {"input_ids": [1, 2, 3, EOS, 4, EOS, 5, 6], "attention_mask": [1] * 8}
    collate = DataCollatorForTokenSuperposition(2, document_boundaries="respect", eos_token_id=EOS)
    batch = collate([row])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[[1, 2], [3, EOS], [4, EOS], [5, 6]]]
    assert batch["labels"].tolist() == [[[3, EOS], [-100] * 2, [-100] * 2, [-100] * 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0]]
    recovery = DataCollatorForTokenSuperposition(1, document_boundaries="respect", eos_token_id=EOS)([row])
    assert recovery["labels"].tolist() == [[-100, 2, 3, EOS, -100, EOS, -100, 6]]
    assert recovery["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert "attention_mask" not in recovery
    output = DataCollatorForTokenSuperposition(
        2, mode="output", document_boundaries="respect", eos_token_id=EOS
    )([row])
    assert output["input_ids"].tolist() == [row["input_ids"]]
    assert output["position_ids"].tolist() == recovery["position_ids"].tolist()


@pytest.mark.parametrize("column", ["document_ids", "position_ids"])
def test_columns_say_where_documents_end_before_tokens_do(column):
    values = {"document_ids": [7, 7, 7, 9, 9, 9], "position_ids": [4, 5, 6, 0, 1, 2]}[column]
    row = {"input_ids": [1, EOS, 3, 4, 5, 6], column: values}
    collate = DataCollatorForTokenSuperposition(2, document_boundaries="respect", eos_token_id=EOS)
    assert collate([row])["input_ids"].tolist() == [[[1, EOS], [3, -100], [4, 5]]]


def test_without_a_word_on_documents_it_is_refused():
    with pytest.raises(ValueError, match="Nothing says where documents end"):
        DataCollatorForTokenSuperposition(2, document_boundaries="respect")([{"input_ids": [1, 2]}])
    with pytest.raises(ValueError, match="document_boundaries must be one of"):
        DataCollatorForTokenSuperposition(2, document_boundaries="maybe")


# The average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_bags_are_averaged_over_what_they_hold(dtype):
    embedding = torch.nn.Embedding(50, 8, dtype=dtype)
    bags = torch.tensor([[[1, 2, 3], [4, -100, -100], [5, 6, -100]]])
    mean = average_embeddings(embedding(bags.clamp_min(0).flatten(1)), bags, has_short_bags=True)
    for found, ids in zip(mean[0], ([1, 2, 3], [4], [5, 6]), strict=True):
        torch.testing.assert_close(found, embedding.weight[ids].float().mean(0).to(dtype))
    mean.float().sum().backward()
    used = embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert used == [1, 2, 3, 4, 5, 6]  # token 0 stands in for empty places, and learns nothing from it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bag_size", [2, 3, 6, 16])
def test_full_bags_have_exactly_the_ordinary_average(dtype, bag_size):
    embedding = torch.nn.Embedding(50, 8, dtype=dtype)
    bags = torch.randint(0, 50, (2, 5, bag_size))
    embedded = embedding(bags.flatten(1))
    assert torch.equal(
        average_embeddings(embedded, bags, has_short_bags=True), average_embeddings(embedded, bags)
    )


# Attention


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("bag_size", [1, 3])
def test_each_document_has_the_logits_of_itself_alone(model_type, attention, bag_size):
    model = make_model(model_type, attn_implementation=attention, use_cache=False).eval()
    assert model.config._attn_implementation == attention
    generator = torch.Generator().manual_seed(0)
    # Where bags are cut, the last of three is short.
    rows, pieces = [], []
    for lengths in ([3, 5, 4, 12], [12, 1, 1, 10]):
        pieces.append(
            [[*torch.randint(0, EOS, (n - 1,), generator=generator).tolist(), EOS] for n in lengths]
        )
        rows.append({"input_ids": [token for piece in pieces[-1] for token in piece]})
    collate = DataCollatorForTokenSuperposition(bag_size, document_boundaries="respect", eos_token_id=EOS)

    def logits(rows):
        batch = collate(rows)
        del batch["labels"]
        with torch.no_grad():
            if bag_size == 1:
                return model(**batch).logits
            with token_superposition(model, bag_size, document_boundaries="respect"):
                return model(**batch).logits

    together = logits(rows)
    for row, documents in enumerate(pieces):
        start = 0
        for document in documents:
            whole = math.ceil(len(document) / bag_size)
            room = [*document, *[EOS] * (whole * bag_size - len(document))]  # empty documents fill the row
            alone = logits([{"input_ids": room}])[0, :whole]
            kept = together[row, start : start + whole]
            torch.testing.assert_close(kept, alone[: len(kept)], atol=1e-5, rtol=1e-4)
            start += whole


@pytest.mark.parametrize("model_type", TINY)
def test_models_that_keep_attention_inside_documents_pass_the_check(model_type):
    model = make_model(model_type, use_cache=False).train()
    state = torch.get_rng_state()
    check_document_attention(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def recurrent_model():
    """It mixes positions whatever their numbers."""
    from transformers import AutoModelForCausalLM, RecurrentGemmaConfig

    return AutoModelForCausalLM.from_config(
        RecurrentGemmaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, lru_width=16,
            intermediate_size=32, attention_window_size=16, eos_token_id=EOS, pad_token_id=None,
        )
    )  # fmt: skip


def test_models_that_do_not_are_refused():
    from transformers import AutoModelForCausalLM, BloomConfig

    with pytest.raises(ValueError, match="takes no position_ids"):
        check_document_attention(
            AutoModelForCausalLM.from_config(
                BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=1, n_head=2)
            )
        )
    with pytest.raises(ValueError, match="keeps attention inside documents, but RecurrentGemma"):
        check_document_attention(recurrent_model())
    # A cache would hide from Transformers that the row is packed, but training and this check switch it off.
    check_document_attention(make_model("llama", use_cache=True))


# Training


def packed(count=200, length=12, seed=0):
    """Blocks of documents of up to eight tokens, which end in EOS."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, EOS, size=count * length)
    tokens[np.cumsum(generator.integers(1, 9, size=count * 4))[: count * 2] % tokens.size] = EOS
    return [{"input_ids": row.tolist()} for row in tokens.reshape(count, length)]


@pytest.fixture
def speaking_llama(llama):
    llama.config.eos_token_id = EOS
    return llama


def respect(**options):
    return {"tst_document_boundaries": "respect"} | options


class Batches(TrainerCallback):
    def __init__(self, model):
        self.train, self.evaluate = [], []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        (self.train if module.training else self.evaluate).append(dict(kwargs))


def test_both_phases_respect_documents_and_evaluation_does_not(speaking_llama, make_args):
    batches = Batches(speaking_llama)
    trainer = TSTTrainer(
        speaking_llama,
        make_args(**respect()),
        train_dataset=packed(),
        eval_dataset=packed(4),
        callbacks=[batches],
    )
    trainer.train()
    trainer.evaluate()
    assert [batch["input_ids"].dim() for batch in batches.train] == [3] * 3 + [2] * 7
    for batch in batches.train:
        assert batch.get("attention_mask") is None
        ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
        assert positions.shape == ids.shape[:2]
        firsts = positions == 0
        if ids.dim() == 3:
            ends = (ids == EOS).any(-1)
            assert (labels[ends] == -100).all()
            full = ids[..., -1] >= 0
            assert (full | ends)[:, :-1].all()
        else:
            ends = ids == EOS
            assert (labels[firsts] == -100).all()
            assert (labels[~firsts] == ids[~firsts]).all()
        assert torch.equal(firsts[:, 1:], ends[:, :-1])
        assert firsts[:, 0].all()
    # The check before the first step is in evaluation mode, with rows of eight.
    ordinary = [batch for batch in batches.evaluate if batch["input_ids"].shape[1] == 12]
    assert ordinary
    assert all(batch.get("position_ids") is None for batch in ordinary)
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in ordinary)


def without_ends(**columns):
    return [{"input_ids": [i % (EOS - 1)] * 12, **columns} for i in range(400)]


def as_token_file(blocks):
    np.save("ids.npy", np.array([block["input_ids"] for block in blocks], dtype=np.uint16).ravel())
    return TokenFile("ids.npy").cut(12)


ONE_END = [*without_ends()[:-1], {"input_ids": [1] * 11 + [EOS]}]


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        (without_ends(), True),
        (datasets.Dataset.from_list(without_ends()), True),
        (as_token_file, True),
        (ONE_END, False),
        (without_ends(document_ids=[0] * 12), False),
        (without_ends(position_ids=[*range(12)]), False),
    ],
)
def test_data_that_does_not_say_where_documents_end_is_told(speaking_llama, make_args, caplog, blocks, told):
    blocks = blocks(without_ends()) if callable(blocks) else blocks
    caplog.set_level("WARNING")
    TSTTrainer(speaking_llama, make_args(max_steps=4), train_dataset=blocks).train()
    assert "keep nothing apart" not in caplog.text
    TSTTrainer(speaking_llama, make_args(**respect(max_steps=4)), train_dataset=blocks).train()
    assert (
        f"none of 256 blocks, spread over the training data, holds the token {EOS} that" in caplog.text
    ) == told


def test_the_end_token_is_that_of_the_users_collator(speaking_llama, make_args, caplog):
    collator = DataCollatorForTokenSuperposition(1, document_boundaries="respect", eos_token_id=0)
    caplog.set_level("WARNING")
    TSTTrainer(
        speaking_llama, make_args(**respect(max_steps=4)), collator, train_dataset=without_ends()
    ).train()
    assert "keep nothing apart" not in caplog.text


@pytest.mark.parametrize("eos_token_id", [EOS, None])  # without one, that of the model
def test_evaluation_respects_documents_if_the_users_collator_does(speaking_llama, make_args, eos_token_id):
    collator = DataCollatorForTokenSuperposition(1, document_boundaries="respect", eos_token_id=eos_token_id)
    batches = Batches(speaking_llama)
    trainer = TSTTrainer(
        speaking_llama, make_args(**respect(max_steps=4)), collator, train_dataset=packed(),
        eval_dataset=packed(4), callbacks=[batches],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    assert batches.evaluate[-1]["position_ids"].max() < 12
    assert (batches.evaluate[-1]["position_ids"][:, 1:] == 0).any()


def test_tokens_left_out_are_counted_and_survive_a_resume(speaking_llama, make_args, tmp_path):
    other = copy.deepcopy(speaking_llama)
    batches = Batches(speaking_llama)
    args = make_args(**respect(save_strategy="steps", save_steps=2, gradient_accumulation_steps=2))
    trainer = TSTTrainer(speaking_llama, args, train_dataset=packed(), callbacks=[batches])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    read = held = 0
    for step, entry in enumerate(entries):
        for batch in batches.train[2 * step : 2 * step + 2]:
            read += batch["input_ids"].numel()
            held += int((batch["input_ids"] >= 0).sum())
        assert entry["tst_raw_tokens"] == held
        assert entry["tst_tokens_left_out"] == read - held
    assert 0 < held < read
    again = make_args(**respect(output_dir=str(tmp_path / "again"), gradient_accumulation_steps=2))
    resumed = TSTTrainer(other, again, train_dataset=packed())
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    for key in ("loss", "tst_raw_tokens", "tst_tokens_left_out"):
        assert [e[key] for e in resumed.state.log_history if "loss" in e] == [e[key] for e in entries]


def test_tokens_left_out_by_a_beginning_that_ran_out_of_memory_are_not_counted(speaking_llama, make_args):
    class OneTooLarge(TSTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 2 and inputs["input_ids"].shape[0] > 1:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    found = []
    for kind, batch, options in ((OneTooLarge, 2, {"auto_find_batch_size": True}), (TSTTrainer, 1, {})):
        args = make_args(**respect(per_device_train_batch_size=batch, logging_steps=2, **options))
        trainer = kind(copy.deepcopy(speaking_llama), args, train_dataset=packed())
        trainer.train()
        assert trainer._train_batch_size == 1
        found.append([e["tst_tokens_left_out"] for e in trainer.state.log_history if "loss" in e])
    assert found[0] == found[1]


def test_the_loss_is_the_mean_over_targets_whatever_the_accumulation(speaking_llama, make_args):
    other = copy.deepcopy(speaking_llama)
    common = respect(optim="sgd", learning_rate=0.1, max_grad_norm=0)
    large = TSTTrainer(
        speaking_llama, make_args(per_device_train_batch_size=4, **common), train_dataset=packed()
    )
    small = TSTTrainer(
        other,
        make_args(per_device_train_batch_size=1, gradient_accumulation_steps=4, **common),
        train_dataset=packed(),
    )
    large.train()
    small.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (large, small)]
    assert losses[0][0] == pytest.approx(math.log(VOCAB_SIZE), rel=0.02)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize("mode", ["input", "output"])
def test_other_modes_train_inside_documents(speaking_llama, make_args, mode):
    trainer = TSTTrainer(speaking_llama, make_args(**respect(tst_mode=mode)), train_dataset=packed())
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), rel=0.02)
    assert all(map(math.isfinite, losses))


def test_a_column_of_document_ids_reaches_both_phases(llama, make_args):
    blocks = packed()
    rows = [block | {"document_ids": [i // 3] * 12} for i, block in enumerate(blocks)]
    batches = Batches(llama)
    args = make_args(**respect(tst_bag_size=5))
    TSTTrainer(llama, args, train_dataset=datasets.Dataset.from_list(rows), callbacks=[batches]).train()
    assert all("document_ids" not in batch for batch in batches.train)
    # Five blocks a row, of three documents at the most, which end at a block's end.
    assert all(2 <= int((batch["position_ids"] == 0).sum(1).max()) <= 3 for batch in batches.train[:3])
    assert all((batch["position_ids"] == torch.arange(12)).all() for batch in batches.train[3:])


SOURCES = {
    "list": list,
    "data set": datasets.Dataset.from_list,
    "stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["document_ids", "attention_mask"])
def test_a_column_without_values_is_none(llama, make_args, source, name):
    llama.config.eos_token_id = EOS
    blocks, read = packed(), Batches(llama)
    args = make_args(**respect())
    for rows in (blocks, [block | {name: None} for block in blocks]):
        TSTTrainer(llama, args, train_dataset=SOURCES[source](rows), callbacks=[read]).train()
    half = len(read.train) // 2
    assert half == args.max_steps
    for plain, other in zip(read.train[:half], read.train[half:], strict=True):
        for column in ("input_ids", "labels", "position_ids"):
            assert torch.equal(plain[column], other[column])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["document_ids", "attention_mask"])
def test_a_column_that_some_blocks_lack_is_refused(llama, make_args, source, name):
    blocks = [block | {name: [1] * 12 if i % 5 else None} for i, block in enumerate(packed(), 1)]
    llama.config.eos_token_id = EOS
    with pytest.raises(TSTError, match=f"of equal length|no {name}") as error:
        TSTTrainer(llama, make_args(**respect()), train_dataset=SOURCES[source](blocks)).train()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", SOURCES)
def test_documents_without_an_end_are_refused_before_anything_is_read(llama, make_args, source):
    llama.config.eos_token_id = None
    trainer = TSTTrainer(llama, make_args(**respect()), train_dataset=SOURCES[source](packed()))
    with pytest.raises(TSTError, match="Nothing says where documents end"):
        trainer.get_train_dataloader()


def test_what_cannot_respect_documents_is_refused_before_the_first_step(llama, make_args):
    steps = []
    llama.register_forward_pre_hook(lambda module, args: steps.append(module.training))
    llama.config.eos_token_id = None
    with pytest.raises(ValueError, match="Nothing says where documents end"):
        TSTTrainer(llama, make_args(**respect()), train_dataset=packed()).train()
    with pytest.raises(ValueError, match="needs a collator that keeps documents apart"):
        TSTTrainer(llama, make_args(**respect()), lambda features: features, train_dataset=packed())
    for bag_size in (1, 2):
        collator = DataCollatorForTokenSuperposition(
            bag_size, document_boundaries="respect", eos_token_id=EOS
        )
        with pytest.raises(ValueError, match="has document_boundaries='respect', but the arguments have"):
            TSTTrainer(llama, make_args(), collator, train_dataset=packed())
    with pytest.raises(ValueError, match="needs superposition, but tst_phase_ratio=0"):
        make_args(**respect(tst_phase_ratio=0))
    recurrent = recurrent_model()
    recurrent.register_forward_pre_hook(lambda module, args: steps.append(module.training))
    with pytest.raises(ValueError, match="keeps attention inside documents, but RecurrentGemma"):
        TSTTrainer(recurrent, make_args(**respect()), train_dataset=packed()).train()
    assert steps
    assert True not in steps


@pytest.mark.parametrize("bag_size", [1, 4])
@pytest.mark.parametrize("fused_loss", ["auto", "off"])
def test_a_loop_of_one_s_own_keeps_documents_apart_though_the_model_makes_a_cache(bag_size, fused_loss):
    """The loss of two documents in a row is what it is of each alone, weighted by its targets."""
    model = make_model("llama", use_cache=True)
    generator = torch.Generator().manual_seed(0)
    documents = [[*torch.randint(0, EOS, (23,), generator=generator).tolist(), EOS] for _ in range(2)]
    collate = DataCollatorForTokenSuperposition(bag_size, document_boundaries="respect", eos_token_id=EOS)
    if bag_size > 1:
        context = token_superposition(model, bag_size, fused_loss=fused_loss, document_boundaries="respect")
    else:
        context = fused_next_token_loss(model, fused_loss)
    with context:
        together = model(**collate([{"input_ids": documents[0] + documents[1]}])).loss
        alone = [model(**collate([{"input_ids": ids}])).loss for ids in documents]
    assert together.item() == pytest.approx(sum(alone).item() / 2, rel=1e-5)


def test_bags_without_labels_keep_documents_apart_though_the_model_makes_a_cache():
    model = make_model("llama", use_cache=True).eval()
    documents = [[1, 2, 3, 4, 5, 6, 7, EOS], [8, 9, 10, 11, 12, 13, 14, EOS]]
    collate = DataCollatorForTokenSuperposition(2, document_boundaries="respect", eos_token_id=EOS)
    with token_superposition(model, 2, document_boundaries="respect"), torch.no_grad():
        together, alone = (
            model(**{k: v for k, v in collate([{"input_ids": ids}]).items() if k != "labels"}).logits
            for ids in (documents[0] + documents[1], documents[1])
        )
    torch.testing.assert_close(together[:, 4:], alone)
