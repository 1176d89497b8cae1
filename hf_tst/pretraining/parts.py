"""The parts of a run, loaded and checked together: model, tokenizer and packed blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data.token_file import TokenFile
from ..training.arguments import TSTTrainingArguments
from ..training.refusals import check_model, check_optimizer, check_tokenizer
from ..training.schedule import make_schedule
from .documents import load_documents, prepare_blocks
from .model import explained_loading, load_model, load_tokenizer
from .options import DataArguments, ModelArguments, choose_block_size


def load_parts(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TSTTrainingArguments,
    load: Callable[[ModelArguments, Any], Any] = load_model,
) -> tuple[dict[str, Any], int]:
    """Load or make the model of a run, its tokenizer and its packed data.

    Args:
        model_args, data_args, args: The arguments of the run.
        load (*optional*, defaults to [`load_model`]): Makes the model, given `model_args` and the tokenizer.

    Returns:
        What [`TSTTrainer`] takes, by name: `model`, `train_dataset`, `eval_dataset` (`None` without evaluation data) and
        `processing_class` (the tokenizer; `None` where token files need none). And tokens per block, L.

    Raises:
        TSTError: If one of them cannot be loaded or made, or the blocks are longer than the model's context.
    """
    # The first process downloads and tokenizes; the others read its cache.
    with args.main_process_first(desc="preparing the data"):
        with explained_loading(data_args.dataset_name or data_args.train_file or "the standard library"):
            train_documents, eval_documents = load_documents(data_args, model_args)
        documents = [text for text in (train_documents, eval_documents) if text is not None]
        tokenizer = load_tokenizer(model_args, data_args, documents)
        model = load(model_args, tokenizer)
        if model.device.type != "meta":  # the model of a dry run has no weights to check with
            check_model(args, model)
        check_optimizer(args, model)
        if tokenizer is not None:
            check_tokenizer(tokenizer, model)
        for text in documents if args.process_index == 0 else ():  # once, since the file may be large
            if isinstance(text, TokenFile):
                text.check_ids(model.get_input_embeddings().num_embeddings)
        block_size = choose_block_size(data_args, model.config)
        if args.tst_enabled:
            make_schedule(args, 1).positions_per_row("superposition", block_size)  # or its refusal
        parts = {"model": model, "processing_class": tokenizer, "eval_dataset": None}
        parts["train_dataset"] = prepare_blocks(data_args, train_documents, tokenizer, block_size)
        if eval_documents is not None:
            parts["eval_dataset"] = prepare_blocks(
                data_args, eval_documents, tokenizer, block_size, evaluation=True
            )
    return parts, block_size
