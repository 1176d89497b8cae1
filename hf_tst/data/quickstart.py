"""Data of the quick start: the source of Python's standard library, and a tokenizer for it."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
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


def standard_library_documents(max_bytes: int) -> datasets.Dataset:
    """Python's standard library as a data set of documents (column `text`), in shuffled order.

    Args:
        max_bytes (`int`): Stop after so many bytes.

    Raises:
        TSTError: If this Python ships without the sources of its library.
    """
    import datasets

    files = standard_library_files()
    if not files:
        raise TSTError(
            "This Python ships no source files to train the quick start on: name data with --dataset_name or --train_file."
        )
    texts: list[str] = []
    size = 0
    for row in datasets.Dataset.from_dict({"path": [str(file) for file in files]}).shuffle(seed=0):
        if size >= max_bytes:
            break
        texts.append(Path(row["path"]).read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1].encode())
    return datasets.Dataset.from_dict({"text": texts})


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
