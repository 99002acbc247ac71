#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: wait_for_xen
short_description: Waits until Xen, guests and services of a dom0 are up
version_added: 0.1.0
description:
  - Waits until xl answers and xenstored knows Domain-0, and, if asked for, until guests run and systemd units are
    active. Run it in a host dom0 or in a guest dom0.
  - To wait until a booting dom0 can be reached at all, use M(ansible.builtin.wait_for_connection) before.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.info
  - vmbeam.xen.attributes.action_group
options:
  guests:
    description: Names of domains that have to run.
    type: list
    elements: str
    default: []
  units:
    description: Names of systemd units that have to be active.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds to wait at most.
    type: float
    default: 300
"""

EXAMPLES = r"""
- name: Wait until a new host VM can take guests
  vmbeam.xen.wait_for_xen:
    units: [xen.service, ssh.service]
    timeout: 600
  delegate_to: m1-b
"""

RETURN = r"""
elapsed:
  description: Seconds that it took.
  returned: always
  type: float
  sample: 12.507
checks:
  description: What was looked at, as it was at the last look.
  returned: always
  type: dict
  sample:
    xl: true
    xenstore: true
    guests:
      web1: blocked
    units:
      xen.service: active
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._health import Health, examine
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline, watch
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import QUICK, Xl


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    guests = [_checks.domain_name("guests", name) for name in params["guests"]]
    units = [_checks.unit("units", name) for name in params["units"]]
    deadline = Deadline(_checks.positive("timeout", params["timeout"]))
    xl = Xl()

    def look() -> Health:
        return examine(xl, guests, units, timeout=max(1.0, min(QUICK, deadline.left)))

    def problem(health: Health) -> str:
        missing = ", ".join(health.missing())
        said = f" xl says: {health.error}" if health.error else ""
        return missing and f"timeout: after {deadline.seconds:g} s still {missing}.{said}"

    return watch(look, problem, lambda health: {"checks": health.as_dict()}, deadline)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "guests": {"type": "list", "elements": "str", "default": []},
            "units": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "float", "default": 300},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
