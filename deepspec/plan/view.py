"""A plan as a terminal shows it: one line a number, with where it comes from."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from deepspec.formatting import human_bytes, human_hours
from deepspec.plan.cache_size import is_assumed
from deepspec.plan.parts import Fit, Histogram, MemoryPart, Number, Plan

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 100  # of a table that goes to a file or a pipe
FITS = {None: "", True: ", fits", False: ", does NOT fit"}
Line = tuple[str, str, str]  # what, how much, where the number comes from


def print_plan(plan: Plan, *, is_terminal: bool) -> None:
    """Print the whole plan, the verdict and the notes last; in a log as wide as its tables need."""
    console = Console(width=None if is_terminal else WIDTH, highlight=False)
    console.print(f"plan of {plan.run}: target {plan.target}, store {plan.store}")
    sections = {
        "tokens": plan.tokens._asdict(),
        "cache": plan.size._asdict(),
        "capture": plan.capture._asdict(),
        "training": plan.training._asdict(),
        "memory of a GPU": _peaks(plan.memory),
        "where training reads hidden states": {
            "options": plan.sources.options,
            "this run": plan.sources.chosen,
        },
    }
    for title, values in sections.items():
        if not values:
            continue
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
        table.add_column(min_width=21, no_wrap=True)
        table.add_column(min_width=32, no_wrap=True)  # all sections in line, within 80 columns
        table.add_column(style="dim")
        for name, value in values.items():
            for line in _lines(name.replace("_", " "), value):
                table.add_row(*line)
        console.print("", title, table, sep="\n")
    cheapest = f"cheapest is resources.training.source={plan.sources.best}: {plan.sources.reason}"
    notes = (f"note: {note}" for note in plan.notes)
    if plan.memory:
        console.print("", f"training: {plan.memory.training_fits}", sep="\n")
    console.print("", cheapest, _verdict(plan.fit), *notes, sep="\n")


def _peaks(memory: MemoryPart | None) -> dict[str, Number]:
    """Of each stage; none where there is no GPU to plan for."""
    values = memory._asdict().items() if memory else ()
    return {name: value for name, value in values if isinstance(value, Number)}


def _lines(name: str, value: Any) -> Iterator[Line]:
    """A value of the plan's JSON under its name there."""
    match value:
        case Number():
            yield name, value.show(value), value.origin
        case Histogram():
            yield f"tokens {name}", "p5 {} p50 {} p95 {} max {}".format(*value), ""
            # One character a bin, the fullest bin at full height, an empty one blank.
            fullest = max(*value.bins, 1)
            bars = (BARS[-(-count * (len(BARS) - 1) // fullest)] for count in value.bins)
            yield "", "".join(bars), f"0 to {value.max} tokens"
        case dict():
            for codec, size in value.items():
                origin = "ratio assumed" if is_assumed(codec) else "by arithmetic"
                yield codec, human_bytes(size), origin
        case tuple():
            for option in value:
                takes = f"{human_bytes(option.num_bytes)}, captured {option.captures:.3g} x"
                capture, whole = human_hours(option.capture_gpu_hours), human_hours(option.hours)
                hours = f"{capture} of capture, {whole} in all{FITS[option.fits]}"
                yield option.name, takes, hours
        case None:
            yield name, "unknown", ""
        case float():
            yield name, f"{value:.1%}", ""
        case _:
            yield name, f"{value}", ""


def _verdict(fit: Fit | None) -> str:
    if fit is None:
        return "fit: not known"
    if fit.free_bytes is None:
        return "fit: the store can be written to and has no known limit"
    needed, reserve = human_bytes(fit.needed_bytes), human_bytes(fit.reserve_bytes)
    verdict = "it fits" if fit.fits else "it does NOT fit"
    free = human_bytes(fit.free_bytes)
    return f"fit: {needed} missing + {reserve} reserve, {free} free: {verdict}"
