# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Runs commands with a bound on their time.

Every command gets a session of its own, so that it can be ended with all its children by the id of
its process group.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, cast

from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    CommandError,
    CommandTimeout,
    NotFound,
)

# How long a command may take to end after SIGTERM, before SIGKILL.
TERM_GRACE = 5.0


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    argv: tuple[str, ...]
    rc: int
    stdout: str = ""
    stderr: str = ""

    def check(self) -> Result:
        """Returns self; raises CommandError unless the exit code is 0."""
        if self.rc == 0:
            return self
        said = last_line(self.stderr) or last_line(self.stdout) or "it printed nothing"
        raise CommandError(
            f"{' '.join(self.argv[:3])} failed with exit code {self.rc}: {said}",
            cmd=list(self.argv),
            rc=self.rc,
            stdout=self.stdout,
            stderr=self.stderr,
        )


# Runs argv for at most so many seconds.
Run = Callable[[Sequence[str], float], Result]


def last_line(text: str) -> str:
    """The last line that is not blank, or an empty string."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def start(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a command as leader of its own session and process group.

    SIGPIPE stays ignored as in Python: xl must see a broken pipe as an error that it can handle,
    not die of it and leave a suspended domain behind.
    Raises NotFound if there is no such command.
    """
    try:
        return subprocess.Popen(
            list(argv),
            start_new_session=True,
            restore_signals=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            **options,
        )
    except FileNotFoundError as exc:
        raise NotFound(f"The command {argv[0]} is not installed on this host.", cmd=list(argv)) from exc


def pipe(end_of: IO[bytes] | None) -> IO[bytes]:
    """The end of a pipe that start() was told to make: None only to the type checker."""
    return cast(IO[bytes], end_of)


def end(process: subprocess.Popen[bytes], grace: float = TERM_GRACE) -> None:
    """Ends the process group that the process leads: SIGTERM, then SIGKILL."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    # Children of the leader may have outlived it.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)


def run(argv: Sequence[str], timeout: float) -> Result:
    """Runs a command to its end.

    timeout is in seconds. Raises CommandTimeout after having ended the command, NotFound if it is
    not installed. Any exit code is a result, not an error.
    """
    process = start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as exc:
        end(process)
        raise CommandTimeout(
            f"{' '.join(list(argv)[:3])} did not end within {timeout:g} s and was ended.",
            cmd=list(argv),
            timeout=timeout,
            stderr=_text(exc.stderr or b""),
        ) from exc
    except BaseException:
        end(process)
        raise
    return Result(tuple(argv), process.returncode, _text(stdout), _text(stderr))


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
