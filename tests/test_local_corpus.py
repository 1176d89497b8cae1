"""The corpus script finds the text of folders, plain and compressed, and keeps all of it."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

from processes import run_script

SCRIPT = Path(__file__).parents[1] / "scripts" / "local_corpus.py"


def write_corpus_of(folders: list[Path], output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_script(SCRIPT, "--output_dir", output, "--vocab_size", 300, *flags, "--folders", *folders)


def test_text_files_of_folders(tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    (books / "plain.txt").write_text("a plain text\n")
    (books / "again.txt").write_text("a plain text\n")
    (books / "packed.rst.gz").write_bytes(gzip.compress("a packed text: é\n".encode()))
    (books / "empty.md").write_text("  \n")
    (books / "picture.png").write_bytes(b"\x89PNG")
    (books / "wide.txt").write_bytes("a wide text\n".encode("utf-16"))
    long = "".join(f"line {number} of a long book\n" for number in range(12_000))
    (books / "words.dict.dz").write_bytes(gzip.compress(long.encode()))

    done = write_corpus_of([books], tmp_path / "out")

    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "Left out" in line and "wide.txt is UTF-16" in line]
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "out" / "corpus.jsonl").read_text().splitlines()
    ]
    parts = [text for text in texts if text.startswith("line ")]
    assert sorted(set(texts) - set(parts)) == ["a packed text: é\n", "a plain text\n"]
    assert len(texts) == len(set(texts))
    assert len(parts) > 1
    assert max(map(len, parts)) < 110_000
    assert sorted("".join(parts).splitlines()) == sorted(long.splitlines())
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()

    (books / "plain.txt").write_text("another text\n")
    (tmp_path / "out" / "corpus.jsonl").unlink()
    again = write_corpus_of([books], tmp_path / "out")
    assert again.returncode == 1
    assert "tokenizer would be replaced: name another --output_dir, or give --overwrite True" in again.stderr
    assert not (tmp_path / "out" / "corpus.jsonl").exists()
    assert write_corpus_of([books], tmp_path / "out", "--overwrite", "True").returncode == 0
    assert "another text" in (tmp_path / "out" / "corpus.jsonl").read_text()


def test_folders_without_text_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    missing = write_corpus_of([tmp_path / "missing"], tmp_path / "out")
    empty = write_corpus_of([tmp_path / "empty"], tmp_path / "out")
    assert missing.returncode == 1
    assert "missing, which is not a folder" in missing.stderr
    assert empty.returncode == 1
    assert "where no text file was found" in empty.stderr
