"""The lab's talk with QEMU's monitor, against a server that sends what QEMU was seen to send."""

from __future__ import annotations

import json
import pathlib
import socket
import threading
import typing

import pytest
from vmbeam_lab import machine
from vmbeam_lab.errors import LabError
from vmbeam_lab.machine import Emulated

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}


def status_change(job: str, status: str) -> dict:
    return {
        "event": "JOB_STATUS_CHANGE",
        "data": {"id": job, "status": status},
        "timestamp": {"seconds": 1, "microseconds": 0},
    }


def requests(connection: socket.socket) -> typing.Iterator[dict]:
    """Yield what a client sends: objects with nothing between them."""
    text = ""
    while chunk := connection.recv(4096):
        text += chunk.decode()
        while text:
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            yield request
            text = text[end:].lstrip()


class Monitor(threading.Thread):
    """Serves one connection after the other, with `early` messages ahead of the greetings of the first ones."""

    def __init__(
        self, path: pathlib.Path, early: list[dict], job_error: str | None = None, tells_jobs: bool = True
    ) -> None:
        super().__init__(daemon=True)
        self.early = early
        self.job_error = job_error
        self.tells_jobs = tells_jobs
        self.commands: list[str] = []
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen()

    def run(self) -> None:
        while True:
            try:
                connection, _address = self.server.accept()
            except OSError:
                return
            with connection:
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        def send(message: dict) -> None:
            connection.sendall(json.dumps(message).encode() + b"\n")

        try:
            if self.early:
                send(self.early.pop())
            send(GREETING)
            for request in requests(connection):
                self.commands.append(request["execute"])
                self._answer(request, send)
        except OSError:
            pass  # the client has gone

    def _answer(self, request: dict, send: typing.Callable[[dict], None]) -> None:
        result: object = {}
        if request["execute"] == "query-jobs":
            entry = {"id": "snapshot-save-job", "type": "snapshot-save", "status": "concluded"}
            result = [{**entry, **({"error": self.job_error} if self.job_error else {})}]
        send({"return": result, "id": request.get("id")})
        if request["execute"].startswith("snapshot-") and self.tells_jobs:
            job = request["arguments"]["job-id"]
            for status in ("created", "running", "waiting", "pending", "concluded"):
                send(status_change(job, status))


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    monkeypatch.setattr(Emulated, "__init__", lambda self: None)
    made = Emulated()
    made.machine = type("Machine", (), {"name": "m1"})()
    made.qmp = tmp_path / "qmp.sock"
    return made


@pytest.fixture
def serve(emulated):
    started: list[Monitor] = []

    def start(*early: dict, **options) -> Monitor:
        monitor = Monitor(emulated.qmp, list(early), **options)
        monitor.start()
        started.append(monitor)
        return monitor

    yield start
    for monitor in started:
        monitor.server.close()


def test_an_event_ahead_of_the_greeting_does_not_matter(emulated, serve):
    monitor = serve(status_change("other", "null"))
    assert emulated.execute("stop") == {}
    assert monitor.commands[-1] == "stop"


def test_a_monitor_that_never_greets_is_given_up(emulated, serve):
    serve(*[status_change("other", "null")] * machine._CONNECTIONS)
    with pytest.raises(LabError, match="m1: monitor: stop"):
        emulated.execute("stop")


def test_a_job_is_waited_for_in_one_connection(emulated, serve):
    monitor = serve()
    emulated._job("snapshot-save", {"tag": "x"}, timeout=30)
    assert monitor.commands == ["qmp_capabilities", "snapshot-save", "query-jobs", "job-dismiss"]


def test_a_job_that_fails_tells_why(emulated, serve):
    serve(job_error="no room")
    with pytest.raises(LabError, match="snapshot-save: no room"):
        emulated._job("snapshot-save", {"tag": "x"}, timeout=30)


def test_a_job_that_does_not_end_is_given_up(emulated, serve):
    serve(tells_jobs=False)
    with pytest.raises(LabError, match="TimeoutError"):
        emulated._job("snapshot-save", {"tag": "x"}, timeout=1)
