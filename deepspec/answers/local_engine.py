"""The in-process engine: the target itself answers."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepspec.answers.read_prompts import ids_to_keep
from deepspec.artifacts.run import Run
from deepspec.errors import OutOfMemory
from deepspec.model.memory import Pieces, free_bytes, usable_bytes
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.conversation import AnswerRequest, Outcome, Refused, Turn
from deepspec.target.generate import Decode, generate
from deepspec.target.gpu_room import require_room
from deepspec.target.loading import load_target

log = logging.getLogger(__name__)

Answered = list[tuple[AnswerRequest, Outcome]]


class Prompt(NamedTuple):
    """A request whose answer fits into the target's context."""

    ids: list[int]
    request: AnswerRequest

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer, at most."""
        return len(self.ids) + self.request.max_new_tokens


class TransformersEngine:
    """The target in this process: as many prompts are decoded together as memory has room for, at
    most `resources.memory.answer_rows`.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        self.most_rows = config.resources.memory.answer_rows
        self.sampling = config.answers.sampling
        self.chat = load_chat(run)
        require_room(run, "answers")
        self.target = load_target(
            config.target,
            folder=target_folder(run),
            device=config.resources.devices.type,
            num_gpus=config.resources.devices.gpus_per_lane,
        )
        if config.resources.devices.cuda_graphs == "off":
            self.target.shelf.turn_off_graphs()
        self.stop_ids = self.chat.stop_ids(self.target.eos_ids)
        self.pieces = Pieces(self._decode, size=self._num_bytes, too_large=self._too_large)
        self.has_all_rows = True

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        """Decode in batches of similar prompt length.

        Raises:
            OutOfMemory: one prompt with its answer does not fit into memory.
        """
        by_limit: dict[int, list[Prompt]] = defaultdict(list)
        for request in requests:
            prompt = Prompt(self.chat.render(request.messages, request.tools), request)
            room = self.target.max_positions - request.max_new_tokens
            if len(prompt.ids) <= room:
                by_limit[request.max_new_tokens].append(prompt)
                continue
            why = f"{len(prompt.ids)} prompt tokens leave no room for the answer (at most {room})"
            yield request, Refused("too_long", why)
        for prompts in by_limit.values():
            prompts.sort(key=lambda prompt: len(prompt.ids))
            if self._num_bytes(prompts[-1:]) > free_bytes(self.target.device):
                raise self._too_large(prompts[-1])
            start = 0
            while start < len(prompts):
                rows = self._num_rows(prompts[start : start + self.most_rows])
                for answered in self.pieces(prompts[start : start + rows]):
                    yield from answered
                start += rows

    def _num_rows(self, prompts: Sequence[Prompt]) -> int:
        """How many of the prompts, from the first, shortest one on, are decoded together."""
        usable = usable_bytes(self.target.device)
        counts = range(len(prompts), 1, -1)
        rows = next((n for n in counts if self._num_bytes(prompts[:n]) <= usable), 1)
        if rows < len(prompts) and self.has_all_rows:
            self.has_all_rows = False
            log.warning(
                "stage=answers rows=%d instead of resources.memory.answer_rows=%d, which makes"
                " decoding slower: one row takes up to %.3f GB, and %.3f GB can be used on %s",
                rows,
                self.most_rows,
                self._num_bytes(prompts[-1:]) / 1e9,
                usable / 1e9,
                self.target.device,
            )
        return rows

    def _num_bytes(self, prompts: Sequence[Prompt]) -> int:
        """Of the cache with all rows as long as they can get; the last prompt is the longest."""
        return len(prompts) * self.target.row_bytes(prompts[-1].capacity)

    def _decode(self, prompts: Sequence[Prompt]) -> Answered:
        settings = Decode(self.sampling, prompts[0].request.max_new_tokens, self.stop_ids)
        seeds = [prompt.request.seed for prompt in prompts]
        answers = generate(self.target, [prompt.ids for prompt in prompts], settings, seeds=seeds)
        self.target.shelf.release()  # the next rows are planned with all of the memory
        return [
            (
                request,
                Turn(
                    text=self.chat.decode(token_ids, self.stop_ids),
                    token_ids=token_ids,
                    finish_reason="stop" if token_ids[-1] in self.stop_ids else "length",
                    num_tokens=len(token_ids),
                    num_prompt_tokens=len(ids),
                    seed=request.seed,
                    prompt_token_ids=ids_to_keep(self.chat, request, ids, rendered=ids),
                ),
            )
            for (ids, request), token_ids in zip(prompts, answers, strict=True)
        ]

    def _too_large(self, prompt: Prompt) -> OutOfMemory:
        device, limit = self.target.device, prompt.request.max_new_tokens
        need, free = self._num_bytes([prompt]) / 1e9, free_bytes(device) / 1e9
        return OutOfMemory(
            f"a prompt of {len(prompt.ids)} tokens and its answer of up to {limit} do not fit into"
            f" memory: their keys and values need {need:.3f} GB, {free:.3f} GB are free",
            where=f"prompt {prompt.request.id:016x}",
            fix=f"lower answers.max_new_tokens (here {limit}), leave out prompts that are so long,"
            " or answer on a device with more memory",
        )
