"""Checks that a target is as drafts expect it: taps, final norm, padding, cache, loss mask.

T tokens, m captured layers, D hidden size, V vocabulary.
"""

import math
import sys
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deepspec.config.target import TargetConfig
from deepspec.messages import Message
from deepspec.target.attention import own_attention
from deepspec.target.chat import CHAT_FAMILIES, Chat, build_samples
from deepspec.target.generate import pad_right, prefill
from deepspec.target.model import Target

NUM_ROWS, SHORTEST = 3, 24
NEW_TOKENS = 12  # that a check of decoding adds to a row
ROUNDING = 1e-4  # in float32, relative to the largest value
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
CONVERSATION = (
    ("What is two plus two?", "It is four."),
    ("And doubled?", "Eight, then.\nAnything else?"),
)


class Check(NamedTuple):
    """One quantity of one case or model: its largest error, and the largest one allowed."""

    quantity: str
    error: float
    tolerance: float = 0.0
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance  # False for NaN


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ, 0 for tensors without elements."""
    if found.shape != wanted.shape:
        return math.inf
    if not found.numel():
        return 0.0
    return (found.detach().double() - wanted.double()).abs().max().item()


def print_checks(checks: dict[str, list[Check]], *, subject: str) -> bool:
    """Print the table of all checks, and return whether every one of them passed."""
    table = Table(subject, "quantity", "largest error", "allowed", "", "where")
    for name, found in checks.items():
        for number, check in enumerate(found):
            table.add_row(
                name if number == 0 else "",
                check.quantity,
                f"{check.error:.1e}",
                f"{check.tolerance:.1e}",
                "ok" if check.passed else "[bold red]OUTSIDE[/]",
                check.note,
            )
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a log keeps its rows whole
    return all(check.passed for found in checks.values() for check in found)


def spread(num_layers: int) -> tuple[int, ...]:
    """The embedding output, the first, a middle and the last layer but one."""
    layers = sorted({-1, 0, num_layers // 2, num_layers - 2})
    return tuple(layer for layer in layers if -1 <= layer < num_layers - 1)


def make_rows(target: Target) -> list[list[int]]:
    """Token ids of one length, beyond the sliding window where the target has one."""
    length = min(max(SHORTEST, target.window + 2 * NEW_TOKENS), target.max_positions - NEW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    largest_id = target.text_config.vocab_size - 1
    ids = torch.randint(largest_id, (NUM_ROWS, length), generator=generator)
    return [row.tolist() for row in ids]


def check_target(target: Target, rows: Sequence[Sequence[int]]) -> list[Check]:
    """Taps, final norm, padding and cache, each against transformers' own plain forward pass,
    with its own attention.
    """
    ids = pad_right(rows, target.device)
    with torch.inference_mode(), own_attention(target.decoder):
        wanted = target.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    output = target.forward(ids)
    layers = list(target.layer_ids)
    states = torch.cat([wanted.hidden_states[layer + 1] for layer in layers], -1)
    head = relative_distance(target.logits(output.last_hidden), wanted.logits)
    padding, cached = _rows_alone(target, rows)
    lengths = f"rows of different lengths, up to {len(rows[0])} tokens"
    return [
        Check(
            "layer taps",
            relative_distance(output.context, states),
            ROUNDING,
            f"layers {layers} of hidden_states",
        ),
        Check("final norm and lm_head", head, ROUNDING, "the model's own logits"),
        Check("padded rows", padding, ROUNDING, "a row in a batch is the row alone"),
        Check("cached and uncached", cached, ROUNDING, lengths),
    ]


def _rows_alone(target: Target, rows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Largest errors of right-padded rows, and of rows continued from a cache.

    Each row has its own length.
    """
    ragged = [row[: len(row) - 5 * number] for number, row in enumerate(rows)]
    together = target.forward(pad_right(ragged, target.device)).last_hidden
    cache = target.new_cache(len(rows), len(rows[0]))
    prefill(target, cache, [row[:-4] for row in ragged])
    steps = []
    for size in (1, 3):  # one token as in plain decoding, then several as in verification
        starts = zip(ragged, cache.lengths, strict=True)
        new = [row[length : length + size] for row, length in starts]
        steps.append(target.forward(torch.tensor(new, device=target.device), cache))
        cache.lengths = [length + size for length in cache.lengths]
    padding = cached = 0.0
    for number, row in enumerate(ragged):
        alone = target.forward(pad_right([row], target.device))
        padded = together[number, : len(row)]
        padding = max(padding, relative_distance(padded, alone.last_hidden[0]))
        for part in (0, 1):  # the context, then the final hidden states
            continued = torch.cat([step[part][number] for step in steps])
            cached = max(cached, relative_distance(continued, alone[part][0, -4:]))
    return padding, cached


def relative_distance(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference, relative to the largest value."""
    return distance(found, wanted) / max(wanted.abs().max().item(), 1e-9)


def check_chat(folder: Path, settings: TargetConfig) -> list[Check]:
    """The loss mask decodes to exactly the answers and their ends of turn (traps B1 to B5)."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return [Check("loss mask", 0.0, note="not checked: there is no tokenizer in the folder")]
    chat = Chat(AutoTokenizer.from_pretrained(str(folder)), settings)
    turns, history = [], []
    for question, answer in CONVERSATION:
        history.append(Message("user", question))
        turns.append((chat.render(history), chat.answer_ids(answer, finished=True)))
        history.append(Message("assistant", answer))
    supervised = [token for sample in build_samples(turns) for token in compress(*sample)]
    end = CHAT_FAMILIES[settings.chat_family].end_of_turn
    wanted = "".join(answer + end for _, answer in CONVERSATION)
    text = chat.tokenizer.decode(supervised)
    return [Check("loss mask decodes to the answers", float(text != wanted), note=repr(text)[:60])]
