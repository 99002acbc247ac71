# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gates of the rejuvenate role, as ansible-playbook asks them, of commands and of metrics."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import prometheus
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


class Slow(http.server.BaseHTTPRequestHandler):
    """Like a Prometheus: says 1 to the query up{job="web"}, at the second time it is asked, and nothing to others."""

    asked = 0

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        assert address.path == "/api/v1/query"
        result = []
        if parse_qs(address.query)["query"] == ['up{job="web"}']:
            Slow.asked += 1
            result = [{"metric": {"job": "web"}, "value": [0, "1"]}] if Slow.asked > 1 else []
        body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(gates: list[dict[str, Any]], folder: Path) -> list[str]:
    """Return why gates do not hold that do not."""
    tasks = [
        {
            "block": [
                {
                    "ansible.builtin.include_role": {"name": "vmbeam.xen.rejuvenate", "tasks_from": "health.yml"},
                    "vars": {"rejuvenate_gate": gate},
                }
            ],
            "rescue": [{"ansible.builtin.debug": {"msg": "RESCUED {{ ansible_failed_result.msg }}"}}],
        }
        for gate in gates
    ]
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars": {**host, "rejuvenate_plan": {"destination": {"name": "m1-b"}}},
        "tasks": tasks,
    }
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    (folder / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": {"m1-b": host}}}))
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", folder / "inventory.yml", folder / "play.yml"],
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    return [line.split("RESCUED ")[1] for line in done.stdout.splitlines() if "RESCUED " in line]


def test_gates_wait_and_say_why_they_do_not_hold(slow, tmp_path):
    gates = [
        {"name": "command", "command": ["true"]},
        {"name": "in time", "url": slow, "query": 'up{job="web"}', "min": 1, "timeout": 3},
        {"name": "no command", "command": ["sh", "-c", "echo broken >&2; exit 3"], "timeout": 1},
        {"name": "slow", "command": ["sleep", "300"], "timeout": 1},
        {"name": "no sample", "url": slow, "query": "down", "timeout": 1},
    ]
    rescued = ask(gates, tmp_path)
    assert len(rescued) == 3
    assert "gate no command does not hold: sh -c" in rescued[0]
    assert "exit code 3: broken" in rescued[0]
    assert "gate slow does not hold: sleep 300 did not end within 1 s" in rescued[1]
    assert "gate no sample does not hold: the query returns no sample" in rescued[2]
    assert Slow.asked == 2


def test_gates_understand_a_real_prometheus(tmp_path):
    queries = {"vector": "vector(1)", "scalar": "scalar(vector(1))", "no sample": "up", "no query": "vector("}
    with prometheus.running(tmp_path) as url:
        gates = [
            {"name": name, "url": url, "query": query, "min": 1, "timeout": 1 if name.startswith("no ") else 60}
            for name, query in queries.items()
        ]
        rescued = ask(gates, tmp_path)
    assert len(rescued) == 2
    assert "gate no sample does not hold: the query returns no sample" in rescued[0]
    assert "gate no query does not hold: the query failed: invalid parameter" in rescued[1]
