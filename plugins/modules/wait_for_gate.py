#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: wait_for_gate
short_description: Waits until a command, a service or a metric is as it has to be
version_added: 0.1.0
description:
  - Tries again and again within one bound of time whether a command succeeds, a TCP port takes connections, a URL
    answers with a status, or the samples of a metrics query are within bounds.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
options:
  command:
    description:
      - Words of a command that has to succeed. It is ended when the time is over.
      - It is taken to change nothing, and not run in check mode.
    type: list
    elements: str
  address:
    description: Name or address of a host of which O(port) has to take TCP connections.
    type: str
  port:
    description: The port.
    type: int
  url:
    description: The URL that has to answer with one of O(status); with O(query), the address of a Prometheus.
    type: str
  status:
    description: The HTTP status codes that are well.
    type: list
    elements: int
    default: [200]
  query:
    description: An instant query of which each sample has to be within O(min) and O(max), and there has to be one.
    type: str
  min:
    description: The lowest value that is well.
    type: float
  max:
    description: The highest value that is well.
    type: float
  timeout:
    description: Seconds to wait at most, whatever is asked, and how often.
    type: float
    default: 120
attributes:
  check_mode:
    support: partial
    details: A command is not run.
  diff_mode:
    support: N/A
    details: The module changes nothing.
requirements:
  - Python 3.11 or newer; neither Xen nor root privileges
"""

EXAMPLES = r"""
- name: Wait until a guest serves
  vmbeam.xen.wait_for_gate:
    url: http://192.0.2.31/
    timeout: 60

- name: Wait until a command says that a cluster is whole
  vmbeam.xen.wait_for_gate:
    command: [/usr/local/bin/cluster-is-whole]

- name: Wait until few requests fail
  vmbeam.xen.wait_for_gate:
    url: http://prometheus.example.org:9090
    query: job:errors:ratio5m{job="web"}
    max: 0.01
  delegate_to: localhost
"""

RETURN = r"""
elapsed:
  description: Seconds that it took.
  returned: always
  type: float
  sample: 2.004
attempts:
  description: How often it was tried.
  returned: always
  type: int
  sample: 3
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import fetch_url
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks, _gate
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline, watch

# Bytes of an answer that are read.
LONGEST = 1 << 20


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    deadline = Deadline(_checks.positive("timeout", params["timeout"]))
    if params["command"] and module.check_mode:
        return {"changed": False, "elapsed": 0.0, "attempts": 0}
    attempts = 0

    def attempt() -> str:
        nonlocal attempts
        attempts += 1
        # The last attempt is made when the time is over.
        return _try(module, max(1.0, deadline.left))

    return watch(attempt, str, lambda _problem: {"attempts": attempts}, deadline)


def _try(module: AnsibleModule, left: float) -> str:
    params = module.params

    def get(url: str, timeout: float) -> tuple[int, str]:
        response, info = fetch_url(module, url, timeout=timeout)
        try:
            # Of an answer with an error status fetch_url has read the body.
            said = info.get("body") or (response.read(LONGEST) if response else b"")
        except OSError as exc:
            return -1, str(exc)
        return info["status"], said.decode(errors="replace") if info["status"] >= 0 else info["msg"]

    if params["command"]:
        return _gate.command(params["command"], left)
    if params["address"]:
        return _gate.tcp(params["address"], params["port"], left)
    if params["query"]:
        return _gate.metrics(get, params["url"], params["query"], params["min"], params["max"], left)
    return _gate.http(get, params["url"], params["status"], left)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "command": {"type": "list", "elements": "str"},
            "address": {"type": "str"},
            "port": {"type": "int"},
            "url": {"type": "str"},
            "status": {"type": "list", "elements": "int", "default": [200]},
            "query": {"type": "str"},
            "min": {"type": "float"},
            "max": {"type": "float"},
            "timeout": {"type": "float", "default": 120},
        },
        required_one_of=[("command", "address", "url")],
        mutually_exclusive=[("command", "address", "url")],
        required_together=[("address", "port")],
        required_by={"query": "url", "min": "query", "max": "query"},
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
