"""The in-process engine: the target itself answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepspec.config import RunConfig
from deepspec.data.answers import Outcome, Refused, Request, Turn
from deepspec.data.chat import load_chat, target_folder
from deepspec.generate import Decode, generate
from deepspec.target import load_target


class TransformersEngine:
    """The target in this process, `resources.answer_rows` prompts decoded together."""

    keeps_journal = False

    def __init__(self, config: RunConfig) -> None:
        self.config, self.chat = config, load_chat(config)
        self.target = load_target(config.target, folder=target_folder(config), device=config.resources.device)
        stop_ids = self.chat.stop_ids(self.target.generation_eos)
        self.settings = Decode(config.answers.sampling, config.answers.max_new_tokens, stop_ids)

    def answer(self, requests: Sequence[Request], *, shard: int) -> Iterator[tuple[Request, Outcome]]:
        """Decode in batches of similar prompt length; which rows share a batch follows from the shard alone."""
        rows = self.config.resources.answer_rows
        prompts = [self.chat.render(request.messages, request.tools) for request in requests]
        room = self.target.max_positions - self.settings.max_new_tokens
        for request, prompt in zip(requests, prompts, strict=True):
            if len(prompt) > room:
                yield request, Refused("too_long", f"{len(prompt)} prompt tokens leave no room for the answer (at most {room})")
        fitting = sorted((index for index, prompt in enumerate(prompts) if len(prompt) <= room), key=lambda index: len(prompts[index]))
        for start in range(0, len(fitting), rows):
            batch = fitting[start : start + rows]
            seeds = [requests[index].seed for index in batch]
            done = generate(self.target, [prompts[index] for index in batch], self.settings, seeds=seeds)
            for index, ids in zip(batch, done, strict=True):
                finish = "stop" if ids[-1] in self.settings.stop_ids else "length"
                text, seed = self.chat.decode(ids), requests[index].seed
                yield requests[index], Turn(text, ids, finish, len(ids), len(prompts[index]), seed)
