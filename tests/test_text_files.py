"""Text files as people have them: names, kinds, columns, encodings and disks. Each is read as what it is, or refused in one sentence."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet
from transformers.utils.logging import warning_once

from hf_tst import RunError, TSTError
from hf_tst.cli.main import main
from hf_tst.data import text_files
from hf_tst.data.files import load_text_file, matching_files
from hf_tst.data.packing import pack_blocks, tokenize_documents
from hf_tst.data.quickstart import train_tokenizer

TEXTS = ["one, two; three\n", 'say "é"', "", "None", "NA", "null", "nan", " x"]
ROWS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "hf_tst"


def lines(rows, encoding="utf-8"):
    return "".join(json.dumps(row) + "\n" for row in rows).encode(encoding)


def table(separator, *columns, header):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator)
    writer.writerows([header, *zip(*columns, strict=True)])
    return file.getvalue().encode()


def write(files):
    for name, content in files.items():
        folder, _, _ = name.rpartition("/")
        os.makedirs(folder or ".", exist_ok=True)
        if isinstance(content, pa.Table):
            parquet.write_table(content, name)
        else:
            with open(name, "wb") as file:
                file.write(content)


def zstd(content):
    return pa.compress(content, "zstd", asbytes=True)


NUMBERS = [str(i) for i in range(len(TEXTS))]
OTHER = lines([{"text": "another file"}])
# By name: files, what is named, and the texts that are trained on.
READ = {
    "name with brackets": ({"run[1].jsonl": lines(ROWS), "run1.jsonl": OTHER}, "run[1].jsonl", TEXTS),
    "name with stars": ({"a*?::b 'ü'.jsonl": lines(ROWS), "axx::b 'ü'.jsonl": OTHER}, "a*?::b 'ü'.jsonl", TEXTS),
    "folder with brackets": ({"[D]/a.jsonl": lines(ROWS), "D/a.jsonl": OTHER}, "[D]/a.jsonl", TEXTS),
    "pattern below it": ({"[D]/a.jsonl": lines(ROWS), "D/a.jsonl": OTHER}, "[D]/*.jsonl", TEXTS),
    "brackets found by a pattern": ({"p/part[3].jsonl": lines(ROWS), "p/part3.jsonl": OTHER}, "p/*.jsonl", ["another file", *TEXTS]),
    "any depth": ({f"{d}/x.jsonl": lines([{"text": d}]) for d in ("r/a", "r/a/b", "r/a/b/c")}, "r/**/*.jsonl", ["r/a/b/c", "r/a/b", "r/a"]),
    "neither hidden files nor folders": ({"f/a.jsonl": lines(ROWS), "f/.b.jsonl": OTHER, "f/c.jsonl/d": b""}, "f/*.jsonl", TEXTS),
    "capitals": ({"A.JSONL": lines(ROWS)}, "A.JSONL", TEXTS),
    "ndjson": ({"a.ndjson": lines(ROWS)}, "a.ndjson", TEXTS),
    "gzip, two parts": ({"a.jsonl.gz": gzip.compress(lines(ROWS[:3])) + gzip.compress(lines(ROWS[3:]))}, "a.jsonl.gz", TEXTS),
    "bzip2": ({"a.jsonl.bz2": bz2.compress(lines(ROWS))}, "a.jsonl.bz2", TEXTS),
    "zstd": ({"a.jsonl.zst": zstd(lines(ROWS))}, "a.jsonl.zst", TEXTS),
    "xz": ({"a.jsonl.xz": lzma.compress(lines(ROWS))}, "a.jsonl.xz", TEXTS),
    "byte order mark, blank lines": ({"a.jsonl": b"\xef\xbb\xbf\n" + lines(ROWS) + b"\n"}, "a.jsonl", TEXTS),
    "list": ({"a.json": json.dumps(ROWS).encode()}, "a.json", TEXTS),
    "list over lines": ({"a.json": json.dumps(ROWS, indent=1).encode()}, "a.json", TEXTS),
    "list over lines, after an empty one": ({"a.json": b"\n" + json.dumps(ROWS, indent=1).encode()}, "a.json", TEXTS),
    "list of strings": ({"a.json": json.dumps(TEXTS).encode()}, "a.json", TEXTS),
    "lines with capitals": ({"a.csv": table(",", NUMBERS, TEXTS, header=["Id", "Text"])}, "a.csv", TEXTS),
    "semicolons": ({"a.csv": table(";", NUMBERS, TEXTS, header=["id", "text"])}, "a.csv", TEXTS),
    "tabs": ({"a.tsv": table("\t", TEXTS, NUMBERS, header=["text", "id"])}, "a.tsv", TEXTS),
    "a long field": ({"a.csv": table(",", ["x " * 100_000, "y"], header=["text"])}, "a.csv", ["x " * 100_000, "y"]),
    "line ends of Windows": ({"a.txt": b"\xef\xbb\xbfone\r\n\r\ntwo"}, "a.txt", ["one\n", "\n", "two"]),
    "one NUL": ({"a.txt": b"twenty characters and \x00 one NUL"}, "a.txt", ["twenty characters and \x00 one NUL"]),
    "other columns in other files": (
        {"s/a.jsonl": lines(ROWS), "s/b.jsonl": lines([{"url": {"a": 1}, "text": "b"}, {"text": "c", "url": 3}])},
        "s/*.jsonl", [*TEXTS, "b", "c"],
    ),
    "other columns in other tables": (
        {"s/a.parquet": pa.table({"text": ["a"]}), "s/b.parquet": pa.table({"url": [1], "text": ["b"]})}, "s/*.parquet", ["a", "b"],
    ),
    "some null": ({"a.jsonl": lines([{"text": None}, {"text": "a"}])}, "a.jsonl", [None, "a"]),
    **{
        f"Parquet {kind}": ({"a.parquet": pa.table({"n": range(8), "text": pa.array(TEXTS, kind)})}, "a.parquet", TEXTS)
        for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
    },
    "tokens": ({"a.jsonl": lines([{"input_ids": [1, 2], "text": 3}, {"input_ids": []}])}, "a.jsonl", [[1, 2], []]),
    "tokens in Parquet": ({"a.parquet": pa.table({"input_ids": pa.array([[1, 2], [3]], pa.list_(pa.uint16()))})}, "a.parquet", [[1, 2], [3]]),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("name", READ)
def test_files_are_read_as_what_they_are(name, streaming):
    files, path, expected = READ[name]
    write(files)
    rows = load_text_file(path, streaming)
    assert [value for row in rows for value in row.values()] == expected


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_no_text_is_read_twice(tmp_path, streaming):
    write({"b.jsonl": lines(ROWS), "c.jsonl": OTHER})
    for name, target in [("a.jsonl", "c.jsonl"), ("latest.jsonl", "b.jsonl")]:
        Path(name).symlink_to(target)
    assert matching_files("*.jsonl") == ["a.jsonl", "b.jsonl"]
    texts = [row["text"] for row in load_text_file("*.jsonl", streaming)]
    assert texts == ["another file", *TEXTS]
    write({"b.jsonl.gz": gzip.compress(lines(ROWS))})
    with pytest.raises(
        TSTError, match=r"\* matches b.jsonl and b.jsonl.gz, the same text twice: name the plain"
    ):
        load_text_file("*", streaming)
    assert len(list(load_text_file("*.gz", streaming))) == len(ROWS)


def test_home_and_a_column_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write({"a.jsonl": lines([{"input_ids": [1], "id": "a", "body": text} for text in TEXTS])})
    assert load_text_file("~/a.jsonl", text_column="body")["body"][:] == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_long_texts_are_written_in_parts_of_bounded_size(monkeypatch, name):
    """Arrow's arrays of strings hold up to 2 GiB, which 1,000 books may exceed."""
    monkeypatch.setattr(text_files, "PART_CHARACTERS", 10)
    texts = ["twelve chars", "a", "b", "eight ch", "four", "c"]
    write({"a.jsonl": lines([{"text": text} for text in texts]), "a.csv": table(",", texts, header=["text"])})
    assert [array.to_pylist() for array in text_files.read_column(name, "text")] == [
        texts[:1],
        texts[1:4],
        texts[4:],
    ]
    assert load_text_file(name)["text"][:] == texts


