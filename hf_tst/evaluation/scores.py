"""How well a checkpoint predicts text: next-token loss, perplexity, bits per byte."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import TSTError
from ..models.shape import context_length
from .breakdown import IGNORED, LossTally, evaluating

METRIC_FILE = Path(__file__).parent / "metric.py"
# Default limit of tokens per window: some models have a context too long for any memory.
LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class TextScores:
    """How well a model predicts texts.

    Args:
        nats (`float`): Sum of the negative log-likelihoods of all tokens.
        tokens (`int`): Tokens predicted: all tokens of every text, the first one from the token that begins a text.
        bytes (`int`): Bytes of the texts in UTF-8.
        loss_by_frequency, loss_by_position (`list[float]`): Ten means each, see [`LossTally`].
    """

    nats: float
    tokens: int
    bytes: int
    loss_by_frequency: list[float | None]
    loss_by_position: list[float | None]

    @property
    def loss(self) -> float:
        """Next-token loss, nats per token; comparable between models of one tokenizer only."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if it overflows a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; comparable between all models."""
        return self.nats / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """`loss`, `perplexity`, `bits_per_byte`, `tokens`, `bytes`, `loss_by_frequency` and `loss_by_position`."""
        names = (
            "loss",
            "perplexity",
            "bits_per_byte",
            "tokens",
            "bytes",
            "loss_by_frequency",
            "loss_by_position",
        )
        return {name: getattr(self, name) for name in names}


def evaluate_checkpoint(
    checkpoint: str | Path,
    texts: Iterable[str],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint and measure how well it predicts texts.

    Args:
        checkpoint: A folder or Hub id with a causal language model and its tokenizer.
        texts: Texts to predict, each from its first token on.
        max_length (`int`, *optional*), batch_size (`int`, *optional*, defaults to 8): See [`score_texts`].
        device (`str`, *optional*): Such as `"cuda"`; by default a GPU if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights; the checkpoint's by default.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code of a model or tokenizer that comes with the
            checkpoint.

    Returns:
        `dict`: `loss`, `perplexity`, `bits_per_byte`, `tokens`, `bytes`, and ten means each of `loss_by_frequency` and
            `loss_by_position`; see [`TextScores`].

    Raises:
        TSTError: As [`score_texts`].
        OSError: If the checkpoint cannot be loaded.

    Example:
        >>> evaluate_checkpoint("runs/quickstart", ["import os\\n", "def f():\\n    return 1\\n"])["loss"]  # doctest: +SKIP
        5.31
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = _listed(texts)  # before anything is loaded
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    code = {"trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **code).to(device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **code)
    return score_texts(model, tokenizer, texts, max_length=max_length, batch_size=batch_size).to_dict()


def score_texts(
    model: Any, tokenizer: Any, texts: Iterable[str], *, max_length: int | None = None, batch_size: int = 8
) -> TextScores:
    """Predict every token of every text once.

    A text longer than `max_length` is cut into consecutive windows. The first token of a window is predicted from the
    last token of the window before, the first token of a text from `bos`, or `eos` without one. The last
    window is extended to the left to full length. lm-evaluation-harness does the same.

    Args:
        model (`PreTrainedModel`): A causal language model; put in evaluation mode during the call.
        tokenizer: Its tokenizer. It adds no special tokens.
        texts: The texts; empty ones are left out.
        max_length (`int`, *optional*): Tokens per window, at least 1; by default the model's context, up to 2048.
        batch_size (`int`, *optional*, defaults to 8): Windows per batch.

    Returns:
        [`TextScores`]: The sum over all tokens, with `loss`, `perplexity` and `bits_per_byte`.

    Raises:
        TSTError: If there is no text, texts is a single `str` or holds something else, or there is no token to begin one with.
    """
    texts = _listed(texts)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise TSTError("The tokenizer has neither a bos nor an eos token to begin a text with: add one.")
    context = context_length(model.config)
    length = min(context or LONGEST_WINDOW, LONGEST_WINDOW) if max_length is None else max_length
    if length < 1 or length > (context or length):
        allowed = f"from 1 to the model's context of {context}" if context else "at least 1"
        raise TSTError(f"max_length must be {allowed}, but is {length}.")
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    windows = [window for ids in encoded for window in _windows([first, *ids], length)]
    if not windows:
        raise TSTError("There is no text to predict: give at least one text that is not empty.")
    windows.sort(key=lambda window: len(window[0]))
    tally = LossTally()
    with evaluating(model):
        for start in range(0, len(windows), batch_size):
            _add(tally, model, windows[start : start + batch_size], first)
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(predicted for _, predicted in windows)
    return TextScores(tally.nats, tokens, size, tally.loss_by_frequency(), tally.loss_by_position())


def _listed(texts: Iterable[str]) -> list[str]:
    """The texts that are not empty, checked. Null is an empty text."""
    if isinstance(texts, str):
        raise TSTError("texts is a str, which would be scored letter by letter: put it in a list.")
    found = [text for text in texts if text]
    for text in found:
        if not isinstance(text, str):
            raise TSTError(
                f"texts must hold text, but holds {reprlib.repr(text)}: give the texts themselves, such as rows['text']."
            )
    return found


def _windows(ids: Sequence[int], length: int) -> Iterator[tuple[list[int], int]]:
    """Pieces of up to `length + 1` tokens, and the number of tokens at the end of each to predict."""
    for start in range(0, len(ids) - 1, length):
        end = min(start + length + 1, len(ids))
        yield list(ids[max(0, end - length - 1) : end]), end - start - 1


def _add(tally: LossTally, model: Any, windows: Sequence[tuple[list[int], int]], filler: int) -> None:
    """Add the losses of some windows' predicted tokens."""
    inputs = [torch.tensor(ids[:-1]) for ids, _ in windows]
    predicted = [torch.tensor([IGNORED] * (len(ids) - 1 - count) + ids[-count:]) for ids, count in windows]
    tokens, targets = pad_sequence(inputs, True, filler), pad_sequence(predicted, True, IGNORED)
    mask = pad_sequence([torch.ones_like(row) for row in inputs], True)
    # By name, since it is not the second argument of every model (MPT, Mamba).
    logits = model(tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    tally.add(logits, targets)
