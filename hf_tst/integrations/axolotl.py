"""Token superposition in Axolotl: `plugins: [hf_tst.integrations.axolotl.TokenSuperpositionPlugin]` and options `tst_*` in its YAML.

The text of `datasets` or `pretraining_dataset` is read and packed by this package: Axolotl's rows of text are of unequal length and cut
documents, and superposition joins consecutive blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import create_model
from transformers import Trainer
from transformers.utils import logging

from ..data.data_sets import load_data_set
from ..data.files import load_text_file
from ..data.packing import pack_blocks, tokenize_documents
from ..data.streams import BlockStream
from ..data.text_files import ENDINGS, ending
from ..data.token_file import TOKEN_FILE_SUFFIX, TokenFile
from ..errors import TSTError, bad_input, check_choice, check_names, whole_message
from ..training.arguments import TSTArguments
from ..training.trainer import TSTTrainer

logger = logging.get_logger(__name__)

_HINTS = {
    name: hint
    for name, hint in get_type_hints(TSTArguments).items()
    if name in {field.name for field in fields(TSTArguments)}
}
OLDEST = (0, 21)
# The schema of these options. Axolotl imports it by name.
TokenSuperpositionInput = create_model(
    "TokenSuperpositionInput", **{name: (hint | None, None) for name, hint in _HINTS.items()}
)
# The options of a source of text that are supported; the others are about prompts.
SOURCE_KEYS = ("path", "name", "split", "type", "ds_type", "field", "text_column", "data_files", "revision", "skip", "trust_remote_code")  # fmt: skip
TEXT_TYPES = ("completion", "pretrain")
REFUSED = {
    "sample_packing": "rows are packed already, and superposition joins neighboring blocks of the text, which it would mix",
    "batch_flattening": "rows are full already",
    "balance_labels": "all tokens are targets",
    "rl": "superposition is for pre-training on text",
    "reward_model": "superposition is for pre-training on text",
    "process_reward_model": "superposition is for pre-training on text",
    "trainer_cls": "this plugin brings the trainer",
}


class TokenSuperpositionPlugin(BasePlugin):
    """Trains with [`TSTTrainer`] in Axolotl. `tst_phase_ratio: 0` is Axolotl's own training on the same blocks."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the configuration. Axolotl itself ignores unknown options.

        Raises:
            TSTError: For an option that is unknown, or does not work with superposition.
        """
        if tuple(map(int, version("axolotl").split(".")[:2])) < OLDEST:
            raise TSTError(f"Axolotl {version('axolotl')} is too old for this plugin: install axolotl>=0.21.")
        ours = [name for name in cfg if str(name).startswith(("tst_", "mtp_"))]
        check_names(ours, _HINTS, "Axolotl's configuration has no such option as", "see docs/axolotl.md.")
        for name in ours:
            if isinstance(cfg[name], bool) and "on" in get_args(_HINTS[name]):
                cfg[name] = "on" if cfg[name] else "off"  # as YAML reads these words
        for name, reason in REFUSED.items():
            if cfg.get(name):
                raise TSTError(
                    f"{name}: {cfg[name]} does not work with TokenSuperpositionPlugin: {reason}. Leave it out."
                )
        for name in ("datasets", "test_datasets", "pretraining_dataset"):
            for source in _as_sources(cfg.get(name)):
                check_source(source)

    def get_input_args(self) -> str:
        """The import path of the options' schema."""
        return f"{__name__}.TokenSuperpositionInput"

    def get_training_args_mixin(self) -> str:
        """The import path of a class that Axolotl's class of arguments inherits."""
        return f"{TSTArguments.__module__}.{TSTArguments.__name__}"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """The values of the options, and the order of the data."""
        values = {name: cfg.get(name) for name in _HINTS if cfg.get(name) is not None}
        if cfg.get("curriculum_sampling"):
            values["train_sampling_strategy"] = "sequential"
        return values

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Blocks of `sequence_len` tokens, for training and evaluation."""
        from axolotl.common.datasets import TrainDatasetMeta
        from axolotl.loaders import load_tokenizer

        tokenizer = load_tokenizer(cfg)
        streams = cfg.get("streaming")
        streaming = bool(cfg.get("pretraining_dataset") if streams is None else streams)
        sources = _as_sources(cfg.get("pretraining_dataset") or cfg.get("datasets"))
        train = [load_text(source, streaming) for source in sources]
        evaluation = [load_text(source, streaming=False) for source in _as_sources(cfg.get("test_datasets"))]
        held_out = cfg.get("val_set_size") or 0
        if held_out and not evaluation:
            parts = [text.split(held_out if held_out < 1 else held_out / len(train)) for text in train]
            train, evaluation = [rest for _, rest in parts], [first for first, _ in parts]
        options = {
            "tokenizer": tokenizer,
            "block_size": cfg["sequence_len"],
            "num_proc": cfg.get("dataset_num_proc"),
        }
        blocks = make_blocks(train, **options)
        logger.warning(
            f"The text is read and packed by hf_tst {'during' if streaming else 'before'} training, into blocks of "
            f"{cfg['sequence_len']} tokens, not by Axolotl."
        )
        eval_blocks = make_blocks(evaluation, **options) if evaluation else None
        # Without max_steps the trainer says how many steps num_epochs gives.
        return TrainDatasetMeta(blocks, eval_blocks, cfg.get("max_steps") or None)

    def get_trainer_cls(self, cfg: Any) -> type[Trainer]:
        """A trainer class with [`TSTTrainer`] as first parent and Axolotl's trainer as second."""
        from axolotl.core.trainers.base import AxolotlTrainer

        class TokenSuperpositionTrainer(TSTTrainer, AxolotlTrainer):
            # Axolotl's own orders are refused above, or those of rows that it packs.
            _get_train_sampler = Trainer._get_train_sampler

            def __init__(self, *, data_collator: Any = None, **kwargs: Any) -> None:
                # Axolotl's collators pad to multiples of 64, and there is nothing to pad.
                super().__init__(**kwargs)
                self.train_data_collator = self.eval_data_collator = self.data_collator

        return TokenSuperpositionTrainer


