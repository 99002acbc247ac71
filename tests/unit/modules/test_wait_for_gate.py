# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""wait_for_gate with real commands and sockets: whatever hangs, it ends in time."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from typing import Any

import pytest
from ansible_collections.vmbeam.xen.plugins.module_utils import _gate

# Seconds after which something that should have ended in one is taken to hang.
LATE = 30


class Server(http.server.ThreadingHTTPServer):
    """Answers with what `answers` has for the path, {path: [(status, body), ...]}, the last again and again."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, list[tuple[int, str]]] = {}
        self.asked: list[str] = []
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answers = self.server.answers.get(self.path.split("?")[0])
        if answers is None:  # never
            self.server.ended.wait(LATE * 2)
            return
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    thread.join()
    server.server_close()


def timed(run, **arguments: Any):
    began = time.monotonic()
    result = run("wait_for_gate", **arguments)
    assert time.monotonic() - began < LATE
    return result


def test_a_command_is_tried_until_it_succeeds(run, tmp_path):
    once = ["sh", "-c", f"mkdir {tmp_path}/first 2>/dev/null && exit 1; exit 0"]
    result = run("wait_for_gate", command=once, timeout=20)
    assert not result.failed
    assert result["changed"] is False
    assert result["attempts"] == 2


def test_a_command_that_hangs_is_ended(run):
    result = timed(run, command=["sleep", "300"], timeout=1)
    assert result.failed
    assert result["msg"] == "sleep 300 did not end within 1 s and was ended."


def test_a_command_that_fails_says_why(run):
    result = timed(run, command=["sh", "-c", "echo broken >&2; exit 3"], timeout=0.5)
    assert "exit code 3: broken" in result["msg"]
    assert result["attempts"] > 1


def test_a_command_is_not_run_in_check_mode(run, tmp_path):
    run("wait_for_gate", check=True, command=["touch", str(tmp_path / "there")])
    assert not (tmp_path / "there").exists()


def test_a_port_that_takes_connections(run):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert not run("wait_for_gate", address="127.0.0.1", port=port, timeout=5).failed
    result = timed(run, address="127.0.0.1", port=port, timeout=0.5)
    assert f"127.0.0.1 port {port} takes no connection" in result["msg"]


def test_a_url_is_asked_until_it_answers_as_it_should(run, server):
    server.answers["/"] = [(503, "not yet"), (200, "well")]
    result = run("wait_for_gate", url=f"{server.url}/", timeout=20)
    assert not result.failed
    assert server.asked == ["/", "/"]


def test_the_status_may_be_another_one(run, server):
    server.answers["/"] = [(404, "")]
    assert not run("wait_for_gate", url=f"{server.url}/", status=[200, 404], timeout=5).failed
    assert run("wait_for_gate", url=f"{server.url}/", timeout=0.5)["msg"].endswith("answers with status 404")


def test_a_url_that_never_answers_takes_no_longer_than_it_may(run, server):
    assert "gives no answer" in timed(run, url=f"{server.url}/never", timeout=1)["msg"]


def test_metrics_are_asked_until_they_are_within_bounds(run, server):
    server.answers["/api/v1/query"] = [(200, json.dumps(vector("0"))), (200, json.dumps(vector("1")))]
    query = 'up{job="web"}'
    assert not run("wait_for_gate", url=f"{server.url}/", query=query, min=1, timeout=20).failed
    assert server.asked == ["/api/v1/query?query=up%7Bjob%3D%22web%22%7D"] * 2
    assert "at most 0.5" in run("wait_for_gate", url=server.url, query=query, max=0.5, timeout=0.5)["msg"]


def test_metrics_of_something_else_are_no_answer(run, server):
    server.answers["/api/v1/query"] = [(404, "<html>")]
    assert (
        "no answer of a Prometheus: status 404" in run("wait_for_gate", url=server.url, query="up", timeout=0.5)["msg"]
    )
    assert "gives no answer" in timed(run, url=f"{server.url}/never", query="up", timeout=1)["msg"]


def test_why_a_query_cannot_be_answered_is_told(run, server):
    """A Prometheus says so with another status."""
    server.answers["/api/v1/query"] = [(400, json.dumps({"status": "error", "error": "parse error"}))]
    result = run("wait_for_gate", url=server.url, query="vector(", timeout=0.5)
    assert "the query failed: parse error" in result["msg"]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"url": "http://a", "command": ["ls"]}, {"address": "a"}, {"query": "up"}, {"url": "http://a", "min": 1}],
)
def test_what_is_asked_has_to_be_clear(run, arguments):
    assert run("wait_for_gate", **arguments).failed


def vector(*values: str) -> dict[str, Any]:
    return {
        "status": "success",
        "data": {"resultType": "vector", "result": [{"metric": {}, "value": [0, value]} for value in values]},
    }


@pytest.mark.parametrize(
    ("answer", "bounds", "words"),
    [
        (vector("1", "2"), (1, 2), ""),
        (vector("1"), (), ""),
        (vector(), (), "no sample"),
        (vector("1", "0"), (1,), "at least 1"),
        (vector("3"), (None, 2), "at most 2"),
        (vector("NaN"), (0,), "nan"),
        ({"status": "success", "data": {"resultType": "scalar", "result": [0, "5"]}}, (5, 5), ""),
        ({"status": "success", "data": {"resultType": "matrix", "result": []}}, (), "matrix"),
        ({"status": "error", "error": "parse error"}, (), "parse error"),
    ],
)
def test_metrics(answer, bounds, words):
    problem = _gate.metric_problem(answer, *bounds)
    assert words in problem
    assert bool(problem) == bool(words)
