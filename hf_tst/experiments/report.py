"""The report of a comparison: tables, curves, and one HTML page with both."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..records.text_tables import escape_markdown, format_columns, markdown_table
from .arms import BASELINE
from .loss_breakdown import TITLES
from .options import UNITS
from .pictures import draw, encode_pictures, pictures
from .summary import Comparison
from .tables import describe_rate, lowest_cell, tables


def format_comparison(comparison: Comparison) -> str:
    """The comparison as tables of text, for a terminal: arms in columns, or the panels of a grid."""
    parts = tables(comparison)
    arms = parts.pop("Arms")
    # An arm is a column where it has many values.
    texts = [
        f"{title}\n{format_columns([*zip(*rows, strict=True)] if title in TITLES else rows)}"
        for title, rows in parts.items()
    ]
    if not comparison.grid:
        texts.insert(0, format_columns([*zip(*arms, strict=True)]))
    ends = verdicts(comparison) if not comparison.grid else []
    return "\n\n".join([*texts, *_captions(comparison)[1:], *comparison.notes, *ends])


def make_title(comparison: Comparison) -> str:
    """What is compared, and what is equal."""
    equal = f"at equal {UNITS[comparison.budget]}"
    if comparison.grid:
        return f"Sweep over {len(comparison.grid)} kinds of superposition, {equal}"
    names = [arm.arm for arm in comparison.arms]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) + f", {equal}"


def verdicts(comparison: Comparison) -> list[str]:
    """A sentence for each arm: ahead of the baseline or behind, by how much, in how many seeds."""
    sentences = []
    for arm in comparison.arms:
        mean, sd, by_seed = (
            arm.difference_to_baseline,
            arm.difference_to_baseline_sd,
            arm.differences_to_baseline,
        )
        if mean is None:
            continue
        same = sum(difference * mean > 0 for difference in by_seed.values())
        seeds = f"in {same} of {len(by_seed)} seeds" if len(by_seed) > 1 else "one seed only"
        spread = "" if sd is None else f" ± {sd:.3f}"
        place = "ahead of" if mean < 0 else "behind"
        sentences.append(f"{arm.arm} is {place} the baseline by {abs(mean):.3f}{spread} nats, {seeds}.")
    return sentences


def _captions(comparison: Comparison) -> list[str]:
    captions = [
        f"Equal {UNITS[comparison.budget]}. Loss: next-token, nats per token, at the end of training, mean ± standard deviation "
        "over seeds; vs baseline: mean difference of runs with the same seed. Tokens, FLOPs and time are those of one run."
    ]
    for arm in comparison.arms if comparison.grid else []:
        if arm.arm == BASELINE:
            captions.append(f"Without superposition: {describe_rate(arm.best)}.")
    if lowest := lowest_cell(comparison):
        alone = ", of one seed" if len(lowest.best.final_eval_losses) == 1 else ""
        captions.append(f"Lowest: {lowest.arm}, {describe_rate(lowest.best)}{alone}.")
    return captions


def _code(text: str) -> str:
    """Text as a code span, whatever backticks it contains."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def render_page(comparison: Comparison, template: str, images: Mapping[str, str] | None = None) -> str:
    """The comparison as `comparison.md`, or as `comparison.html`, which needs no file beside it and fits screens and paper.

    Args:
        comparison ([`Comparison`]): The comparison.
        template (`str`): `"comparison.md"` or `"comparison.html"`.
        images (`dict`, *optional*): Of [`encode_pictures`]; Markdown names `comparison.png` if there are any.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("hf_tst.records"), autoescape=select_autoescape(), trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"markdown": escape_markdown, "code": _code, "table": markdown_table}
    return environment.get_template(template).render(
        title=make_title(comparison), verdicts=[] if comparison.grid else verdicts(comparison),
        captions=_captions(comparison), tables=tables(comparison), facts=comparison.facts,
        notes=comparison.notes, pictures=images or {}, has_curves=not comparison.grid,
    )  # fmt: skip


def write_report(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `comparison.json`, `.md`, `.html` and, with matplotlib, `.png` into a folder, and return their paths.

    A picture that fails does not take the figures with it: the pages are then written without pictures.
    """
    images, files = {}, {"json": (json.dumps(comparison.to_dict(), indent=2) + "\n").encode()}
    try:
        with suppress(ImportError):
            files["png"] = draw(pictures(comparison).values(), 5.5, 4, dpi=120)
            images = encode_pictures(comparison)
    finally:
        for ending in ("md", "html"):
            files[ending] = render_page(comparison, f"comparison.{ending}", images).encode()
        for ending, content in files.items():
            (Path(folder) / f"comparison.{ending}").write_bytes(content)
    return [Path(folder) / f"comparison.{ending}" for ending in files]
