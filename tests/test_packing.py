import glob
import gzip
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from processes import Script
from transformers import LlamaConfig

from hf_tst import TSTError, TSTTrainer
from hf_tst.data.files import load_text_file
from hf_tst.data.packing import pack_blocks, tokenize_documents
from hf_tst.data.quickstart import standard_library_documents, standard_library_files, train_tokenizer
from hf_tst.data.streams import BlockStream
from hf_tst.pretraining.documents import load_documents, prepare_blocks
from hf_tst.pretraining.model import load_model, load_tokenizer
from hf_tst.pretraining.options import DataArguments, ModelArguments
from hf_tst.records.run_record import loaded_from

TEXTS = ["def f(x):\n    return x\n", "", "import os\n" * 40, "é ü 漢字 \n"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def test_the_tokenizer_gives_every_text_back(tokenizer):
    for text in [*TEXTS, "🤖 never seen"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300


@pytest.mark.parametrize("block_size", [2, 7])
def test_packing_keeps_every_token_in_order_but_the_last_remainder(tokenizer, block_size):
    documents = datasets.Dataset.from_dict({"text": TEXTS * 3})
    expected = [t for text in TEXTS * 3 for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    tokenized = tokenize_documents(documents, tokenizer)
    blocks = pack_blocks(tokenized, block_size)
    whole = len(expected) // block_size * block_size
    assert np.array(blocks["input_ids"]).ravel().tolist() == expected[:whole]
    streamed = list(BlockStream(tokenized, block_size))
    assert np.array([block["input_ids"] for block in streamed]).ravel().tolist() == expected[:whole]


def test_every_pass_over_a_stream_begins_with_its_first_token():
    stream = BlockStream([{"input_ids": list(range(7))}, {"input_ids": list(range(7, 12))}], 5)
    passes = [[block["input_ids"].tolist() for block in stream] for _ in range(2)]
    assert passes == [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]] * 2
    assert next(iter(stream))["input_ids"].tolist() == [0, 1, 2, 3, 4]
    assert next(iter(stream))["input_ids"].tolist() == [0, 1, 2, 3, 4]  # after a pass that was left early


def test_a_collator_of_ones_own_makes_labels_of_streamed_blocks(llama, make_args):
    """A model's loss takes labels of one type only; bags are converted to it, single tokens are the collator's."""

    def collate(rows):
        ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
        return {"input_ids": ids, "labels": ids.clone()}

    documents = [{"input_ids": [*range(40)]}] * 50
    blocks, args = BlockStream(documents, 12), make_args(tst_fused_loss="off")
    trainer = TSTTrainer(llama, args, train_dataset=blocks, data_collator=collate)
    assert trainer.train().global_step == trainer.args.max_steps


@pytest.mark.parametrize("pieces", [[23], [1, 0, 8, 11, 3], [1] * 23])
def test_cutting_does_not_depend_on_where_documents_end(pieces):
    documents = np.split(np.arange(23, dtype=np.int32), np.cumsum(pieces)[:-1])
    blocks = pack_blocks(datasets.Dataset.from_dict({"input_ids": documents}), 5)
    assert np.array(blocks["input_ids"]).ravel().tolist() == list(range(20))


def test_tokenized_data_is_left_alone(tokenizer):
    documents = datasets.Dataset.from_dict({"input_ids": [[1, 2]]})
    assert tokenize_documents(documents, tokenizer) is documents


def test_bad_data_says_what_to_do(tokenizer, tmp_path):
    documents = datasets.Dataset.from_dict({"content": ["a b"], "other": ["c"]})
    with pytest.raises(ValueError, match="set text_column"):
        tokenize_documents(documents, tokenizer, text_column="text")
    with pytest.raises(ValueError, match="do not fill one block of 50"):
        pack_blocks(tokenize_documents(documents, tokenizer, text_column="content"), 50)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="holds no text"):
        load_text_file(str(tmp_path / "empty.txt"))
    with pytest.raises(ValueError, match="There is no file"):
        load_text_file(str(tmp_path / "missing.jsonl"))
    (tmp_path / "text.pdf").touch()
    with pytest.raises(ValueError, match="must end in one of"):
        load_text_file(str(tmp_path / "text.pdf"))


def test_a_text_file_joins_to_its_text_again(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree", encoding="utf-8")
    rows = load_text_file(str(tmp_path / "a.txt"))
    assert "".join(rows["text"]) == "one\n\ntwo\nthree"
    assert (
        "".join(row["text"] for row in load_text_file(str(tmp_path / "a.txt"), streaming=True))
        == "one\n\ntwo\nthree"
    )


def test_the_standard_library_is_real_text():
    assert any(path.name == "dataclasses.py" for path in standard_library_files())
    assert not any("site-packages" in path.parts for path in standard_library_files())
    documents = standard_library_documents(max_bytes=200_000)
    assert 200_000 <= sum(len(text.encode()) for text in documents["text"]) < 2_000_000
    assert documents["text"][:] == standard_library_documents(max_bytes=200_000)["text"][:]


# Corpora at the edges


def pack_text(texts, tokenizer, block_size):
    return pack_blocks(tokenize_documents(datasets.Dataset.from_dict({"text": texts}), tokenizer), block_size)


def test_packing_again_opens_the_same_file_and_tokenizes_nothing(tokenizer, tmp_path):
    """In a process of its own each time, as two runs of a script are."""
    (tmp_path / "corpus.txt").write_text("some line of text\n" * 500, encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys\n"
        "from transformers import AutoTokenizer\n"
        "from transformers.tokenization_utils_base import PreTrainedTokenizerBase\n"
        "from hf_tst.data.packing import pack_blocks, tokenize_documents\n"
        "from hf_tst.data.files import load_text_file\n"
        "tokenizer = AutoTokenizer.from_pretrained('tokenizer')\n"
        "documents = load_text_file('corpus.txt')\n"
        "tokenized = tokenize_documents(documents, tokenizer, num_proc=2)\n"
        "blocks = pack_blocks(tokenized, 16)\n"
        "print(tokenized.cache_files[0]['filename'], blocks.cache_files[0]['filename'], len(blocks))\n"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    runs = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-2000:]
        files = sorted((tmp_path / "cache").rglob("*.arrow"))
        runs.append((result.stdout, [(file, file.stat().st_mtime_ns) for file in files]))
    assert runs[0] == runs[1]
    assert "hf_tst/blocks-" in runs[0][0]


@pytest.mark.parametrize("lost", ["a file", "all files", "a part of a file", "the list of files"])
def test_a_cache_that_has_lost_files_is_written_again(tokenizer, tmp_path, monkeypatch, lost):
    """As on disks where old files are removed one by one: the folder is still there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    data = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(300)]})

    def pack():
        return pack_blocks(tokenize_documents(data, tokenizer, num_proc=2), 8)[:]["input_ids"]

    whole = pack()
    made_by_datasets = [folder / "cache-1.arrow" for folder in (tmp_path / "hf_tst").iterdir()]
    for file in made_by_datasets:
        file.write_text("of a running process")
    for folder in (tmp_path / "hf_tst").iterdir():
        files = sorted(folder.glob("data-*"))
        if lost == "a part of a file":
            files[0].write_bytes(files[0].read_bytes()[:-200])
        elif lost == "the list of files":
            (folder / "sizes.json").unlink()
        for file in {"a file": files[-1:], "all files": files}.get(lost, []):
            file.unlink()
    assert pack() == whole
    assert all(file.exists() for file in made_by_datasets)


@pytest.mark.parametrize("labels", [[0, 1, 2], [None] * 3])
def test_labels_of_another_kind_are_not_those_of_tokens(labels):
    rows = [{"input_ids": [1, 2, 3, 4], "labels": label} for label in labels]
    packed = [[1, 2, 3, 4, 1, 2], [3, 4, 1, 2, 3, 4]]
    assert pack_blocks(datasets.Dataset.from_list(rows), 6)[:]["input_ids"] == packed
    assert [block["input_ids"].tolist() for block in BlockStream(rows, 6)] == packed


def test_documents_without_tokens_are_told_to_be_tokenized():
    with pytest.raises(TSTError, match=r"have \['text'\]: tokenize"):
        pack_blocks(datasets.Dataset.from_dict({"text": ["a"]}), 4)


def test_all_splits_or_a_stream_in_place_of_one_data_set_is_one_sentence(tokenizer):
    for rows, prepare in (
        ({"text": ["a"]}, lambda data: tokenize_documents(data, tokenizer)),
        ({"input_ids": [[1, 2]]}, lambda data: pack_blocks(data, 2)),
    ):
        train = datasets.Dataset.from_dict(rows)
        for splits in (
            datasets.DatasetDict(train=train, test=train),
            datasets.IterableDatasetDict(train=train.to_iterable_dataset(), test=train.to_iterable_dataset()),
        ):
            with pytest.raises(TSTError, match=r"train, test.*\['train'\]"):
                prepare(splits)
    for stream in (
        train.to_iterable_dataset(),
        datasets.IterableDataset.from_generator(lambda: iter([{"input_ids": [1]}])),
    ):
        with pytest.raises(TSTError, match="BlockStream"):
            pack_blocks(stream, 2)


def test_a_transform_that_blocks_would_not_have_is_refused(tokenizer):
    documents = datasets.Dataset.from_dict({"text": ["ab"] * 9, "input_ids": [[1, 2]] * 9})
    changed = documents.with_transform(lambda rows: {name: ["cd"] * len(rows[name]) for name in rows})
    with pytest.raises(TSTError, match=r"transform.*documents\.map"):
        pack_blocks(changed, 2)
    tokens = tokenize_documents(changed.select_columns("text"), tokenizer)[0]["input_ids"]
    assert tokenizer.decode(tokens[:-1]) == "cd"


def test_a_row_of_null_is_an_empty_document():
    rows = [{"input_ids": [1, 2]}, {"input_ids": None}, {"input_ids": [3, 4]}]
    assert pack_blocks(datasets.Dataset.from_list(rows), 3)[:]["input_ids"] == [[1, 2, 3]]
    assert [block["input_ids"].tolist() for block in BlockStream(rows, 3)] == [[1, 2, 3]]


def test_rows_of_null_are_counted_among_those_that_are_left(tokenizer, caplog):
    documents = datasets.Dataset.from_dict({"text": ["a", None, None, "b"]})
    with caplog.at_level(logging.WARNING, logger="hf_tst"):
        tokenize_documents(documents.filter(lambda row: row["text"] is not None), tokenizer)
        assert "are null" not in caplog.text
        tokenize_documents(documents.select([3, 1]), tokenizer)
    assert "1 rows of the column 'text' are null" in caplog.text
    with pytest.raises(TSTError, match="holds no text"):
        tokenize_documents(documents.select([1, 2]), tokenizer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_labels_that_blocks_would_not_keep_are_refused(stream, masked):
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100 if masked else 1, 2, 3, 4]} for _ in range(9)]

    def pack():
        if stream:
            return [block["input_ids"].tolist() for block in BlockStream(rows, 8)]
        return pack_blocks(datasets.Dataset.from_list(rows), 8)[:]["input_ids"]

    if masked:
        with pytest.raises(TSTError, match="labels that differ"):
            pack()
    else:
        assert pack() == [[1, 2, 3, 4] * 2] * 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_padding_that_blocks_would_train_on_is_refused(tokenizer, stream, padded):
    """As `tokenizer(texts, padding="max_length")` makes it where the padding token is the end-of-sequence token."""
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["a b", "c"] if padded else ["a b", "c d"]
    encoded = tokenizer(texts, padding="max_length" if padded else False, max_length=8)
    rows = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
    ids = [token for row in encoded["input_ids"] for token in row]

    def pack():
        if stream:
            return [block["input_ids"].tolist() for block in BlockStream(rows, 2)]
        return pack_blocks(datasets.Dataset.from_list(rows), 2)[:]["input_ids"]

    if padded:
        with pytest.raises(TSTError, match=r"padded.*attention_mask"):
            pack()
    else:
        assert pack() == [ids[i : i + 2] for i in range(0, len(ids) - 1, 2)]


def test_what_is_made_of_packed_data_is_not_taken_for_it(tokenizer):
    """`datasets` caches what a data set is shuffled or mapped to in the folder of its file."""

    def pack():
        return pack_blocks(tokenize_documents(load_text_file("text.txt"), tokenizer), 8)

    Path("text.txt").write_text("".join(f"line {i} of the text\n" for i in range(60)))
    blocks = pack()
    blocks.shuffle(seed=0).map(lambda block: {"input_ids": block["input_ids"][::-1]})
    load_text_file("text.txt").map(lambda row: {"text": "other\n"})
    tokenize_documents(load_text_file("text.txt"), tokenizer).filter(
        lambda row, index: index < 3, with_indices=True
    )
    assert pack()["input_ids"] == blocks["input_ids"]


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_two_processes_may_pack_the_same_documents_at_once(tmp_path, locks):
    """One of them writes and the other waits for it; both write on file systems without locks."""
    script = tmp_path / "pack.py"
    script.write_text(
        "import pathlib, sys\n"
        "import datasets, fcntl\n"
        "from hf_tst.data import packing\n"
        "datasets.config.HF_DATASETS_CACHE = pathlib.Path(sys.argv[1])\n"
        "def lockf(*given):\n"
        "    raise OSError(37, 'No locks available')\n"
        f"fcntl.lockf = fcntl.lockf if {locks} else lockf\n"
        "write_blocks, written = packing._write_blocks, []\n"
        "def counted(*given):\n"
        "    written.append(given)\n"
        "    return write_blocks(*given)\n"
        "packing._write_blocks = counted\n"
        "for i in range(500):\n"
        "    documents = datasets.Dataset.from_dict({'input_ids': [list(range(105))]})\n"
        "    documents._fingerprint = f'number {i}'\n"
        "    assert packing.pack_blocks(documents, 10)[9]['input_ids'] == list(range(90, 100))\n"
        "print(len(written))\n"
    )
    running = [Script(script, tmp_path / "cache") for _ in range(2)]
    written = 0
    for done in [process.finish() for process in running]:
        assert done.returncode == 0, done.stderr[-2000:]
        written += int(done.stdout)
    assert written == 500 if locks else written >= 500
    folders = list((tmp_path / "cache" / "hf_tst").iterdir())
    assert len(folders) == 500
    kept = {path.name for folder in folders for path in folder.iterdir()}
    assert kept == {"lock", "sizes.json", "data-105.arrow"}


def test_what_a_killed_process_has_left_is_removed_and_its_own_processes_lock_nothing(tokenizer, tmp_path):
    """`datasets` tokenizes in processes that outlive one that is killed."""
    script = tmp_path / "prepare.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "import datasets\n"
        "from hf_tst.data.written_once import written_once\n"
        "datasets.config.HF_DATASETS_CACHE = pathlib.Path(sys.argv[1])\n"
        "def write(folder):\n"
        "    (folder / 'data-1.arrow').write_bytes(bytes(1000))\n"
        "    if sys.argv[2] == 'is killed':\n"
        "        if os.fork():\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "written_once('same', write)\n"
    )
    cache = tmp_path / "cache"
    assert Script(script, cache, "is killed").finish().returncode == -9
    assert list(cache.rglob("data-1.arrow")) == [cache / "hf_tst" / "same" / "unfinished" / "data-1.arrow"]
    assert Script(script, cache, "writes").finish(timeout=50).returncode == 0
    assert sorted(path.name for path in cache.rglob("*.*")) == ["data-1.arrow", "sizes.json"]


def test_other_inputs_are_packed_anew(tokenizer):
    one, same = pack_text(TEXTS * 5, tokenizer, 8), pack_text(TEXTS * 5, tokenizer, 8)
    assert one.cache_files == same.cache_files
    for other in (pack_text(TEXTS * 5, tokenizer, 9), pack_text(TEXTS * 4, tokenizer, 8)):
        assert other.cache_files != one.cache_files


def test_the_dropped_remainder_is_in_the_log(tokenizer, caplog):
    tokens = len([t for text in TEXTS for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    assert tokens % 7
    logger = logging.getLogger("hf_tst.data.packing")
    logger.addHandler(caplog.handler)
    level = logger.level
    try:
        with caplog.at_level("INFO", logger="hf_tst.data.packing"):
            for _ in range(2):  # packed, and found in the cache
                caplog.clear()
                pack_text(TEXTS, tokenizer, 7)
                assert f"the last {tokens % 7} tokens are dropped" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)


def test_many_tiny_documents_and_empty_ones(tokenizer):
    texts = ["", "a", "", None, "b"] * 2000
    blocks = pack_text(texts, tokenizer, 64)
    a, b = (tokenizer(text)["input_ids"] for text in "ab")
    end = [tokenizer.eos_token_id]
    expected = ([*end, *a, *end, *end, *end, *b, *end] * 2000)[: len(blocks) * 64]
    assert len(blocks) == 2000 * 7 // 64
    assert np.array(blocks["input_ids"]).ravel().tolist() == expected


def test_long_documents_are_not_all_tokenized_at_once():
    """The tokenizer's own memory is hundreds of bytes per token, so what it gets at once is the peak."""
    given = []

    class Counting:
        eos_token_id = 0

        def __call__(self, texts, **options):
            given.append(sum(map(len, texts)))
            return {"input_ids": [[len(text)] for text in texts]}

    texts = ["a" * 1_000_000, "short"] * 8
    rows = tokenize_documents(datasets.Dataset.from_dict({"text": texts}), Counting())
    assert rows["input_ids"][:] == [[len(text), 0] for text in texts]
    assert sum(given) == sum(map(len, texts))
    assert max(given) < sum(given) / 2
    given.clear()
    tokenize_documents(datasets.Dataset.from_dict({"text": ["short"] * 50}), Counting())
    assert given == [250]


def test_one_document_longer_than_everything():
    tokens = np.arange(3_000_000, dtype=np.int32)
    documents = datasets.Dataset.from_dict({"input_ids": [tokens]})
    blocks = pack_blocks(documents, 1000)
    assert len(blocks) == 3000
    assert blocks[2999]["input_ids"] == list(range(2_999_000, 3_000_000))
    streamed = BlockStream(documents, 1000)
    assert sum(1 for _ in streamed) == 3000


def test_only_empty_documents_or_a_block_longer_than_the_corpus_are_one_error(tokenizer):
    with pytest.raises(ValueError, match="holds 0 tokens"):
        pack_blocks(datasets.Dataset.from_dict({"input_ids": [[], []]}).cast_column(
            "input_ids", datasets.Sequence(datasets.Value("int32"))), 4)  # fmt: skip
    with pytest.raises(ValueError, match="do not fill one block of 100000") as error:
        pack_text(TEXTS, tokenizer, 100_000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_bytes_that_are_no_utf8_are_named(tmp_path, name, streaming):
    good = b'{"text": "fine"}\n' * 3
    (tmp_path / name).write_bytes(good + b'{"text": "caf\xe9"}\n')
    with pytest.raises(
        ValueError, match=rf"{name} is not UTF-8 text: byte {len(good) + 13} is 0xe9"
    ) as error:
        list(load_text_file(str(tmp_path / name), streaming=streaming))
    assert "\n" not in str(error.value)


def test_a_character_that_is_cut_off_at_the_end_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x\n" + "é".encode() * 4 + b"\xc3")
    with pytest.raises(ValueError, match="byte 10 is 0xc3"):
        load_text_file(str(tmp_path / "a.txt"))


def test_a_pattern_names_several_files_and_shards(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"file {i}\n", encoding="utf-8")
    rows = load_text_file(str(tmp_path / "*.txt"))
    assert rows["text"][:] == ["file 0\n", "file 1\n", "file 2\n"]
    stream = load_text_file(str(tmp_path / "*.txt"), streaming=True)
    assert stream.num_shards == 3
    with pytest.raises(ValueError, match=r"There is no file .*\.jsonl"):
        load_text_file(str(tmp_path / "*.jsonl"))
    (tmp_path / "3.jsonl").touch()
    with pytest.raises(ValueError, match="files of one kind"):
        load_text_file(str(tmp_path / "*"))


def test_parquet_and_columns_of_tokens(tokenizer, tmp_path):
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "text.parquet")
    datasets.Dataset.from_dict({"input_ids": ids, "other": TEXTS}).to_parquet(tmp_path / "tokens.parquet")
    text = pack_blocks(
        tokenize_documents(load_text_file(str(tmp_path / "text.parquet")), tokenizer, append_eos=False), 5
    )
    tokens = pack_blocks(tokenize_documents(load_text_file(str(tmp_path / "tokens.parquet")), tokenizer), 5)
    assert text["input_ids"][:] == tokens["input_ids"][:]
    assert tokens.column_names == ["input_ids"]


@pytest.mark.parametrize(
    ("limits", "evaluation", "taken"),
    [
        ({"max_train_samples": 3}, False, [0, 1, 2]),
        ({"max_eval_samples": 3}, True, [0, 3, 6]),
        ({"max_eval_samples": 10}, True, list(range(10))),
        ({"max_eval_samples": 99, "max_train_samples": 3}, True, list(range(10))),
    ],
)
def test_evaluation_takes_blocks_all_over_the_data_and_training_the_first_ones(
    tokenizer, limits, evaluation, taken
):
    documents = datasets.Dataset.from_dict({"input_ids": [[block] * 4 for block in range(10)]})
    blocks = prepare_blocks(DataArguments(**limits), documents, tokenizer, 4, evaluation=evaluation)
    assert [row["input_ids"] for row in blocks] == [[block] * 4 for block in taken]


@pytest.mark.parametrize(
    ("pattern", "told"), [("*.jsonl", True), ("held_out.jsonl", True), ("train.jsonl", False)]
)
def test_text_that_is_trained_on_and_evaluated_on_is_told(tmp_path, caplog, pattern, told):
    for name in ("train", "held_out"):
        datasets.Dataset.from_dict({"text": [name] * 20}).to_json(tmp_path / f"{name}.jsonl")
    held_out = tmp_path / "held_out.jsonl"
    load_documents(
        DataArguments(train_file=str(tmp_path / pattern), validation_file=str(held_out)), ModelArguments()
    )
    assert (f"{held_out} is both training and evaluation data" in caplog.text) == told


def test_the_same_text_by_another_name_is_told(tmp_path, caplog, monkeypatch):
    datasets.Dataset.from_dict({"text": ["one"] * 20}).to_json(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "latest.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "a.jsonl"), "latest.jsonl", "a.jsonl.gz"):
        caplog.clear()
        load_documents(DataArguments(train_file="a.jsonl", validation_file=name), ModelArguments())
        assert f"{name} is both training and evaluation data" in caplog.text


def test_a_pattern_of_files_is_resolved_once(tmp_path, tokenizer, monkeypatch):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("abc\n" * 20 + "end", encoding="utf-8")
    patterns: list[str] = []
    found = glob.glob
    monkeypatch.setattr(glob, "glob", lambda name, **kwargs: patterns.append(name) or found(name, **kwargs))
    args = DataArguments(train_file=f"{tmp_path}/*.txt", validation_file=f"{tmp_path}/[ab].txt")
    for documents, evaluation in zip(load_documents(args, ModelArguments()), (False, True), strict=True):
        prepare_blocks(args, documents, tokenizer, 4, evaluation=evaluation)
    assert sorted(patterns) == ["*.txt", "[ab].txt"]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_files_that_are_joined_are_told(tmp_path, tokenizer, caplog, streaming):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("abc\n" * 20 + "end", encoding="utf-8")

    def prepare(name, **options):
        caplog.clear()
        args = DataArguments(
            train_file=str(tmp_path / name), validation_split_percentage=0, streaming=streaming, **options
        )
        prepare_blocks(args, load_documents(args, ModelArguments())[0], tokenizer, 4)
        return caplog.text

    assert (
        f"The 2 files {tmp_path}/a.txt … {tmp_path}/b.txt are joined into one text, without end tokens"
        in prepare("*.txt")
    )
    assert "joined" not in prepare("a.txt")
    assert "joined" not in prepare("*.txt", append_eos=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", ["file", "folder"])
def test_a_validation_file_is_evaluated_whatever_the_training_data_is(tmp_path, tokenizer, source, streaming):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"text": [split] * 20}).to_json(tmp_path / "data" / f"{split}.jsonl")
    (tmp_path / "held_out.txt").write_text("abc\n" * 20, encoding="utf-8")
    data = (
        {"train_file": str(tmp_path / "data" / "train.jsonl")}
        if source == "file"
        else {"dataset_name": str(tmp_path / "data")}
    )
    args = DataArguments(**data, validation_file=str(tmp_path / "held_out.txt"), streaming=streaming)
    train, held_out = load_documents(args, ModelArguments())
    assert {row["text"] for row in train} == {"train"}
    assert {row["text"] for row in held_out} == {"abc\n"}
    blocks = prepare_blocks(args, held_out, tokenizer, 4, evaluation=True)
    tokens = [token for row in blocks for token in row["input_ids"]]
    assert (
        tokenizer.eos_token_id not in tokens
    )  # lines of a text are no documents, whatever the training data is


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_lines_is_to_be_named_by_its_files(tmp_path, streaming, monkeypatch):
    """`datasets` reads other text than the file holds: lines without their ends, of which each would become a document."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    args = DataArguments(
        dataset_name=str(tmp_path / "data"), streaming=streaming, validation_split_percentage=0
    )
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(TSTError, match=r"--train_file '.*data/\*\*/\*\.txt'") as error:
        load_documents(args, ModelArguments())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("files", "unread"),
    [
        (["a.jsonl", "b/c.jsonl.gz", "README.md", ".hidden.jsonl", "notes.txt"], ["notes.txt"]),
        (["a.jsonl", "train-extra.jsonl"], ["a.jsonl"]),  # `datasets` reads those with a split in their name
        (["train.jsonl", "more/train-2.jsonl", "test.jsonl", ".cache/a.jsonl", "dataset_infos.json"], []),
        (["a.jsonl", "b.jsonl", "c.csv"], ["c.csv"]),
    ],
    ids=str,
)
def test_files_of_a_folder_that_are_not_read_are_told(tmp_path, caplog, files, unread, streaming):
    for name in files:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = b'{"text": "abc"}\n' if name != "dataset_infos.json" else b"{}"
        path.write_bytes(gzip.compress(row) if name.endswith(".gz") else row)
    args = DataArguments(
        dataset_name=str(tmp_path / "data"), streaming=streaming, validation_split_percentage=0
    )
    load_documents(args, ModelArguments())
    told = [record.getMessage() for record in caplog.records if "does not read" in record.getMessage()]
    assert len(told) == bool(unread)
    assert all(name in told[0] for name in unread)


def test_a_folder_with_a_broken_file_is_one_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(TSTError, match=r"Cannot load .*data: JSON parse error") as error:
        load_documents(DataArguments(dataset_name=str(tmp_path / "data")), ModelArguments())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("good_lines", [0, 20_000])
def test_a_streamed_folder_with_a_broken_file_is_one_sentence(tmp_path, tokenizer, good_lines):
    """In its first rows, and where blocks are cut. `datasets` reads 10 MB at once."""
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": "many words " * 50})] * good_lines
    (tmp_path / "data" / "a.jsonl").write_text("\n".join([*lines, '{"text": ', ""]), encoding="utf-8")
    args = DataArguments(dataset_name=str(tmp_path / "data"), streaming=True, validation_split_percentage=0)
    with pytest.raises(TSTError, match=r"^Cannot read the data: JSON parse error: .*\.$") as error:
        list(prepare_blocks(args, load_documents(args, ModelArguments())[0], tokenizer, 4096))
    assert "\n" not in str(error.value)


def test_nothing_is_held_out_of_the_standard_library_where_nothing_is_asked_for():
    train, held_out = load_documents(DataArguments(validation_split_percentage=1), ModelArguments())
    everything, nothing = load_documents(DataArguments(validation_split_percentage=0), ModelArguments())
    assert nothing is None
    assert everything.num_rows == train.num_rows + held_out.num_rows


def test_lines_of_text_files_are_no_documents_however_the_files_are_named(tmp_path, tokenizer):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text("abc\n" * 20, encoding="utf-8")
    for pattern in ("*.txt", "*", "[01]*"):
        args = DataArguments(train_file=str(tmp_path / pattern), validation_split_percentage=0)
        blocks = prepare_blocks(args, load_documents(args, ModelArguments())[0], tokenizer, 4)
        assert tokenizer.eos_token_id not in {token for row in blocks for token in row["input_ids"]}


def test_a_model_of_somebodys_architecture_has_no_base_model(tmp_path, tokenizer, monkeypatch):
    LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
        tmp_path / "org" / "model"
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = load_model(ModelArguments(config_name="org/model"), tokenizer)
    model.save_pretrained("org/trained")
    trained = load_model(ModelArguments(model_name_or_path="org/trained"), tokenizer)
    monkeypatch.chdir("/")  # so that the names look as if they were the Hub's
    assert loaded_from(model) is None
    assert loaded_from(trained) == "org/trained"


def test_the_revision_is_that_of_the_model_and_not_of_another_tokenizer(tmp_path, tokenizer):
    for name in ("model", "words"):
        cached = tmp_path / f"models--org--{name}"
        tokenizer.save_pretrained(cached / "snapshots" / ("0" * 40))
        LlamaConfig().save_pretrained(cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / ("v2" if name == "model" else "main")).write_text("0" * 40)
    args = ModelArguments(model_name_or_path="org/model", model_revision="v2", cache_dir=str(tmp_path))
    for other in (None, "org/model", "org/words"):
        loaded = load_tokenizer(replace(args, tokenizer_name=other), DataArguments(), [])
        assert len(loaded) == len(tokenizer)


def test_a_folder_with_code_of_its_own_gives_a_new_model(tmp_path, tokenizer):
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    code = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config = {"model_type": "mine", "vocab_size": 300, "auto_map": code, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(ModelArguments(config_name=str(tmp_path), trust_remote_code=True), tokenizer)
    assert type(model).__name__ == "MineForCausalLM"


def test_every_parameter_of_a_new_model_is_of_the_type_asked_for(tokenizer):
    """Also a router's, which some models make in float32."""
    model = load_model(
        ModelArguments(
            model_type="hunyuan_v1_moe",
            dtype="bfloat16",
            config_overrides=json.dumps(
                {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
                 "num_experts": 4}
            ),
        ),
        tokenizer,
    )  # fmt: skip
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_new_model_is_float32_whatever_the_weights_of_the_configuration_were(
    tmp_path, tokenizer, dtype, expected
):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=300, dtype="bfloat16", **sizes).save_pretrained(tmp_path)
    model = load_model(ModelArguments(config_name=str(tmp_path), dtype=dtype), tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.dtype == expected


def test_a_streamed_evaluation_is_on_the_first_blocks_and_reads_no_more(tokenizer, caplog):
    read = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield {"input_ids": [number] * 4}

    stream = datasets.IterableDataset.from_generator(documents)
    with caplog.at_level(logging.WARNING, logger="hf_tst"):
        blocks = prepare_blocks(DataArguments(max_eval_samples=3), stream, tokenizer, 4, evaluation=True)
        assert [block["input_ids"].tolist() for block in blocks] == [[0] * 4, [1] * 4, [2] * 4]
        assert len(blocks) == 3
        assert max(read) < 10
        assert "evaluation" not in caplog.text
        whole = prepare_blocks(DataArguments(), stream, tokenizer, 4, evaluation=True)
    assert sum(1 for _ in whole) == 1000
    assert "Each evaluation reads the whole stream of evaluation data: set max_eval_samples" in caplog.text
    with pytest.raises(TSTError, match="does not fill one block of 5000"):
        prepare_blocks(DataArguments(max_eval_samples=3), stream, tokenizer, 5000, evaluation=True)


def fingerprint(tokenizer, path, **options):
    args = DataArguments(
        **{"train_file": str(path), "validation_split_percentage": 0} | options, streaming=True
    )
    return prepare_blocks(args, load_documents(args, ModelArguments())[0], tokenizer, 4).fingerprint


def test_a_stream_is_told_from_one_of_other_data(tokenizer, tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            rows = {"text": [f"{name} {i}" for i in range(20)], "other": ["x"] * 20}
            datasets.Dataset.from_dict(rows).to_json(tmp_path / folder / f"{name}.jsonl")
    (tmp_path / "there" / "longer.jsonl").write_text('{"text": "c"}\n')
    a = tmp_path / "here" / "a.jsonl"
    known = [
        fingerprint(tokenizer, a),
        fingerprint(tokenizer, tmp_path / "here" / "b.jsonl"),
        fingerprint(tokenizer, tmp_path / "here" / "*.jsonl"),
        fingerprint(tokenizer, a, append_eos=False),
        fingerprint(tokenizer, a, text_column="other"),
        fingerprint(train_tokenizer(["other text " * 9], vocab_size=300), a),
        fingerprint(tokenizer, "", dataset_name=str(tmp_path / "there")),
    ]
    assert len({*known}) == len(known)
    assert fingerprint(tokenizer, tmp_path / "there" / "a.jsonl") == known[0]  # moved
    with a.open("a") as file:
        file.write('{"text": "more"}\n')
    assert fingerprint(tokenizer, a) not in known
