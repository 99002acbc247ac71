# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The gates of the rejuvenate role, as ansible-playbook asks them, with a Prometheus that is not one."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


class Prometheus(http.server.BaseHTTPRequestHandler):
    """Says 1 to the query up{job="web"}, at the second time it is asked, and nothing to others."""

    asked = 0

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        assert address.path == "/api/v1/query"
        result = []
        if parse_qs(address.query)["query"] == ['up{job="web"}']:
            Prometheus.asked += 1
            result = [{"metric": {"job": "web"}, "value": [0, "1"]}] if Prometheus.asked > 1 else []
        body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def prometheus() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Prometheus)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_gates_wait_and_say_why_they_do_not_hold(prometheus, tmp_path):
    gates = [
        {"name": "command", "command": ["true"]},
        {"name": "in time", "url": prometheus, "query": 'up{job="web"}', "min": 1, "timeout": 3},
        {"name": "no command", "command": ["sh", "-c", "echo broken >&2; exit 3"], "timeout": 1},
        {"name": "slow", "command": ["sleep", "300"], "timeout": 1},
        {"name": "no sample", "url": prometheus, "query": "down", "timeout": 1},
    ]
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
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    (tmp_path / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": {"m1-b": host}}}))
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", tmp_path / "inventory.yml", tmp_path / "play.yml"],
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    print(done.stdout, done.stderr)
    rescued = [line.split("RESCUED ")[1] for line in done.stdout.splitlines() if "RESCUED " in line]
    assert len(rescued) == 3
    assert "gate no command does not hold: sh -c" in rescued[0]
    assert "exit code 3: broken" in rescued[0]
    assert "gate slow does not hold: sleep 300 did not end within 1 s" in rescued[1]
    assert "gate no sample does not hold: the query returns no sample" in rescued[2]
    assert Prometheus.asked == 2