def test_a_file_that_was_changed_is_read_again():
    write({"a.jsonl": lines(ROWS)})
    assert load_text_file("a.jsonl").num_rows == len(TEXTS)
    write({"a.jsonl": lines(ROWS * 2)})
    assert load_text_file("a.jsonl").num_rows == 2 * len(TEXTS)


def test_a_stream_of_lines_resumes_at_any_row(tokenizer):
    write({f"{i}.txt": f"line {i}\n".encode() * 5000 + b"end" for i in range(3)})

    def stream():
        return tokenize_documents(load_text_file("*.txt", streaming=True), tokenizer)

    assert stream().num_shards == 3
    whole = list(stream())
    assert len(whole) == 3 * 5001
    for stop in (1, 999, 1000, 5001, 12_345):
        begun, resumed = stream(), stream()
        rows = iter(begun)
        for _ in range(stop):
            next(rows)
        resumed.load_state_dict(begun.state_dict())
        assert list(resumed) == whole[stop:]


UTF16 = "some text\n" * 20
GOOD = lines(ROWS * 200)
# By name: files, what is named, and what the sentence says.
REFUSED = {
    "all null": ({"a.jsonl": lines([{"text": None, "content": "b"}] * 9)}, "a.jsonl", "'text' of a.jsonl holds no text"),
    "all blank": ({"a.csv": b'text,id\n" ",1\n'}, "a.csv", "'text' of a.csv holds no text"),
    "nothing": ({"a.txt": b""}, "a.txt", "a.txt holds no text"),
    "white space": ({"a.jsonl": b"\n \n"}, "a.jsonl", "a.jsonl holds no text"),
    "no rows": ({"a.json": b"[]"}, "a.json", "a.json holds no text"),
    "one empty part": ({"a.jsonl": GOOD, "b.jsonl": b""}, "*.jsonl", "b.jsonl holds no text"),
    "a table without rows": ({"a.parquet": pa.table({"text": pa.array([], pa.string())})}, "a.parquet", "holds no text"),
    "columns of lists": ({"a.json": b'{"text": ["a", "b"]}'}, "a.json", r"'text' of a.json holds \['a', 'b'\] in line 1, not text"),
    "a late number": ({"a.jsonl": GOOD + lines([{"text": 5}])}, "a.jsonl", "holds 5 in line 1601, not text"),
    "a late list": ({"a.jsonl": GOOD + lines([{"text": ["a"]}])}, "a.jsonl", r"holds \['a'\] in line 1601, not text"),
    "half a character": ({"a.jsonl": GOOD + lines([{"text": "\ud83d"}])}, "a.jsonl", r"holds '\\ud83d' in line 1601"),
    "messages": ({"a.jsonl": lines([{"messages": [{"role": "user", "content": "x"}]}])}, "a.jsonl", r"'messages' of a.jsonl holds .* not text"),
    "a row without it": ({"a.jsonl": GOOD + lines([{"content": "x"}])}, "a.jsonl", "line 1601 of a.jsonl has no column 'text'.* of content"),
    "a first row without it": ({"a.jsonl": lines([{"title": "t"}, {"title": "t", "text": "x"}])}, "a.jsonl", "line 1 of a.jsonl has no column 'text'.* of title"),
    "a first row without tokens": ({"a.jsonl": lines([{"text": "t"}, {"text": "x", "input_ids": [1]}])}, "a.jsonl", "line 1 of a.jsonl has no column 'input_ids'"),
    "rows with other columns": ({"a.jsonl": lines([{"title": "t"}, {"body": "x"}])}, "a.jsonl", "a.jsonl has no column 'text'.* of title, body"),
    "a row that is a number": ({"a.jsonl": GOOD + b"3\n"}, "a.jsonl", "a.jsonl holds 3 in line 1601, not an object"),
    "a file without it": ({"a.csv": b"text,b\n1,2\n", "b.csv": b"a,b\n1,2\n"}, "*.csv", "b.csv has no column 'text'.* of a, b"),
    "a table without it": (
        {"a.parquet": pa.table({"text": ["a"]}), "b.parquet": pa.table({"b": ["a"]})}, "*.parquet", "b.parquet has no column 'text'",
    ),
    "a table of numbers": ({"a.parquet": pa.table({"text": [1, 2]})}, "a.parquet", "'text' of a.parquet holds int64 in row 1, not text"),
    "two columns, neither text": ({"a.csv": b"name,body\nx,y\n"}, "a.csv", "a.csv has no column 'text'.* of name, body"),
    "two columns text": ({"a.csv": b"text,text\nx,y\n"}, "a.csv", "a.csv has 2 columns 'text'"),
    "tokens that are strings": ({"a.jsonl": lines([{"input_ids": ["1"]}])}, "a.jsonl", r"holds \['1'\] in line 1, not a list of whole numbers"),
    "tokens that are fractions": ({"a.jsonl": lines([{"input_ids": [1.5]}])}, "a.jsonl", r"holds \[1.5\] in line 1"),
    "tokens that are null": ({"a.jsonl": lines([{"input_ids": [1, None]}])}, "a.jsonl", r"holds \[1, None\] in line 1"),
    "commas without quotes": ({"a.csv": b"text\nhello, world\n"}, "a.csv", "line 2 of a.csv has 2 fields with ',' .* header has 1"),
    "a short row": ({"a.csv": b"id,text\n1,a\n2\n"}, "a.csv", "line 3 of a.csv has 1 fields"),
    "an open quote": ({"a.csv": b'id,text\n1,a\n2,"b\n' + b"3,c\n" * 300}, "a.csv", "the row in line 3 of a.csv as CSV"),
    "broken JSON": ({"a.jsonl": GOOD + b'{"text": \n'}, "a.jsonl", "Cannot read line 1601 of a.jsonl as JSON"),
    "broken list": ({"a.json": b'[{"text": "a"},\n{"text"]'}, "a.json", "Cannot read a.json as JSON: .* line 2"),
    "cut off": ({"a.jsonl.gz": gzip.compress(GOOD)[:-20]}, "a.jsonl.gz", "Cannot read a.jsonl.gz: "),
    "no Parquet": ({"a.parquet": b"this is none"}, "a.parquet", "Cannot read a.parquet: "),
    "UTF-16 text": ({"a.txt": UTF16.encode("utf-16")}, "a.txt", "a.txt is UTF-16 text: .*iconv -f UTF-16 -t"),
    "UTF-16 rows": ({"a.jsonl": lines(ROWS, "utf-16")}, "a.jsonl", "a.jsonl is UTF-16 text"),
    "UTF-32": ({"a.csv": UTF16.encode("utf-32")}, "a.csv", "a.csv is UTF-32 text"),
    "UTF-16 without a mark": ({"a.txt": UTF16.encode("utf-16-le")}, "a.txt", "a.txt is full of NUL"),
    "UTF-16 rows without a mark": ({"a.jsonl": lines(ROWS, "utf-16-be")}, "a.jsonl", "a.jsonl is full of NUL"),
    "UTF-16 read as Latin-1": ({"a.jsonl": lines([{"text": UTF16.encode("utf-16").decode("latin1")}])}, "a.jsonl", "a.jsonl is full of NUL"),
    "Latin-1 in Parquet": (
        {"a.parquet": pa.table({"text": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9"], pa.binary()).buffers())})},
        "a.parquet", "'text' of a.parquet holds .*UTF8.* in row 1",
    ),
    "a folder": ({"f/a.jsonl": GOOD}, "f", r"f is a folder: .* f/\*\*/\*.jsonl"),
    "no such user": ({}, "~nosuchuser/a.jsonl", "There is no file ~nosuchuser/a.jsonl"),
    "two kinds": ({"f/a.jsonl": GOOD, "f/README.md": b"x"}, "f/*", "files of one kind"),
    "no kind": ({"a.arrow": b"x"}, "a.arrow", "must end in one of .txt, .json"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused_before_any_is_tokenized(name, streaming, cache):
    files, path, message = REFUSED[name]
    write(files)
    with pytest.raises(TSTError, match=message) as caught:
        # Of a stream the beginning of each file is looked at, and the rest as it is read.
        list(load_text_file(path, streaming))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not kept_files(cache)


def test_the_log_names_the_column(tokenizer, caplog):
    warning_once.cache_clear()
    write({"a.csv": table(",", NUMBERS, TEXTS, header=["Id", "Text"])})
    loggers = [logging.getLogger(f"hf_tst.data.{name}") for name in ("packing", "columns")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        tokenize_documents(load_text_file("a.csv"), tokenizer)
        assert "the column 'Text' of a.csv, ignoring Id" in caplog.text
        tokenize_documents(datasets.Dataset.from_dict({"text": ["a", None]}), tokenizer)
        assert "1 rows of the column 'text' are null" in caplog.text
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [["a"]]}, "'text' of the data holds list, not text"),
        ({"text": [{"a": "b"}]}, "'text' of the data holds struct, not text"),
        ({"text": [1]}, "'text' of the data holds int64, not text"),
        ({"text": [None, None]}, "'text' of the data holds"),
        ({"input_ids": [["a"]]}, "'input_ids' of the data holds list, not lists of whole numbers"),
        ({"a": ["x"], "b": ["y"]}, "The data has no column 'text': set text_column .* of a, b"),
    ],
)
def test_data_sets_are_held_to_the_same(tokenizer, columns, message):
    documents = datasets.Dataset.from_dict(columns)
    for given in (documents, documents.to_iterable_dataset()):
        with pytest.raises(TSTError, match=message):
            tokenize_documents(given, tokenizer)


def test_a_stream_without_types_is_checked_as_it_is_read(tokenizer):
    untyped = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": ["b", "c"]}]))
    with pytest.raises(TSTError, match=r"'text' of the data holds \['b', 'c'\], not text"):
        list(tokenize_documents(untyped, tokenizer))
    with pytest.raises(TSTError, match="The data holds no text"):
        tokenize_documents(datasets.IterableDataset.from_generator(lambda: iter([])), tokenizer)


def kept_files(cache):
    """The files that a cache holds, but for the empty ones that writers lock."""
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.stat().st_size)


@contextmanager
def small_disk(size):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("stage", ["text", "tokens", "blocks"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tokenizer, cache, stage):
    write({"a.jsonl": lines(ROWS * 3000)})

    def prepare(stop):
        documents = load_text_file("a.jsonl")
        if stop == "text":
            return documents
        tokens = tokenize_documents(documents, tokenizer)
        return tokens if stop == "tokens" else pack_blocks(tokens, 8)

    before = {"text": None, "tokens": "text", "blocks": "tokens"}[stage]
    finished = prepare(before) and kept_files(cache) if before else []
    with (
        small_disk(50_000),
        pytest.raises(RunError, match=r"hf_tst failed: .* GB are free there\)") as caught,
    ):
        prepare(stage)
    assert "\n" not in str(caught.value)
    assert kept_files(cache) == finished
    assert len(prepare(stage)) > 0


@pytest.mark.parametrize("flags", [[], ["--streaming", "True"]], ids=["map", "stream"])
def test_the_console_command(tiny_recipe, tmp_path, capfd, caplog, flags):
    """Which of two files is trained on, and the status of a file that cannot be."""
    warning_once.cache_clear()
    values = yaml.safe_load(tiny_recipe.read_text()) | {
        "max_steps": 2, "warmup_steps": 0, "eval_strategy": "no", "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {},
        "validation_split_percentage": 0, "save_strategy": "no", "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    write({"run[1].jsonl": lines([{"body": "some text " * 400}]), "run1.jsonl": lines([{"text": [1]}])})
    assert main(["train", "recipe.yaml", "--train_file", "run[1].jsonl", *flags]) == 0
    assert "column 'body'" in caplog.text
    other = ["--output_dir", str(tmp_path / "other")]
    assert main(["train", "recipe.yaml", "--train_file", "run1.jsonl", *other, *flags]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("hf-tst train: The column 'text' of run1.jsonl holds [1] in line 1, not text")
