"""Acceptance while training is what decoding will find: rounds counted by hand, and beside the
real decoding loop.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.cache.reader import HiddenCache
from deepspec.config.data import SamplingConfig
from deepspec.errors import OutOfMemory
from deepspec.evaluate.speculate import speculate
from deepspec.hidden.stage import run_capture
from deepspec.prompts.stage import run_prompts
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.generate import Decode
from deepspec.target.loading import load_target
from deepspec.train import validation
from deepspec.train.distributed import World
from deepspec.train.draft_artifact import make_draft
from deepspec.train.validation import Answers, draft_along, held_out_acceptance, load_answers
from tests.conftest import tiny_run

ALONE = World(0, 1, torch.device("cpu"))


class Knows:
    """A draft of blocks of 3 that knows the text, but for the tokens 9 and above."""

    block_size = 3

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.asked: list[tuple[int, ...]] = []

    def new_cache(self, rows: int, capacity: int) -> SimpleNamespace:
        return SimpleNamespace(lengths=[0] * rows)

    def extend(self, cache, context, following, counts) -> None:
        for row, count in enumerate(counts):
            start = cache.lengths[row]
            assert context[row, :count, 0].tolist() == [
                float(place) for place in range(start, start + count)
            ]
            assert following[row, :count].tolist() == self.rows[row][start + 1 : start + 1 + count]
        cache.lengths = [
            length + count for length, count in zip(cache.lengths, counts, strict=True)
        ]

    def propose(self, cache, anchor, sampling, uniforms) -> SimpleNamespace:
        assert [
            row[place] for row, place in zip(self.rows, cache.lengths, strict=True)
        ] == anchor.tolist()
        self.asked.append(tuple(cache.lengths))
        blocks = [
            (row[place + 1 : place + 4] + [0] * 3)[:3]
            for row, place in zip(self.rows, cache.lengths, strict=True)
        ]
        return SimpleNamespace(
            tokens=torch.tensor(
                [[0 if token >= 9 else token for token in block] for block in blocks]
            )
        )


def test_rounds_are_counted_as_decoding_counts_them():
    """Two answers in the first row; in the second a token that is never guessed."""
    ids = [[1, 2, 3, 4, 5, 6, 1, 2, 3, 4], [1, 1, 2, 9, 3, 4, 5, 6, 7, 0]]
    mask = [
        [False, False, True, True, True, True, False, True, True, True],
        [False, True, True, True, True, True, True, True, True, False],
    ]
    places = torch.arange(10.0).expand(2, 10)[..., None]
    draft = Knows(ids)
    found = draft_along(draft, Answers(torch.tensor(ids), mask, places))
    # Row 0: from 2, three accepted, the end; from 7, two accepted, the end. Row 1: from 1, one
    # accepted and the 9 corrected; from 3, three accepted and one added; from 7, the last one
    # accepted.
    assert found.tolist() == [3 + 2 + 2 + 4 + 1, 5]
    assert draft.asked == [(2, 1), (7, 3), (7, 7)]


@pytest.mark.parametrize("recipe", ["dspark-demo", "dflash-demo", "eagle3-demo"])
def test_over_greedy_answers_it_is_what_speculative_decoding_finds(
    demo_store: Path, tmp_path: Path, recipe: str
):
    """Drafts with weights of noise over 8 prompts; prompts whose answer the token limit cut off
    end where decoding does.
    """
    store = tmp_path / "store"
    shutil.copytree(demo_store, store)
    config = tiny_run(
        store,
        "answers.sampling.temperature=0",
        "prompts.limit=8",
        "target.dtype=float32",
        "target.layer_ids=[0, 1, 2]",
        recipe=recipe,
    )
    run_prompts(Run(config))
    run_answers(Run(config))
    run_capture(Run(config))
    cache = HiddenCache(Run(config).artifact("hidden"))
    draft = make_draft(config, cache, ALONE.device)
    numbers = [number for number in range(len(cache)) if cache.index.num_supervised[number] > 1]
    found = sum(
        (draft_along(draft, load_answers(cache, [number], ALONE.device)) for number in numbers),
        torch.zeros(2),
    )
    target, chat = (
        load_target(config.target, folder=target_folder(Run(config)), device="cpu"),
        load_chat(Run(config)),
    )
    settings = Decode(
        SamplingConfig(temperature=0.0),
        config.answers.max_new_tokens,
        chat.stop_ids(target.eos_ids),
    )
    wanted = torch.zeros(2)
    for number in numbers:
        sample = cache[number]
        prompt = sample.input_ids[: int(sample.loss_mask.long().argmax())].tolist()
        (trace,), _ = speculate(target, draft, [prompt], settings, seeds=[0])
        # Decoding counts what a last round had in hand beyond the limit; the cache ends there.
        rounds, committed, left = 0, 0, len(sample.input_ids) - len(prompt) - 1
        for added in trace.committed:
            rounds, committed = (
                rounds + (committed < left),
                committed + min(added, left - committed),
            )
        wanted += torch.tensor([committed, rounds])
    assert found.tolist() == wanted.tolist()
    assert held_out_acceptance(draft, cache, numbers, ALONE) == pytest.approx(
        float(found[0] / found[1])
    )
    assert draft.training


def test_answers_that_do_not_fit_together_are_drafted_along_in_parts(
    captured: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_run(captured)
    cache = HiddenCache(Run(config).artifact("hidden"))
    draft, numbers = make_draft(config, cache, ALONE.device), list(range(11))
    wanted = held_out_acceptance(draft, cache, numbers, ALONE)
    tried, along = list[int](), validation.draft_along

    def short(draft, answers):
        tried.append(len(answers.loss_mask))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return along(draft, answers)

    monkeypatch.setattr(validation, "draft_along", short)
    most = 2
    assert held_out_acceptance(draft, cache, numbers, ALONE) == wanted
    assert sum(rows for rows in tried if rows <= most) == len(numbers)
    most = 0
    with pytest.raises(OutOfMemory, match="cannot be drafted along") as caught:
        held_out_acceptance(draft, cache, numbers, ALONE)
    assert "train.acceptance_samples" in caught.value.fix
