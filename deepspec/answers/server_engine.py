"""The engine `openai`: answers from any number of OpenAI-compatible servers of the target, in
parallel.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
from openai import AsyncOpenAI, DefaultAioHttpClient
from openai.types import Model
from openai.types.chat import ChatCompletion
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from deepspec.answers.progress import Meter
from deepspec.answers.request import SEEDS, Dialect, messages_as_sent, request_body
from deepspec.answers.response import read_reply
from deepspec.answers.server_errors import (
    KEY_REFUSED,
    OVERLOADED,
    RETRIED,
    Again,
    NotItsFault,
    retry_after_s,
    what_broke,
)
from deepspec.answers.server_pool import Endpoint, Pool
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.target.conversation import AnswerRequest, Failed, Outcome, Refused, Turn

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
CHECK_S = 10.0  # that a server may take to say which models it serves
T = TypeVar("T")


class OpenAIEngine:
    """`resources.servers.endpoints` behind a pool, on an event loop of its own thread; to be closed."""

    def __init__(self, config: RunConfig, meter: Meter) -> None:
        self.config, self.resources, self.meter = config, config.resources, meter
        self.model = self.resources.servers.model_name or config.target.model
        self.key = os.environ.get(self.resources.servers.api_key_env) or "none"
        self.bodies = {
            url: request_body(config, self.model, self._dialect(""))
            for url in self.resources.servers.endpoints
        }
        for client in ("httpx", "httpx2"):  # a line per request, of which there will be a million
            logging.getLogger(client).setLevel(logging.WARNING)
        self.pool = Pool(
            self.resources.servers.endpoints,
            most=self.resources.servers.requests,
            lost_s=self.resources.servers.lost_s,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="answers", daemon=True)
        self._thread.start()
        self.clients: dict[str, AsyncOpenAI] = {}
        try:
            self.clients = self.start(self._make_clients()).result()
            self.start(self._check_models()).result()
        except BaseException:
            self.close()
            raise

    async def _make_clients(self) -> dict[str, AsyncOpenAI]:
        """A client per server, on aiohttp: with hundreds of requests in flight it takes half of
        httpx's time.
        """
        timeout_s = self.resources.servers.request_timeout_s
        return {
            url: AsyncOpenAI(
                base_url=url,
                api_key=self.key,
                max_retries=0,
                timeout=timeout_s,
                # a proxy knows nothing of this machine's servers
                http_client=DefaultAioHttpClient(trust_env=not _is_loopback(url)),
            )
            for url in self.resources.servers.endpoints
        }

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """End whatever is under way, and the thread."""
        self.start(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for client in self.clients.values():
            await client.close()

    async def ask(self, request: AnswerRequest) -> Outcome:
        """Attempts until one is told apart.

        Raises:
            TransientError: no server answers anybody.
            ConfigError: the key is refused.
        """
        spent = 0

        async def attempt() -> Turn | Refused:
            nonlocal spent
            try:
                return await self._try(request)
            except Again as error:
                self.meter.errors += 1
                if isinstance(error, NotItsFault):
                    self.pool.refuse_if_lost()
                else:
                    spent += 1
                raise

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Again),
            stop=lambda state: spent >= self.resources.servers.request_tries,
            reraise=True,
            wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        )
        try:
            return await retrying(attempt)
        except Again as error:
            return Failed(
                f"of {self.resources.servers.request_tries} attempts the last one ended with: {error}"
            )

    async def _try(self, request: AnswerRequest) -> Turn | Refused:
        """One attempt at one server, which is told apart by how it went."""
        async with self.pool.lent() as endpoint:
            began = time.monotonic()
            self.meter.in_flight += 1
            try:
                completion = await self._complete(endpoint, request)
                turn = read_reply(completion, request, self.config.target, endpoint=endpoint.url)
            except openai.APIStatusError as error:
                return self._refusal(endpoint, error, began)
            except (openai.APIError, ValueError, TypeError, AttributeError) as error:
                raise self._broken(endpoint, error, began) from error
            finally:
                self.meter.in_flight -= 1
            self.pool.answered(endpoint)
            return turn

    async def _complete(self, endpoint: Endpoint, request: AnswerRequest) -> ChatCompletion:
        body = {**self.bodies[endpoint.url], **({"tools": request.tools} if request.tools else {})}
        body |= {
            "messages": messages_as_sent(request.messages),
            "seed": request.seed % SEEDS,
            "max_tokens": request.max_new_tokens,
        }
        # And not `chat.completions.create`, which looks every field of the body up in its schema: a
        # quarter of a request's time.
        completion = await self.clients[endpoint.url].post(
            "/chat/completions", body=body, cast_to=ChatCompletion
        )
        # the client hands on a body of another type as text
        if not isinstance(completion, ChatCompletion):
            raise ValueError("the body is not JSON")
        return completion

    def _broken(self, endpoint: Endpoint, error: Exception, began: float) -> Again:
        endpoint.failed(began)
        kind, reason = what_broke(error)
        if kind == "away":
            return NotItsFault(f"{endpoint.url}: it cannot be reached ({reason})")
        if kind == "late":
            endpoint.overloaded(began)
            return Again(
                f"{endpoint.url}: no answer within {self.resources.servers.request_timeout_s:g} s"
            )
        return Again(f"{endpoint.url}: {self._scrub(str(error))} ({type(reason).__name__})")

    def _refusal(self, endpoint: Endpoint, error: openai.APIStatusError, began: float) -> Refused:
        """The rejection of a request that this server will never answer.

        Raises:
            Again: it may answer later.
            ConfigError: the key is refused.
        """
        status, said = error.status_code, self._scrub(error.message)
        if status in KEY_REFUSED:
            raise self._key_refused(endpoint.url, status) from None
        if status in RETRIED or status >= 500:
            if status in OVERLOADED:
                endpoint.overloaded(began, retry_after_s(error.response.headers.get("retry-after")))
                raise NotItsFault(f"{endpoint.url}: {status}: {said}") from error
            endpoint.failed(began)
            raise Again(f"{endpoint.url}: {status}: {said}") from error
        self.pool.answered(endpoint)
        return Refused(f"http_{status}", said[:1000])

    async def _check_models(self) -> None:
        """Refuse servers of another model, and a key that is not taken, before the first prompt.

        A server that does not list its models, or is not up yet, is taken as it is: `transformers
        serve` answers 500 here when it has no cache folder.
        """
        found = await asyncio.gather(*(self._models(url) for url in self.clients))
        for url, listed in zip(self.clients, found, strict=True):
            names = [model.id for model in listed]
            if listed:
                self.bodies[url] = request_body(
                    self.config, self.model, self._dialect(listed[0].owned_by)
                )
            if names and self.model not in names:
                what = f"the server serves {', '.join(sorted(names))}, not {self.model}"
                raise ConfigError(
                    what,
                    where=f"resources.servers.endpoints {url}",
                    fix="correct the endpoint, or set resources.servers.model_name",
                )

    def _dialect(self, owned_by: str) -> Dialect:
        if self.resources.servers.dialect != "auto":
            return self.resources.servers.dialect
        return "vllm" if owned_by == "vllm" else "sglang" if owned_by == "sglang" else "openai"

    async def _models(self, url: str) -> list[Model]:
        try:
            listed = await self.clients[url].with_options(timeout=CHECK_S).models.list()
            return list(listed.data or ())
        except openai.APIStatusError as error:
            if error.status_code in KEY_REFUSED:
                raise self._key_refused(url, error.status_code) from None
            return []
        except (openai.APIError, ValueError, AttributeError) as error:
            log.warning("endpoint=%s does not list its models: %s", url, self._scrub(str(error)))
            return []

    def _key_refused(self, url: str, status: int) -> ConfigError:
        variable = self.resources.servers.api_key_env
        held = "is refused" if os.environ.get(variable) else "is not set"
        return ConfigError(
            f"the server asks for a key ({status}), and {variable} {held}",
            where=url,
            fix=f"set {variable} to its key",
        )

    def _scrub(self, text: str) -> str:
        """A server's words, which may repeat the key that it was sent."""
        return text.replace(self.key, "***") if self.key != "none" else text


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
