"""A served evaluation: its two servers, started or given, and what makes units with them.

Servers that are started run side by side where each can have GPUs of its own, one after the other
anywhere else: all units are then served plainly before the first one with the draft.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Counts
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import folder_beside, put_rejects
from deepspec.artifacts.tables import write_table
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError, DeepSpecError
from deepspec.evaluate.engine_client import EngineClient, Side
from deepspec.evaluate.plain_sides import PlainSide, PlainSides
from deepspec.evaluate.prompts import Unit
from deepspec.evaluate.served_units import SERVED_SCHEMA, ServedUnits
from deepspec.evaluate.server_check import ServedBy, check_server, require_same_engine
from deepspec.export.commands import SAMPLED, vllm_settings
from deepspec.export.export import export_draft
from deepspec.model.checkpoint import read_spec
from deepspec.process.machine import visible_gpus
from deepspec.serving.engine_version import installed_version, require_version
from deepspec.serving.managed_server import serve_command, serving
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.loading import read_eos_ids, read_text_config

log = logging.getLogger(__name__)

MakeUnit = Callable[[Unit, Path], Counts]
Opened = Callable[[Side], AbstractContextManager[EngineClient]]


@contextmanager
def served_units(run: Run, units: Sequence[Unit]) -> Iterator[MakeUnit]:
    """What makes each of these units, with the servers that it takes up for the length of a block.

    Raises:
        ConfigError: a server lacks something, is too old, or is not installed.
        ArtifactMismatch: a server renders prompts in another way, or served earlier units and has
            changed since.
        ChildFailed, TransientError: a server does not come up.
    """
    servers = _Servers(run, units[0])
    kept = PlainSides(servers.artifact)
    failed = dict[int, DeepSpecError]()
    with ExitStack() as stack:
        stack.callback(kept.remove_committed)
        opened, side_by_side = stack.enter_context(servers.ready())
        make_plain = partial(_plain_side, servers.maker)
        lacking = [unit for unit in units if kept.get(unit.number) is None]
        if side_by_side:
            plain = stack.enter_context(opened("plain"))
        elif lacking:
            with opened("plain") as plain:
                for unit in lacking:
                    try:
                        kept.put(unit.number, make_plain(plain, unit))
                    except DeepSpecError as error:  # raised where the unit is made
                        failed[unit.number] = error
            if len(failed) == len(units):  # nothing is left for the server with the draft
                raise failed[units[0].number]
        draft = stack.enter_context(opened("draft"))

        def make(unit: Unit, local: Path) -> Counts:
            side = kept.get(unit.number)
            if side is None:
                if unit.number in failed:
                    raise failed[unit.number]
                kept.put(unit.number, side := make_plain(plain, unit))
            rows, skipped = servers.maker.rows(draft, unit, side)
            put_rejects(servers.artifact, unit.number, skipped)
            write_table(pa.Table.from_pylist(rows, SERVED_SCHEMA), local)
            tokens = sum(row["num_tokens"] for row in rows)
            return Counts(rows=len(rows), tokens=tokens, rejected=len(skipped))

        yield make


def _plain_side(maker: ServedUnits, server: EngineClient, unit: Unit) -> PlainSide:
    side = maker.plain_side(server, unit)
    seconds = sum(group.seconds for group in side.groups)
    log.info("stage=evaluate unit=%d served plainly seconds=%.1f", unit.number, seconds)
    return side


class _Servers:
    """The two servers of one run; `first` is a unit whose first prompt they are checked with."""

    def __init__(self, run: Run, first: Unit) -> None:
        self.run, self.first = run, first
        self.artifact: Artifact = run.artifact("evaluate")
        self.settings, self.servers = run.config.evaluate, run.config.resources.servers
        self.target, self.folder = run.config.target, target_folder(run)
        chat = load_chat(run)
        stop_ids = chat.stop_ids(read_eos_ids(self.target, folder=self.folder))
        self.maker = ServedUnits(chat, stop_ids, self.settings)
        self.versions = dict[Side, str | None]()
        self.method = ""  # of the draft, where servers are started

    @contextmanager
    def ready(self) -> Iterator[tuple[Opened, bool]]:
        """What opens each server, and whether both can be open at a time."""
        if self.settings.engine == "openai":
            yield self._given, True
            return
        source = self.run.artifact("train").fetch_folder("draft")
        spec = read_spec(source)
        self.method = str(vllm_settings(spec, "")["method"])
        command = serve_command(self._config, model=self._model, port=0)
        require_version(installed_version(command), method=self.method, where=command[0])
        gpus = [] if self.run.config.resources.devices.type == "cpu" else visible_gpus()
        each = self.run.config.resources.devices.gpus_per_lane
        shares = [",".join(gpus[at : at + each]) for at in (0, each)]
        side_by_side = len(gpus) >= 2 * each
        with tempfile.TemporaryDirectory(prefix="deepspec-draft-") as scratch:
            draft = Path(scratch) / "draft"
            export_draft(source, engine="vllm", out=draft)
            speculative = vllm_settings(spec, str(draft))
            if self.settings.sampling_of_draft == "probabilistic":
                speculative |= SAMPLED
            options = {"plain": (), "draft": ("--speculative-config", json.dumps(speculative))}
            env = {
                side: {"CUDA_VISIBLE_DEVICES": share} if side_by_side else {}
                for side, share in zip(options, shares, strict=True)
            }
            yield lambda side: self._started(side, options[side], env[side]), side_by_side

    @property
    def _config(self) -> RunConfig:
        """The run as what starts servers reads it: vLLM, in the number format of the evaluation."""
        config = self.run.config
        start = config.resources.servers.start
        changes = {"start": "vllm"} | ({} if start in ("none", "vllm") else {"start_command": ()})
        dtype = config.evaluate.dtype or config.target.dtype
        target = config.target.model_copy(update={"dtype": dtype})
        return config.with_resources(servers=changes).model_copy(update={"target": target})

    @property
    def _model(self) -> str:
        return str(self.folder or self.target.model)

    @contextmanager
    def _started(
        self, side: Side, options: Sequence[str], env: Mapping[str, str]
    ) -> Iterator[EngineClient]:
        logs = folder_beside(self.artifact, "logs")
        started = serving(self._config, model=self._model, logs=logs, options=options, env=env)
        with started as (servers, check):
            client = EngineClient(
                servers.endpoints[0], servers, model=self._model, side=side, check=check
            )
            with client.http:
                yield self._checked(client)

    @contextmanager
    def _given(self, side: Side) -> Iterator[EngineClient]:
        url = self.servers.plain_endpoint if side == "plain" else self.servers.draft_endpoint
        model = self.servers.model_name or self.target.model
        client = EngineClient(str(url), self.servers, model=model, side=side)
        with client.http:
            yield self._checked(client)

    def _checked(self, client: EngineClient) -> EngineClient:
        question = self.maker.question(self.first, min(self.first.prompts))
        most = read_text_config(self.target, folder=self.folder).max_position_embeddings
        version, num_tokens = check_server(client, question, max_positions=most)
        require_version(version, method=self.method, where=client.url)
        self.versions[client.side] = version
        if len(set(self.versions.values())) > 1:
            raise ConfigError(
                f"the two servers are not of one version: {self.versions}",
                where=client.url,
                fix="serve both with the same one, or their times do not compare",
            )
        if client.side == "draft":
            found = ServedBy(
                engine=self.settings.engine,
                version=version,
                num_speculative_tokens=num_tokens,
                draft_sampling=self.settings.sampling_of_draft,
            )
            require_same_engine(self.artifact, found)
        return client
