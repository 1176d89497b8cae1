"""Write the tables of model families in `docs/families.md`, long and short, from what tiny models of each do.

Nothing in the table is written by hand: where the embeddings are scaled, what is added to them, and whether the loss is fused
is measured on the models of `tests/tiny_families.py`, the same that `tests/test_families.py` trains.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tables import ROOT, parse, write_table
from torch import Tensor, nn

from hf_tst.models.head import UnfusableHeadError, computes_own_loss, inspect_head
from hf_tst.models.superposition import find_language_model
from hf_tst.mtp.losses import decoder_layers
from hf_tst.records.text_tables import markdown_table

sys.path.insert(0, str(ROOT / "tests"))

from tiny_families import FAMILIES, VOCAB_SIZE, Family, make_family

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COLUMNS = ("family", "`model_type`", "averaged embedding", "fused loss", "note")


def describe(family: Family) -> tuple[str, ...]:
    """The family's row of the table, one text a column, measured on its tiny model."""
    model = make_family(family).eval()
    try:
        computes_own_loss(find_language_model(model)[1])
    except ValueError as error:
        reason = str(error).split(", so ")[0].removeprefix(f"{type(model).__name__} ")
        return family.name, f"`{family.model_type}`", "refused", "-", f"it {reason}"
    notes = [family.note] if family.note else []
    if any(name.endswith("Experts") or "MoE" in name or "Moe" in name for name in _class_names(model)):
        notes.append("mixture of experts" + (", auxiliary loss over bags" if _has_aux_loss(model) else ""))
    fused, reason = _describe_loss(model)
    notes += [reason] if reason else []
    return family.name, f"`{family.model_type}`", _describe_embedding(model), fused, "; ".join(notes)


def summary(rows: Sequence[tuple[str, ...]]) -> str:
    """The table's rows, without its head, in short: the names of families by kind."""
    kinds: dict[str, list[str]] = {
        "attention": [],
        "mixture of experts": [],
        "state space, recurrent, hybrid": [],
    }
    refused = []
    for name, _, embedding, _, note in rows:
        if embedding == "refused":
            refused.append(name)
        elif "mixture of experts" in note:
            kinds["mixture of experts"].append(name)
        elif any(word in note for word in ("state space", "recurrent", "linear attention", "convolutions")):
            kinds["state space, recurrent, hybrid"].append(name)
        else:
            kinds["attention"].append(name)
    kinds["refused, with the reason"] = refused
    return markdown_table(
        [("kind", "families"), *((kind, ", ".join(names)) for kind, names in kinds.items())]
    )


@contextmanager
def watch_first_block(model: Any) -> Iterator[list[Tensor]]:
    """Context that keeps what the first layer of a model is given: embeddings, scaled and with positions."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = decoder_layers(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def measure_embedding(model: Any) -> tuple[float, float | None, bool]:
    """What a model does with a token's row of the embedding matrix before its first layer.

    Returns:
        Factor that the embedding module applies; factor that the model applies after it, `None` if what it does is
        not linear; whether something that depends on the position only is added.
    """
    one, other = (torch.arange(1, 9)[None] + offset for offset in (0, VOCAB_SIZE // 2))
    embedding = model.get_input_embeddings()
    with watch_first_block(model) as seen:
        model(input_ids=one)
        model(input_ids=other)
    first, second = seen
    e1, e2 = embedding(one), embedding(other)
    inside = _ratio(e1, embedding.weight[one])
    assert inside is not None, "the embedding module is not linear"
    factor = _ratio(first - second, e1 - e2)
    adds = factor is not None and bool((first - factor * e1).abs().max() > 1e-5)
    return inside, factor, adds


def _ratio(found: Tensor, given: Tensor) -> float | None:
    """The number that `found` is `given` times, if there is one."""
    if found.shape != given.shape:
        return None
    factor = ((found * given).sum() / (given * given).sum()).item()
    return factor if torch.allclose(found, factor * given, rtol=1e-3, atol=1e-5) else None


def _describe_embedding(model: Any) -> str:
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    inside, factor, adds = measure_embedding(model)
    text = f"`{name}`" + _times(inside, embedding.weight.shape[1], " inside it")
    if factor is None:
        return text + ", then normalized"
    return (
        text
        + _times(factor, embedding.weight.shape[1], " after the mean")
        + (", then positions" if adds else "")
    )


def _times(factor: float, width: int, where: str) -> str:
    if abs(factor - 1) < 1e-4:
        return ""
    return f", \N{MULTIPLICATION SIGN} {'√d' if abs(factor - width**0.5) < 1e-2 else f'{factor:.4g}'}{where}"


def _describe_loss(model: Any) -> tuple[str, str]:
    """Whether the loss is fused, and why not."""
    try:
        head = inspect_head(model)
    except UnfusableHeadError as error:
        return "no", f"all logits: {error}"
    parts = ["bias"] if head.module.bias is not None else []
    parts += [f"scale {head.logit_scale:.4g}"] if head.logit_scale != 1 else []
    parts += [f"cap {head.softcap:g}"] if head.softcap is not None else []
    return f"yes ({', '.join(parts)})" if parts else "yes", ""


def _class_names(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


@torch.no_grad()
def _has_aux_loss(model: Any) -> bool:
    outputs = model(input_ids=torch.arange(1, 9)[None])
    return getattr(outputs, "aux_loss", None) is not None


def main() -> None:
    output = parse(__doc__).output or "docs/families.md"
    rows = list(map(describe, FAMILIES))
    write_table(output, "families", markdown_table([COLUMNS, *rows]))
    write_table(output, "summary", summary(rows))


if __name__ == "__main__":
    main()
