"""What is wrong with a run, as text: the field's path, what is allowed, the nearest right name."""

from collections.abc import Sequence
from typing import get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from deepspec.config.run import RunConfig
from deepspec.config.section import Section, nearest, sections_in

UNIONS = ("draft", "source")  # after these names pydantic puts the union's tag into a path


def explain(error: ValidationError) -> str:
    """All wrong fields of a run, each with its reason."""
    found = error.errors()
    around = {detail["loc"][:end] for detail in found for end in range(len(detail["loc"]))}
    # a list is no shorter for an entry that is wrong
    causes = [
        detail for detail in found if detail["type"] != "too_short" or detail["loc"] not in around
    ]
    return "; ".join(map(_explain, causes))


def _explain(detail: ErrorDetails) -> str:
    loc = [str(part) for part in detail["loc"]]
    shown = [part for before, part in zip(["", *loc], loc, strict=False) if before not in UNIONS]
    field = ".".join(shown) or "run"
    if detail["type"] == "extra_forbidden":
        allowed = _allowed_fields(loc[:-1])
        meant = nearest(loc[-1], allowed)
        return f"{field}: there is no such field{meant}; allowed here: {', '.join(allowed)}"
    message = detail["msg"].removeprefix("Value error, ")
    if expected := str(detail.get("ctx", {}).get("expected", "")).replace("'", ""):
        message += nearest(str(detail["input"]), expected.replace(" or ", ", ").split(", "))
    if detail["type"] not in ("missing", "value_error"):
        message += f" (given: {detail['input']!r})"
    return f"{field}: {message}"


def _allowed_fields(loc: Sequence[str]) -> list[str]:
    """Names of the fields of the section at an error's location."""
    sections: list[type[Section]] = [RunConfig]
    for key in loc:
        fields = [section.model_fields[key] for section in sections if key in section.model_fields]
        inner = [section for field in fields for section in sections_in(field.annotation)]
        # else the key is the tag of one of a union's sections, the index of a list, or a stage
        sections = (
            inner or [section for section in sections if _is_tagged(section, key)] or sections
        )
    return sorted({name for section in sections for name in section.model_fields})


def _is_tagged(section: type[Section], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in section.model_fields.values())
