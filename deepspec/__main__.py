"""DeepSpec's one command: `python -m deepspec <verb> RUN`. RUN is a recipe (`demo`) or a run file
(`my-run.yaml`).

Stage verbs do whatever is missing and nothing else, so running the same command again is how to
resume. With DEEPSPEC_EVENTS=1 a stage verb writes JSON events to stdout, one a line; that is how
the flows follow it.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import typer

from deepspec.cli import inspection, results, stages
from deepspec.errors import EXIT_FAILED, EXIT_TRANSIENT, ChildFailed, DeepSpecError, OutOfMemory
from deepspec.process.events import json_lines, reports_to_parent
from deepspec.train.launcher import ECHO_S, is_first_rank, is_rank

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__,
    rich_markup_mode=None,
)
for verbs in (stages, inspection, results):
    app.add_typer(verbs.app)  # without a name: all verbs are on one level


def main(run_app: Callable[[], Any] = app) -> None:
    """Run a verb; an error ends as one paragraph, or one JSON line for a parent process, and an
    exit code, never as a stack trace.
    """
    # OpenMP's threads spin while they wait; next to other busy processes that made a training step
    # over ten times slower. A short spin costs nothing on a quiet machine. It is read when PyTorch
    # is loaded, which no verb has done yet.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Micro-batches differ in shape: in segments of fixed size they would leave gaps on a GPU. It is
    # read when CUDA is first used; a choice of the user's, by the older name as well, stays.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    level = os.environ.get("DEEPSPEC_LOG", "INFO" if is_first_rank() else "WARNING")
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if is_rank() and len(sys.argv) > 1 and sys.argv[1].startswith("--local_rank="):
        del sys.argv[1]  # DeepSpeed's launcher puts it before the verb; it is in LOCAL_RANK, too
    try:
        _run(run_app)
    except DeepSpecError as error:
        if reports_to_parent():
            _report_error(error)
        else:
            typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_TRANSIENT if error.transient else error.exit_code)
    except Exception as error:
        if not (is_rank() and reports_to_parent()):
            raise
        # A lost connection follows from another rank's end: torchrun then ends this one before it
        # reports.
        time.sleep(ECHO_S)
        logging.exception("this rank failed")
        _report_error(ChildFailed(f"{type(error).__name__}: {error}"))
        sys.exit(EXIT_FAILED)


def _run(run_app: Callable[[], Any]) -> None:
    """Run a verb; memory that ends where no part of it names what to lower is an error as well."""
    try:
        run_app()
    except (RuntimeError, MemoryError) as error:
        from deepspec.model.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        logging.debug("out of memory", exc_info=True)
        frames = traceback.extract_tb(error.__traceback__)
        place = [frame for frame in frames if f"{os.sep}deepspec{os.sep}" in frame.filename][-1]
        reported = str(error).partition("\n")[0] or type(error).__name__
        raise OutOfMemory(
            f"memory ran out: {reported}",
            where=f"{place.name} ({place.filename}:{place.lineno})",
            fix="see who else uses the memory (nvidia-smi, free), lower "
            "resources.memory.batch_tokens, or take a device with more",
        ) from error


def _report_error(error: DeepSpecError) -> None:
    json_lines({"event": "error", **error.to_json()})


if __name__ == "__main__":
    main()
