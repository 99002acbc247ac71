"""Run commands: bounded, logged, with the tail of the log in the error."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import typing

from .errors import CommandFailed, LabError


def tail(path: pathlib.Path, lines: int = 40) -> str:
    """Return the last `lines` lines of a log that may hold any bytes."""
    try:
        with open(path, "rb") as handle:
            handle.seek(0, os.SEEK_END)
            handle.seek(max(0, handle.tell() - 200 * lines))
            data = handle.read()
    except OSError as exc:
        return f"({exc})"
    return "\n".join(data.decode(errors="replace").splitlines()[-lines:])


def isolated(argv: typing.Sequence[str]) -> list[str]:
    """Return the argv that runs `argv` so that nothing of it outlives it, however it ends.

    It gets PIDs and mounts of its own (needs root). When it ends, or whoever started it, the kernel kills each process
    that it has started, daemons too, and undoes its mounts. Killed by SIGKILL, nothing is left to clean up.
    """
    return [
        *("setpriv", "--pdeathsig", "KILL"),
        *("unshare", "--mount", "--propagation", "slave", "--pid", "--mount-proc", "--fork", "--kill-child"),
        *argv,
    ]


def run(
    argv: typing.Sequence[str | pathlib.Path],
    *,
    timeout: float,
    log: pathlib.Path | None = None,
    errors: pathlib.Path | None = None,
    cwd: pathlib.Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Run `argv` and return its output; with `log`, append output to that file instead.

    With `errors`, append what it says on standard error to that file, so that the returned
    output is what it prints for programs.

    The command gets its own process group, which is ended as a whole when
    `timeout` (seconds) is over.

    :raises CommandFailed: it failed
    :raises LabError: it could not be started, or took too long
    """
    words = [str(word) for word in argv]
    sink: typing.Any = subprocess.PIPE
    kept = log or errors
    handle = None
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        handle = open(kept, "ab")
        sink = handle if log else subprocess.PIPE
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=handle if errors else subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            process_group=0,
        )
    except OSError as exc:
        raise LabError(f"{words[0]}: {exc}") from exc
    finally:
        if handle:
            handle.close()
    try:
        output = process.communicate(timeout=timeout)[0]
    except BaseException as exc:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(exc, subprocess.TimeoutExpired):
            shown = tail(kept) if kept else (exc.output or b"").decode(errors="replace")[-4000:]
            raise LabError(f"{' '.join(words)}: not done after {timeout:.0f} s\n{shown}") from exc
        raise
    text = output.decode(errors="replace") if output else ""
    if process.returncode:
        shown = tail(kept) if kept else "\n".join(text.splitlines()[-40:])
        raise CommandFailed(f"{' '.join(words)}: exit status {process.returncode}\n{shown}", text)
    return text
