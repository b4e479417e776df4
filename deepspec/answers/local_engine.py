"""The in-process engine: the target itself answers."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from deepspec.artifacts.run import Run
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.conversation import AnswerRequest, Outcome, Refused, Turn
from deepspec.target.generate import Decode, generate
from deepspec.target.loading import load_target


class TransformersEngine:
    """The target in this process, `resources.memory.answer_rows` prompts decoded together."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.batch_rows = config.resources.memory.answer_rows
        self.sampling = config.answers.sampling
        self.chat = load_chat(run)
        self.target = load_target(
            config.target, folder=target_folder(run), device=config.resources.devices.type
        )
        self.stop_ids = self.chat.stop_ids(self.target.eos_ids)

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterator[tuple[AnswerRequest, Outcome]]:
        """Decode in batches of similar prompt length; the shard alone decides who shares one."""
        prompts = [self.chat.render(request.messages, request.tools) for request in requests]
        fitting: dict[int, list[int]] = defaultdict(list)  # by the answer's limit
        for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            room = self.target.max_positions - request.max_new_tokens
            if len(prompt) <= room:
                fitting[request.max_new_tokens].append(index)
                continue
            why = f"{len(prompt)} prompt tokens leave no room for the answer (at most {room})"
            yield request, Refused("too_long", why)
        for limit, indices in fitting.items():
            indices.sort(key=lambda index: len(prompts[index]))
            settings = Decode(self.sampling, limit, self.stop_ids)
            for start in range(0, len(indices), self.batch_rows):
                batch = indices[start : start + self.batch_rows]
                answers = generate(
                    self.target,
                    [prompts[index] for index in batch],
                    settings,
                    seeds=[requests[index].seed for index in batch],
                )
                for index, token_ids in zip(batch, answers, strict=True):
                    turn = Turn(
                        text=self.chat.decode(token_ids, self.stop_ids),
                        token_ids=token_ids,
                        finish_reason="stop" if token_ids[-1] in self.stop_ids else "length",
                        num_tokens=len(token_ids),
                        num_prompt_tokens=len(prompts[index]),
                        seed=requests[index].seed,
                    )
                    yield requests[index], turn
