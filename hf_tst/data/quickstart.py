"""Real text that every machine with Python has, and a tokenizer for it: what a run without data trains on."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TSTError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def standard_library_files() -> list[Path]:
    """The source files of this Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
    )


def installed_package_files() -> list[Path]:
    """The source files of the packages that are installed beside this Python's standard library, in a fixed order."""
    return sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))


def standard_library_documents(max_bytes: int = 16_000_000, seed: int = 0) -> datasets.Dataset:
    """Python's standard library as a data set of documents (column `text`), in shuffled order.

    Args:
        max_bytes (`int`, defaults to 16 000 000): Stop after so many bytes.
        seed (`int`, defaults to 0): Seed of the order.

    Raises:
        TSTError: If this Python ships without the sources of its library.
    """
    import datasets

    files = standard_library_files()
    if not files:
        raise TSTError(
            "This Python ships no source files to train the quick start on: name data with --dataset_name or --train_file."
        )
    documents = datasets.Dataset.from_dict({"path": [str(file) for file in files]}).shuffle(seed=seed)
    return datasets.Dataset.from_dict({"text": list(_read(documents["path"], max_bytes))})


def _read(paths: Iterable[str], max_bytes: int) -> Iterator[str]:
    size = 0
    for path in paths:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        size += len(text.encode())
        yield text
        if size >= max_bytes:
            return


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with one special token for the end of a document.

    Args:
        texts: The text to train on.
        vocab_size (`int`): Size of the vocabulary at most, at least 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
