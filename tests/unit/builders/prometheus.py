# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Prometheus, and its promtool."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds that it may take to start or to end; it takes one.
LIMIT = 60


def program(name: str) -> str:
    """Return the path of one of its programs."""
    found = shutil.which(name)
    assert found, f"no {name}: make setup installs Debian's package prometheus"
    return found


def promtool(*arguments: str | Path, told: str = "") -> None:
    """Have promtool check something, or what it is told."""
    done = subprocess.run(
        [program("promtool"), *arguments], input=told, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    """Run one that scrapes nothing, with its files in a folder; return its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config, log = folder / "prometheus.yml", folder / "prometheus.log"
    config.touch()
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _await_ready(address, process, log)
        yield f"http://{address}/"
    finally:
        process.terminate()
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + LIMIT
    while time.monotonic() < ends and process.poll() is None:
        if _ready(address):
            return
        time.sleep(0.1)
    raise AssertionError(f"Prometheus is not ready within {LIMIT} s: {log.read_text()}")


def _ready(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/-/ready")
        return connection.getresponse().status == 200
    except OSError:  # refused at first; then 503
        return False
    finally:
        connection.close()
