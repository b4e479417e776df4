"""The in-process engine: the target itself answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from deepspec.config.run import RunConfig
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.conversation import AnswerRequest, Outcome, Refused, Turn
from deepspec.target.generate import Decode, generate
from deepspec.target.loading import load_target


class TransformersEngine:
    """The target in this process, `resources.memory.answer_rows` prompts decoded together."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.chat = config, load_chat(config)
        self.target = load_target(
            config.target, folder=target_folder(config), device=config.resources.devices.type
        )
        self.stop_ids = self.chat.stop_ids(self.target.generation_eos)

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        """Decode in batches of similar prompt length; which rows share a batch follows from the
        shard alone.
        """
        prompts = [self.chat.render(request.messages, request.tools) for request in requests]
        fitting: dict[int, list[int]] = defaultdict(list)  # by how long the answer may be
        for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            room = self.target.max_positions - request.max_new_tokens
            if len(prompt) > room:
                yield (
                    request,
                    Refused(
                        "too_long",
                        f"{len(prompt)} prompt tokens leave no room for the answer (at most {room})",
                    ),
                )
            else:
                fitting[request.max_new_tokens].append(index)
        for limit, indices in fitting.items():
            indices.sort(key=lambda index: len(prompts[index]))
            settings = Decode(self.config.answers.sampling, limit, self.stop_ids)
            for start in range(0, len(indices), self.config.resources.memory.answer_rows):
                batch = indices[start : start + self.config.resources.memory.answer_rows]
                seeds = [requests[index].seed for index in batch]
                done = generate(
                    self.target, [prompts[index] for index in batch], settings, seeds=seeds
                )
                for index, ids in zip(batch, done, strict=True):
                    finish, request = (
                        "stop" if ids[-1] in self.stop_ids else "length",
                        requests[index],
                    )
                    yield (
                        request,
                        Turn(
                            self.chat.decode(ids, self.stop_ids),
                            ids,
                            finish,
                            len(ids),
                            len(prompts[index]),
                            request.seed,
                        ),
                    )
