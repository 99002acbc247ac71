#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: wait_for_guest
short_description: Waits until a guest shows that it makes progress
version_added: 0.1.0
description:
  - Waits until a guest is running or blocked, its virtual CPUs have run since the first look, and the backends of its
    disks and network interfaces are connected, as its drivers have them again soon after a migration.
  - xl calls a guest that hangs running or blocked, too. A guest that does nothing has its timers run now and then, in
    general within seconds.
  - Of a guest of type C(hvm), which may have no drivers for them, the backends do not count.
  - Whether it serves is another question, for M(vmbeam.xen.wait_for_gate). A guest whose kernel spins in a loop after
    its drivers had connected is taken to be well here.
  - Run it in the dom0 of the guest.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.info
  - vmbeam.xen.attributes.action_group
options:
  name:
    description: Name of the guest.
    type: str
    required: true
  timeout:
    description: Seconds to wait at most.
    type: float
    default: 120
"""

EXAMPLES = r"""
- name: Wait until a guest is well after its migration
  vmbeam.xen.wait_for_guest:
    name: web1
  delegate_to: m1-b
"""

RETURN = r"""
elapsed:
  description: Seconds that it took.
  returned: always
  type: float
  sample: 0.207
heartbeat:
  description:
    - What was seen at the last look, C(state) as M(vmbeam.xen.guest_info) has it, C(cpu_seconds), the CPU time since
      the first look, and C(devices), the states of the backends.
    - CPU time is known to the nanosecond, or to a tenth of a second if libxenctrl cannot be asked.
  returned: always
  type: dict
  sample:
    state: blocked
    cpu_seconds: 0.000214
    devices:
      vbd 51712: connected
      vif 0: connected
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks, _heartbeat, _xenctrl
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline, watch
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


def body(module: AnsibleModule) -> dict[str, Any]:
    name = _checks.domain_name("name", module.params["name"])
    deadline = Deadline(_checks.positive("timeout", module.params["timeout"]))

    def problem(beat: _heartbeat.Beat) -> str:
        missing = ", ".join(beat.missing())
        return missing and f"{name} shows no sign of life after {deadline.seconds:g} s: {missing}."

    with _xenctrl.cpu_times() as cpu_times:
        look = _heartbeat.Heartbeat(Xl(), name, cpu_times).look
        return watch(look, problem, lambda beat: {"heartbeat": beat.as_dict()}, deadline)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "timeout": {"type": "float", "default": 120},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
