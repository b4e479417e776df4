"""The one place that knows all engines.

An engine that answers a shard at a time is a class with the method of `sequential_shards.Engine`,
in a module of its own and with an entry in `IN_PROCESS`, or a user's own class, named in
`answers.engine`. The other kind is servers, which are given the rows of several shards at once.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pkgutil import resolve_name

from deepspec.answers.answered_shard import AnsweredShards
from deepspec.answers.progress import AnswerProgress
from deepspec.answers.sequential_shards import Engine, SequentialShards
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import folder_beside
from deepspec.errors import ConfigError, TargetNotFound
from deepspec.target.chat import Chat, load_chat, target_folder

log = logging.getLogger(__name__)

IN_PROCESS = {"transformers": "deepspec.answers.local_engine:TransformersEngine"}


@contextmanager
def answered_shards(
    run: Run, stage: ShardedStage, progress: AnswerProgress
) -> Iterator[AnsweredShards]:
    """The stage's shards as the run's engine answers them.

    Raises:
        ConfigError: there is no such engine, or its servers are set up wrongly.
        DataError: the target's tokenizer cannot render conversations.
        ChildFailed, TransientError: a server that the stage starts does not come up.
    """
    config = run.config
    if config.answers.engine != "openai":
        yield SequentialShards(load_engine(run), stage, config.answers, progress)
        return
    from deepspec.answers.concurrent_shards import ConcurrentShards
    from deepspec.answers.journal import remove_committed
    from deepspec.answers.server_engine import open_servers
    from deepspec.serving.managed_server import serving

    servers, chat = config.resources.servers, _chat_if_here(run)
    with ExitStack() as stack:
        stack.callback(remove_committed, stage.artifact)
        check = None
        if servers.start != "none":
            model = str(target_folder(run) or config.target.model)
            logs = folder_beside(stage.artifact, "logs")
            servers, check = stack.enter_context(serving(config, model=model, logs=logs))
        engine = stack.enter_context(open_servers(config, servers, chat, progress))
        yield stack.enter_context(closing(ConcurrentShards(engine, stage, check)))


def _chat_if_here(run: Run) -> Chat | None:
    """The target's tokenizer and template; None where only its servers have them."""
    try:
        return load_chat(run)
    except TargetNotFound as error:
        log.warning(
            "%s; so nothing shows whether servers have the same, and which rows fit them",
            error.what,
        )
        return None


def load_engine(run: Run) -> Engine:
    """The engine that `answers.engine` names, by its short name or as `package.module:Class`.

    Raises:
        ConfigError: it cannot be imported.
    """
    name = run.config.answers.engine
    argument = run if name in IN_PROCESS else run.config
    try:
        engine: Engine = resolve_name(IN_PROCESS.get(name, name))(argument)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the engine cannot be imported: {error}",
            where="answers.engine",
            fix="give package.module:Class",
        ) from None
    return engine
