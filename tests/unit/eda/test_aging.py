# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The event source, asking a real HTTP server, and the rulebook, run by a real ansible-rulebook."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import importlib.resources
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
EDA = ROOT / "extensions" / "eda"
RULEBOOK = EDA / "rulebooks" / "rejuvenate_on_aging.yml"
ANSIBLE_RULEBOOK = Path(sys.executable).with_name("ansible-rulebook")

_spec = importlib.util.spec_from_file_location("aging_source", EDA / "plugins" / "event_source" / "aging.py")
aging = importlib.util.module_from_spec(_spec)
sys.modules["aging_source"] = aging
_spec.loader.exec_module(aging)


HANG = 120  # seconds


class Raw(bytes):
    """What a server answers that does not speak HTTP as it should."""


class Prometheus:
    """A server that answers as it is told, one answer after the other, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.slow = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if answer == "hang":
                    outer.slow.wait(HANG)
                if isinstance(answer, Raw):
                    self.wfile.write(answer)
                    return
                code, body = answer if isinstance(answer, tuple) else (200, answer)
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.slow.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def prometheus():
    server = Prometheus()
    yield server
    server.close()


def vector(*elements: tuple[dict[str, str], float]) -> dict[str, Any]:
    result = [{"metric": labels, "value": [1700000000.0, str(value)]} for labels, value in elements]
    return {"status": "success", "data": {"resultType": "vector", "result": result}}


DUE = vector(({"__name__": "vmbeam_aging_due", "machine": "m1", "indicator": "xen_heap", "reason": "full in 2 h"}, 1))
NOBODY = vector()
BOTH = vector(({"machine": "m1"}, 1), ({"machine": "m2"}, 1))


def events(prometheus: Prometheus, turns: int, **args: Any) -> list[dict[str, Any]]:
    """What the source gives while it asks so many times."""

    async def watch() -> list[dict[str, Any]]:
        queue: asyncio.Queue = asyncio.Queue()
        source = asyncio.create_task(
            aging.main(queue, {"url": prometheus.url, "interval": 0.01, "eda_feedback_queue": None, **args})
        )
        deadline = time.monotonic() + 60
        # One more has begun when the last one that counts is evaluated.
        while len(prometheus.requests) <= turns and not source.done():
            assert time.monotonic() < deadline, "the source does not ask"
            await asyncio.sleep(0.005)
        source.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await source
        return [queue.get_nowait() for _number in range(queue.qsize())]

    return asyncio.run(watch())


def test_a_machine_that_is_due_is_told_once(prometheus):
    prometheus.answers = [DUE]
    found = events(prometheus, 5, headers={"Authorization": "Bearer x"})
    assert [event["aging"] for event in found] == [
        {
            "machine": "m1",
            "indicator": "xen_heap",
            "reason": "full in 2 h",
            "value": "1",
            "labels": DUE["data"]["result"][0]["metric"],
        }
    ]
    path, headers = prometheus.requests[0]
    assert path == "/api/v1/query?query=vmbeam_aging_due"
    assert headers["Authorization"] == "Bearer x"


def test_a_machine_that_is_due_again_is_told_again(prometheus):
    prometheus.answers = [DUE, NOBODY, NOBODY, NOBODY, DUE, NOBODY]
    assert len(events(prometheus, 6)) == 2


def test_an_answer_or_two_without_a_machine_are_no_cure(prometheus):
    prometheus.answers = [DUE, NOBODY, DUE, NOBODY, NOBODY, DUE]
    assert len(events(prometheus, 7)) == 1


def names(found: list[dict[str, Any]]) -> list[str]:
    return [event["aging"]["machine"] for event in found]


def test_the_next_machine_is_told_once_the_one_before_is_cured(prometheus):
    prometheus.answers = [BOTH]
    assert names(events(prometheus, 5)) == ["m1"]
    prometheus.requests.clear()
    prometheus.answers = [BOTH, vector(({"machine": "m2"}, 1))]
    assert names(events(prometheus, 4)) == ["m1", "m2"]


def test_a_machine_is_told_by_the_answer_of_that_moment(prometheus):
    """m2 was due when m1 was told, and is not any more when its turn comes."""
    prometheus.answers = [BOTH, BOTH, NOBODY]
    assert names(events(prometheus, 6)) == ["m1"]


def test_a_machine_that_stays_due_does_not_keep_the_others_for_ever():
    now = 0.0
    machines = [{"machine": name} for name in ("m1", "m2", "m3")]
    watch = aging.Watch(1000, 100, clock=lambda: now)
    told = {}
    for now in (0.0, 60.0, 100.0, 160.0, 200.0, 300.0, 1000.0):
        news = watch.news(machines)
        told[now] = news and news["machine"]
    assert told == {0.0: "m1", 60.0: None, 100.0: "m2", 160.0: None, 200.0: "m3", 300.0: None, 1000.0: "m1"}


def test_silence_and_nonsense_are_no_news(prometheus):
    failure = {"status": "error", "errorType": "bad_data", "error": "parse error"}
    for answer in (
        (500, b"oops"),
        b"<html>",
        Raw(b"oops\r\n\r\n"),
        Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"),
        (400, json.dumps(failure).encode()),
        {"status": "success", "data": {"resultType": "matrix", "result": []}},
        {"status": "success", "data": []},
        {"status": "success", "data": {"resultType": "vector", "result": [{}]}},
    ):
        prometheus.requests.clear()
        prometheus.answers = [DUE, answer, DUE]
        assert len(events(prometheus, 3)) == 1, answer


def test_what_is_wrong_with_a_query_is_said(prometheus, caplog):
    prometheus.answers = [(400, b'{"status": "error", "errorType": "bad_data", "error": "unexpected end"}')]
    assert events(prometheus, 1, query="up ==") == []
    assert "bad_data: unexpected end" in caplog.text


def test_a_server_that_hangs_costs_no_more_than_the_timeout(prometheus):
    prometheus.answers = ["hang", DUE]

    async def first() -> dict[str, Any]:
        queue: asyncio.Queue = asyncio.Queue()
        source = asyncio.create_task(
            aging.main(queue, {"url": prometheus.url, "interval": 0.01, "timeout": 1, "repeat_after": 0})
        )
        try:
            return await asyncio.wait_for(queue.get(), HANG / 2)
        finally:
            source.cancel()

    assert asyncio.run(first())["aging"]["machine"] == "m1"


def test_labels_and_values(prometheus):
    prometheus.answers = [
        vector(
            ({"host": "m1", "what": "domids"}, 0.7),
            ({"host": "m1", "what": "second"}, 1),
            ({"host": "m2"}, 0),
            ({"instance": "m3.example.org:9100"}, 1),
            ({"host": "all:!m1"}, 1),
            ({"other": "m4"}, 1),
        )
    ]
    query = 'due{job="xen"} > 0'
    found = events(prometheus, 2, query=query, machine_label="host", indicator_label="what", patience=0)
    assert [(event["aging"]["machine"], event["aging"]["indicator"]) for event in found] == [
        ("m1", "domids"),
        ("m3.example.org", ""),
    ]
    assert found[0]["aging"]["reason"] == "domids of m1: 0.7"
    assert found[1]["aging"]["reason"] == 'due(job="xen") > 0 of m3.example.org: 1'
    query = urllib.parse.urlsplit(prometheus.requests[0][0]).query
    assert urllib.parse.parse_qs(query) == {"query": ['due{job="xen"} > 0']}


def test_alerts(prometheus):
    def alert(name: str, machine: str, state: str) -> dict[str, Any]:
        labels = {"alertname": name, "machine": machine}
        return {"labels": labels, "annotations": {"summary": f"{machine} is old"}, "state": state, "value": "1e+00"}

    alerts = [alert("Old", "m1", "firing"), alert("Old", "m2", "pending"), alert("Else", "m3", "firing")]
    prometheus.answers = [{"status": "success", "data": {"alerts": alerts}}]
    found = events(prometheus, 2, alert="Old", reason_label="summary")
    assert [(event["aging"]["machine"], event["aging"]["reason"]) for event in found] == [("m1", "m1 is old")]
    assert found[0]["aging"]["indicator"] == "Old"
    assert prometheus.requests[0][0] == "/api/v1/alerts"


def test_who_stays_due_is_told_again_after_a_while():
    now = 0.0
    watch = aging.Watch(100, 0, clock=lambda: now)
    told = []
    for now in (0.0, 60.0, 100.0, 160.0, 200.0):
        if watch.news([{"machine": "m1"}]):
            told.append(now)
    assert told == [0.0, 100.0, 200.0]
    never = aging.Watch(0, 0, clock=lambda: now)
    assert never.news([{"machine": "m1"}])
    now = 1e9
    assert not never.news([{"machine": "m1"}])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "url must be"),
        ({"url": "file:///etc/passwd"}, "url must be"),
        ({"url": "http://p", "qurey": "x"}, "unknown argument qurey"),
        ({"url": "http://p", "query": "x", "alert": "y"}, "not both"),
        ({"url": "http://p", "interval": 0}, "greater than 0"),
        ({"url": "http://p", "timeout": -1}, "greater than 0"),
        ({"url": "http://p", "patience": -1}, "less than 0"),
    ],
)
def test_arguments_that_cannot_be_used_end_the_source(args, words):
    with pytest.raises(ValueError, match=words):
        asyncio.run(asyncio.wait_for(aging.main(asyncio.Queue(), args), 5))


def test_documentation_is_what_the_source_takes():
    options = yaml.safe_load(aging.DOCUMENTATION)["options"]
    settings = aging.Settings(url="http://p")
    assert {name: option.get("default") for name, option in options.items() if name != "url"} == {
        name: value for name, value in vars(settings).items() if name != "url"
    }
    for example in yaml.safe_load(aging.EXAMPLES):
        aging.Settings.of(example["vmbeam.xen.aging"])


def test_the_rulebook_is_of_the_form_that_ansible_rulebook_knows():
    schema = json.loads(
        importlib.resources.files("ansible_rulebook").joinpath("schema/ruleset_schema.json").read_text()
    )
    rulebook = yaml.safe_load(RULEBOOK.read_text())
    jsonschema.validate(rulebook, schema)
    rulebook[0]["rules"][0]["action"]["run_playbok"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(rulebook, schema)


@pytest.mark.skipif(
    shutil.which("java") is None,
    reason="no java: ansible-rulebook's engine is one; make setup installs openjdk-17-jre-headless",
)
def test_a_machine_that_is_due_is_rejuvenated_and_no_other(prometheus, tmp_path):
    """The playbook is the real one; it stops at its first look at the machine, whose slots are not described."""
    prometheus.answers = [DUE]
    inventory = tmp_path / "hosts.yml"
    local = {"ansible_connection": "local"}
    inventory.write_text(yaml.safe_dump({"vmbeam_hosts": {"hosts": {"m1": local, "m2": local}}}))
    variables = tmp_path / "vars.yml"
    variables.write_text(yaml.safe_dump({"vmbeam_prometheus_url": prometheus.url, "vmbeam_aging_interval": 0.5}))
    process = subprocess.Popen(
        [ANSIBLE_RULEBOOK, "--rulebook", "vmbeam.xen.rejuvenate_on_aging", "-i", inventory, "--vars", variables],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PATH": f"{ANSIBLE_RULEBOOK.parent}:{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
            "ANSIBLE_NOCOLOR": "1",
        },
    )
    bound = threading.Timer(300, process.kill)
    bound.start()
    seen = ""
    try:
        for line in process.stdout:
            seen += line
            if line.startswith("m1 ") and "failed=1" in line:
                break
    finally:
        bound.cancel()
        process.kill()
        process.wait(20)
        process.stdout.close()
    assert "vmbeam_slots of m1 must describe both slots" in seen
    assert "m2" not in seen
    assert "TASK [Check that there are machines]" in seen
