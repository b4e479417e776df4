"""What every section of a run is: frozen, without unknown keys, its fields documented in place."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings; the docstring below a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field holds, by its type: one, several to choose from, or none."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, Section) else []
    return [section for part in get_args(annotation) for section in sections_in(part)]


def nearest(word: str, known: Sequence[str], *, most: int = 1) -> str:
    """The question whether one of the most similar known words was meant; empty without any."""
    close = difflib.get_close_matches(word, known, n=most, cutoff=0.5)
    return f", did you mean {' or '.join(map(repr, close))}?" if close else ""