def _as_sources(entries: Any) -> list[dict[str, Any]]:
    """The sources of text that `datasets`, `test_datasets` or `pretraining_dataset` name."""
    entries = [entries] if isinstance(entries, (str, Mapping)) else entries or []
    return [dict(entry) if isinstance(entry, Mapping) else {"path": str(entry)} for entry in entries]


def check_source(source: Mapping[str, Any]) -> None:
    """Raise `TSTError` if a source in the configuration is not plain text."""
    path = source.get("path")
    check_names(
        source, SOURCE_KEYS, f"The data {path} is read as plain text, which has no option", "leave it out."
    )
    check_choice(f"The type of the data {path}", source.get("type") or TEXT_TYPES[0], TEXT_TYPES)


@dataclass(frozen=True)
class Text:
    """Rows of text.

    Args:
        rows: A data set or stream of `datasets`, or a [`TokenFile`].
        column (`str`, *optional*): The column of text, see [`tokenize_documents`].
        append_eos (`bool`): Whether each row is a document, and not a line of one.
    """

    rows: Any
    column: str | None
    append_eos: bool

    def split(self, held_out: float) -> tuple[Text, Text]:
        """The first rows, a share or a number of them, and the others.

        Raises:
            TSTError: If it is a stream, or one of both would be empty.
        """
        total = len(self.rows) if hasattr(self.rows, "num_rows") else 0
        count = round(total * held_out) if held_out < 1 else round(held_out)
        if not 0 < count < total:
            raise TSTError(
                f"val_set_size would hold out {count} of {total or 'a stream of'} rows: set it to 0, or give test_datasets."
            )
        first, rest = self.rows.select(range(count)), self.rows.select(range(count, total))
        return replace(self, rows=first), replace(self, rows=rest)


def load_text(source: Mapping[str, Any], streaming: bool) -> Text:
    """The text of one source.

    Raises:
        TSTError: If it cannot be read.
    """
    path, column = source["path"], source.get("field") or source.get("text_column")
    files = source.get("data_files") or []
    files = [files] if isinstance(files, str) else list(files)
    folder = Path(path) if Path(path).is_dir() else Path()
    names = [str(folder / file) for file in files] or [path]
    endings = {ending(name) for name in names}
    if endings <= {*ENDINGS, TOKEN_FILE_SUFFIX} and not any("://" in name for name in names):
        rows = _joined([load_text_file(name, streaming, column) for name in names])
    else:
        with bad_input(f"Cannot load {path}: ", (OSError, ImportError, ValueError), whole_message):
            rows = load_data_set(
                path,
                source.get("name"),
                split=source.get("split") or "train",
                data_files=files or None,
                revision=source.get("revision"),
                streaming=streaming,
            )
    if skipped := source.get("skip"):
        rows = rows.skip(skipped) if streaming else rows.select(range(skipped, len(rows)))
    return Text(rows, column, append_eos=endings != {".txt"})


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, TokenFile) for part in parts):
        raise TSTError(
            f"A file of token ids ({TOKEN_FILE_SUFFIX}) must be the only source of data: leave out the others."
        )
    import datasets

    return datasets.concatenate_datasets(parts)


def make_blocks(texts: list[Text], tokenizer: Any, block_size: int, num_proc: int | None = None) -> Any:
    """Blocks of all texts in their order, on disk, or cut during training from a stream."""
    if isinstance(texts[0].rows, TokenFile):
        return _joined([text.rows for text in texts]).cut(block_size)
    documents = _joined(
        [
            tokenize_documents(
                text.rows, tokenizer, text_column=text.column, append_eos=text.append_eos, num_proc=num_proc
            )
            for text in texts
        ]
    )
    return (pack_blocks if hasattr(documents, "num_rows") else BlockStream)(documents, block_size)
