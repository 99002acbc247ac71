"""Build each thing once: a directory per content hash of its inputs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import typing

#: What a cached entry needs besides its files: proof that it was finished.
_DONE = ".complete"


def root() -> pathlib.Path:
    """Return the cache directory (VMBEAM_CACHE, else the user's cache)."""
    base = os.environ.get("VMBEAM_CACHE")
    if base:
        return pathlib.Path(base)
    user = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(user) / "vmbeam"


def digest(*inputs: typing.Any) -> str:
    """Hash strings, numbers, containers, and files or trees given as Path."""
    state = hashlib.sha256()

    def feed(item: typing.Any) -> None:
        if isinstance(item, pathlib.Path):
            if item.is_dir():
                for child in sorted(item.rglob("*")):
                    if child.is_file() and "__pycache__" not in child.parts:
                        state.update(str(child.relative_to(item)).encode() + b"\0")
                        state.update(hashlib.sha256(child.read_bytes()).digest())
            else:
                state.update(hashlib.sha256(item.read_bytes()).digest())
        elif isinstance(item, (list, tuple)):
            for child in item:
                feed(child)
        else:
            state.update(repr(item).encode())
        state.update(b"\1")

    feed(inputs)
    return state.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: pathlib.Path, wait: bool = True) -> typing.Iterator[bool]:
    """Hold a lock that ends with this process at the latest; give whether we have it (always, if we wait for it)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def lookup(kind: str, key: str) -> pathlib.Path | None:
    """Return the finished entry `kind`/`key`, or None."""
    entry = root() / kind / key
    if not (entry / _DONE).exists():
        return None
    # Used, so not what `_prune` removes next.
    (entry / _DONE).touch()
    return entry


def once(kind: str, key: str, build: typing.Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Return entry `kind`/`key`, calling `build(directory)` if there is none.

    A failed or interrupted build leaves nothing that a later call would use; a
    call during a build waits for its end. Older entries of the same kind, and
    what builds that ended early left, are removed once the new one is complete,
    so that the cache does not grow with every change of the sources.
    """
    entry = root() / kind / key
    with _locked(root() / kind / f"{key}.lock"):
        if (entry / _DONE).exists():
            (entry / _DONE).touch()
            return entry
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir(parents=True)
        build(entry)
        (entry / _DONE).touch()
    _prune(root() / kind, keep=entry)
    return entry


def _prune(directory: pathlib.Path, keep: pathlib.Path, most: int = 2) -> None:
    """Keep the `most` newest entries of a kind, and those that are being built."""
    for child in directory.iterdir():
        if child != keep and child.is_dir() and not (child / _DONE).exists():
            with _locked(directory / f"{child.name}.lock", wait=False) as free:
                if free and not (child / _DONE).exists():
                    shutil.rmtree(child, ignore_errors=True)
    entries = sorted(
        (child for child in directory.iterdir() if (child / _DONE).exists()),
        key=lambda child: (child / _DONE).stat().st_mtime,
        reverse=True,
    )
    for old in entries[most:]:
        if old != keep:
            shutil.rmtree(old, ignore_errors=True)
