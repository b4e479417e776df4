"""One serving engine as an evaluation uses it: prompts in, tokens and seconds out, and its
counters.
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import httpx

from deepspec.config.servers import ServersConfig
from deepspec.errors import ArtifactMismatch, ConfigError, DataError, TransientError
from deepspec.evaluate.engine_counters import EngineCounts, read_counts
from deepspec.evaluate.prompts import RenderedPrompt
from deepspec.messages import Message
from deepspec.process.machine import is_loopback
from deepspec.serving.protocol import KEY_REFUSED, RETRIED, SEEDS

log = logging.getLogger(__name__)

CHECK_S = 30.0  # that a server may take to describe itself
COUNTED_S = 5.0  # that its counters may be late
LOOK_S = 0.02
REST_S = 1.0  # between two looks at whether a server is back


Side = Literal["plain", "draft"]
WHAT: dict[Side, str] = {
    "plain": "the server of the target alone",
    "draft": "the server with the draft",
}


class Question(NamedTuple):
    """One turn to answer: the conversation, and how it must be rendered."""

    messages: list[Message]
    prompt: RenderedPrompt
    seed: int
    fields: Mapping[str, Any]  # of the request: how it is drawn, and where it ends


class ServedAnswer(NamedTuple):
    """What a server answered, and how long it took to."""

    token_ids: list[int]
    seconds: float


class ServedGroup(NamedTuple):
    """Questions answered with a number of them in flight."""

    answers: list[ServedAnswer]
    seconds: float  # of all together
    counts: EngineCounts  # what they added to the server's counters


class EngineClient:
    """A connection to one server."""

    def __init__(
        self,
        url: str,
        servers: ServersConfig,
        *,
        model: str,
        side: Side,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`model` is the name that it serves under; `check` raises where it will not come back."""
        self.url, self.model, self.side, self.check = url, model, side, check
        self.what = WHAT[side]
        self.max_positions = 0  # tokens of a prompt with its answer, as `check_server` finds them
        self._back_s = servers.lost_s
        self.root = url.removesuffix("/v1")
        self._variable = servers.api_key_env
        self._key = os.environ.get(servers.api_key_env, "")  # neither printed nor logged
        self.http = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=servers.request_timeout_s,
            trust_env=not is_loopback(url),  # a proxy does not reach the servers of this machine
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request

    def _send(self, method: str, url: str, **rest: Any) -> httpx.Response:
        """The server's reply.

        Raises:
            TransientError: there is none, or the server is too busy or at fault.
            ConfigError: it refuses the key, or the request.
        """
        try:
            reply = self.http.request(method, url, **rest)
        except httpx.HTTPError as error:
            what = f"{self.what} cannot be reached ({type(error).__name__}: {error})"
            raise TransientError(what, where=url, fix="start it again; it is tried again") from None
        if reply.is_success:
            return reply
        text = reply.text[:1000].replace(self._key, "***") if self._key else reply.text[:1000]
        status = reply.status_code
        if status in KEY_REFUSED:
            state = "refused" if self._key else "not set"
            what = f"{self.what} requires a key ({status}), and {self._variable} is {state}"
            raise ConfigError(what, where=url, fix=f"set {self._variable} to its key")
        what = f"{self.what} answers {status}: {text}"
        if status in RETRIED or status >= 500:
            raise TransientError(what, where=url, fix="see its log; it is tried again")
        raise ConfigError(what, where=url, fix="check resources.servers, and see its log")

    def wait_until_up(self) -> None:
        """Return once it reports that it is healthy, or after as long as it may take to start.

        Raises:
            TransientError: it was given up.
        """
        deadline = time.monotonic() + self._back_s
        while time.monotonic() < deadline:
            self.check()
            with suppress(ConfigError, TransientError):
                self._send("GET", f"{self.root}/health", timeout=CHECK_S)
                return
            time.sleep(REST_S)

    def version(self) -> str | None:
        """The version of vLLM; None where the server does not report one."""
        try:
            return str(self._send("GET", f"{self.root}/version", timeout=CHECK_S).json()["version"])
        except (ConfigError, ValueError, KeyError):
            return None

    def max_tokens(self) -> int | None:
        """The longest prompt with its answer that the server takes; None where it does not list it.

        Raises:
            ConfigError: it serves another model.
        """
        model = self.model
        listed = self._json("GET", f"{self.url}/models", timeout=CHECK_S).get("data") or []
        names = [entry["id"] for entry in listed]
        if model not in names:
            what = f"{self.what} serves {', '.join(names) or 'nothing'}, not {model}"
            fix = "correct the endpoint, or set resources.servers.model_name"
            raise ConfigError(what, where=self.url, fix=fix)
        found = listed[names.index(model)].get("max_model_len")
        return None if found is None else int(found)

    def _json(self, method: str, url: str, **rest: Any) -> dict[str, Any]:
        try:
            found = self._send(method, url, **rest).json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            fix = "give the URL of an OpenAI-compatible server, with its /v1"
            raise ConfigError(f"{self.what} does not answer in JSON", where=url, fix=fix)
        return found

    def counts(self) -> tuple[EngineCounts, list[str]]:
        """Its counters, and the names of those that it does not have."""
        url = f"{self.root}/metrics"
        try:
            return read_counts(self._send("GET", url, timeout=CHECK_S).text)
        except (ConfigError, ValueError) as error:
            what = f"{self.what} has no metrics to read: {str(error).splitlines()[0]}"
            fix = "evaluate with a vLLM server, with its metrics on"
            raise ConfigError(what, where=url, fix=fix) from None

    def ask(self, question: Question) -> ServedAnswer:
        """The answer to one question.

        Raises:
            ArtifactMismatch: the server rendered another prompt.
            DataError: it does not return the tokens that it drew.
        """
        body = {
            **question.fields,
            "model": self.model,
            "messages": [message.entry() for message in question.messages],
            "seed": question.seed % SEEDS,
            "return_token_ids": True,
            "cache_salt": uuid.uuid4().hex,  # no prompt is found in the cache of an earlier one
        }
        started = time.perf_counter()
        reply = self._json("POST", f"{self.url}/chat/completions", json=body)
        seconds = time.perf_counter() - started
        (choice,) = reply.get("choices") or [{}]
        token_ids, prompt_ids = choice.get("token_ids"), reply.get("prompt_token_ids")
        if not token_ids or prompt_ids is None:
            what = f"{self.what} does not return the tokens that it drew (return_token_ids)"
            fix = "evaluate with vLLM 0.10.2 or newer"
            raise DataError(what, where=self.url, fix=fix)
        if prompt_ids != question.prompt.input_ids:
            raise self._rendered_otherwise(prompt_ids, question.prompt.input_ids)
        return ServedAnswer(token_ids, seconds)

    def _rendered_otherwise(self, theirs: Sequence[int], ours: Sequence[int]) -> ArtifactMismatch:
        pairs = enumerate(zip(theirs, ours, strict=False))
        place = next((at for at, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
        seen, wanted = (list(ids[place : place + 4]) for ids in (theirs, ours))
        return ArtifactMismatch(
            f"{self.what} renders prompts in another way: from token {place} on it reads {seen}, "
            f"the target {wanted}",
            where=self.url,
            fix="start it with the target's own tokenizer and chat template",
        )

    def ask_all(self, questions: Sequence[Question], *, concurrency: int) -> ServedGroup:
        """The answers to all questions, so many of them in flight; the server works on no others.

        Raises:
            TransientError: the server was started again meanwhile, or others used it as well.
        """
        before, _ = self.counts()
        with ThreadPoolExecutor(concurrency) as pool:
            started = time.perf_counter()
            answers = list(pool.map(self.ask, questions))
            seconds = time.perf_counter() - started
        deadline = time.monotonic() + COUNTED_S
        while (added := self.counts()[0].since(before)).requests < len(questions):
            if time.monotonic() > deadline or added.requests < 0:
                break
            time.sleep(LOOK_S)
        if added.requests != len(questions) or min(added[1:3]) < 0:
            what = (
                f"{self.what} counted {added.requests} requests while {len(questions)} were sent:"
                " it was started again, or others use it as well"
            )
            raise TransientError(what, where=self.root, fix="let nobody else use it meanwhile")
        return ServedGroup(answers, seconds, added)
