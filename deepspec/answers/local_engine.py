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
        fitting: dict[int, list[tuple[list[int], AnswerRequest]]] = defaultdict(list)  # by limit
        for request in requests:
            prompt = self.chat.render(request.messages, request.tools)
            room = self.target.max_positions - request.max_new_tokens
            if len(prompt) <= room:
                fitting[request.max_new_tokens].append((prompt, request))
                continue
            why = f"{len(prompt)} prompt tokens leave no room for the answer (at most {room})"
            yield request, Refused("too_long", why)
        for limit, fits in fitting.items():
            fits.sort(key=lambda fit: len(fit[0]))
            settings = Decode(self.sampling, limit, self.stop_ids)
            for start in range(0, len(fits), self.batch_rows):
                prompts, batch = zip(*fits[start : start + self.batch_rows], strict=True)
                seeds = [request.seed for request in batch]
                answers = generate(self.target, prompts, settings, seeds=seeds)
                for prompt, request, token_ids in zip(prompts, batch, answers, strict=True):
                    yield (
                        request,
                        Turn(
                            text=self.chat.decode(token_ids, self.stop_ids),
                            token_ids=token_ids,
                            finish_reason="stop" if token_ids[-1] in self.stop_ids else "length",
                            num_tokens=len(token_ids),
                            num_prompt_tokens=len(prompt),
                            seed=request.seed,
                        ),
                    )
