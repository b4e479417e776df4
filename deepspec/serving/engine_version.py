"""Which version of vLLM a command would start, and whether that serves a draft."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deepspec.errors import ConfigError

ASK_S = 30.0
ASK = "from importlib.metadata import version; print(version('vllm'))"
# The first version of vLLM that has the draft's method and a model for it, by the method.
OLDEST = {"eagle3": "0.24.0", "dspark": "0.25.0", "dflash": "0.20.0"}


def installed_version(command: Sequence[str]) -> str | None:
    """The version of the vLLM whose program `PROGRAM serve ...` is; None where it is not found.

    The program's own Python is asked: `vllm --version` imports PyTorch for a quarter of a minute.
    """
    words = list(command)
    program = shutil.which(words[words.index("serve") - 1]) if "serve" in words[1:] else None
    if program is None:
        return None
    with Path(program).open("rb") as file:
        first = file.readline(512).decode(errors="replace").strip()
    if not first.startswith("#!") or "python" not in first:
        return None
    try:
        asked = [*first[2:].split(), "-c", ASK]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def require_version(version: str | None, *, method: str, where: str) -> None:
    """Refuse a vLLM that does not know the draft's method; an unknown version is let through.

    Raises:
        ConfigError: naming the version that would do.
    """
    oldest = OLDEST.get(method)
    if version is None or oldest is None or _numbers(version) >= _numbers(oldest):
        return
    raise ConfigError(
        f"vLLM {version} does not serve drafts of the method {method!r}",
        where=where,
        fix=f"install vLLM {oldest} or newer",
    )


def _numbers(version: str) -> list[int]:
    """0.9.2.post2 and 0.24.0rc1 as numbers that compare: the first three."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
