# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Locks of the kernel (flock) on files and folders; they end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline, wait_for


def try_lock(descriptor: int) -> bool:
    """Locks an open file or folder; returns False if another holder of it has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked_folder(folder: Path, seconds: float, what: str) -> Iterator[None]:
    """Keeps others out who lock the same folder, for files in it that are replaced or renamed.

    Raises WaitTimeout, which names `what`, if somebody else holds it for longer than that.
    """
    with _locked(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), Deadline(seconds), what):
        yield


@contextlib.contextmanager
def locked_file(path: Path, deadline: Deadline, what: str) -> Iterator[None]:
    """Keeps others out who lock the same file, which remains. Raises WaitTimeout as locked_folder does."""
    with _locked(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), deadline, what):
        yield


@contextlib.contextmanager
def _locked(descriptor: int, deadline: Deadline, what: str) -> Iterator[None]:
    try:
        wait_for(lambda: try_lock(descriptor), deadline, what)
        yield
    finally:
        os.close(descriptor)
