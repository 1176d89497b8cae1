"""The fenced blocks of the repository's Markdown, and the command lines of a block of shell."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "model_cards/**/*.md")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts
)


@dataclass(frozen=True)
class Block:
    """A block of code as Markdown has it; `line` is that of its first line, from 1."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str = "page.md") -> list[Block]:
    """Fenced blocks, and indented ones, whose language is empty."""
    return [
        Block(page, token.map[0] + 2, token.info.strip(), token.content)
        for token in MarkdownIt("commonmark").parse(text)
        if token.type in ("fence", "code_block") and token.map
    ]


def all_blocks() -> list[Block]:
    return [
        block
        for path in PAGES
        for block in blocks_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


def find_block(page: str, language: str, holding: str = "") -> Block:
    """The one block of a page in a language that holds some text."""
    found = [b for b in all_blocks() if (b.page, b.language) == (page, language) and holding in b.text]
    assert len(found) == 1, found
    return found[0]


def commands_of(text: str) -> list[list[str]]:
    """The words of every command line, without comments; a pipe or the like is a word of its own."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)
