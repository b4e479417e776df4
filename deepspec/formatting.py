"""Numbers as people read them: bytes, counts and hours, each with a unit. All units are decimal."""

from collections.abc import Sequence


def human_bytes(num_bytes: float) -> str:
    """Three significant digits and a unit: `36.0 TB`."""
    return human_count(num_bytes, units=("B", "kB", "MB", "GB", "TB", "PB"))


def human_count(count: float, *, units: Sequence[str] = ("", "k", "M", "G", "T")) -> str:
    """Three significant digits and a decimal unit: `36.0 TB`, `1.24 G`, `960`."""
    size = 0
    while count >= 999.5 and size < len(units) - 1:
        count, size = count / 1000, size + 1
    if size == 0:
        return f"{count:.3g} {units[0]}".strip()
    return f"{count:.{0 if count >= 99.95 else 1 if count >= 9.995 else 2}f} {units[size]}"


def human_hours(hours: float) -> str:
    """A duration in the unit that suits it, from seconds to days."""
    if hours < 1 / 60:
        return f"{3600 * hours:.2g} s"
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:,.1f} days"
