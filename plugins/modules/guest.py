#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest
short_description: Starts, pauses and removes guests in a guest dom0
version_added: 0.1.0
description:
  - Brings a guest to a state. Run it in the guest dom0.
  - To move a guest to another host VM use M(vmbeam.xen.guest_migrate).
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
options:
  name:
    description: Name of the guest.
    type: str
    required: true
  state:
    description:
      - V(running) starts the guest, or unpauses it.
      - V(paused) pauses it, or creates it paused.
      - V(absent) shuts it down, and destroys it if it does not go. Its disks are not touched.
    type: str
    choices: [running, paused, absent]
    default: running
  config:
    description:
      - Path of the guest's xl configuration in the guest dom0.
      - Required if the guest has to be created. Its C(name) must be O(name).
    type: path
  timeout:
    description: >-
      Seconds that creating the guest may take; with O(state=absent) seconds until the guest is destroyed instead.
    type: float
    default: 300
  graceful:
    description: With O(state=absent), whether to ask the guest to shut down first.
    type: bool
    default: true
  force:
    description: >-
      With O(state=absent) and O(graceful=true), whether to destroy a guest that does not shut down in time. Otherwise
      that is an error, and the guest is left as it is.
    type: bool
    default: true
  wait:
    description: >-
      With O(state=absent) and O(graceful=true), whether to wait until the guest is gone. Otherwise one that runs is
      only asked to shut down, so that several can be asked before the first is waited for.
    type: bool
    default: true
seealso:
  - module: vmbeam.xen.guest_info
  - module: vmbeam.xen.guest_migrate
"""

EXAMPLES = r"""
- name: Start a guest
  vmbeam.xen.guest:
    name: web1
    config: /etc/xen/guests/web1.cfg
  delegate_to: m1-a

- name: Shut a guest down, and pull the plug after two minutes
  vmbeam.xen.guest:
    name: web1
    state: absent
    timeout: 120
  delegate_to: m1-a
"""

RETURN = r"""
guest:
  description: >-
    The guest as it is afterwards, in the form that M(vmbeam.xen.guest_info) returns; null if there is none.
    In check mode, the guest as it is, with the state that it would have.
  returned: success
  type: dict
  sample:
    name: web1
    domid: 2
    uuid: 6f1a9b60-93b2-4d5c-9d0a-6c9c1e0f8a11
    state: running
    type: pvh
    memory_mb: 1024
    vcpus: 1
    cpu_time: 0.3
    disks:
      - id: web1-root
        target: /dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_web1-root
        vdev: xvda
    nics:
      - mac: "00:16:3e:00:02:01"
        bridge: xenbr0
    devices: []
    cpu_affinity: []
    migratable: true
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._guest import Guests
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    name = _checks.domain_name("name", params["name"])
    wanted = params["state"]
    deadline = Deadline(_checks.positive("timeout", params["timeout"]))
    guests = Guests(Xl())

    domain, step = guests.plan(name, wanted, params["config"])
    before = guests.describe(domain)
    if module.check_mode:
        after = before
        if step:
            after = None if step == "remove" else {**(before or {"name": name}), "state": wanted}
    else:
        if step == "create":
            guests.create(name, params["config"], deadline, paused=wanted == "paused")
        elif step == "remove" and domain and domain.live and params["graceful"] and not params["wait"]:
            guests.ask_to_shut_down(domain)
        elif step == "remove" and domain:
            guests.remove(domain, deadline, graceful=params["graceful"], forced=params["force"])
        elif step == "pause" and domain:
            guests.pause(domain)
        elif step == "unpause" and domain:
            guests.unpause(domain)
        after = guests.describe(guests.find(name)) if step else before
    return {"changed": step is not None, "guest": after, "diff": state_diff(before, after)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["running", "paused", "absent"], "default": "running"},
            "config": {"type": "path"},
            "timeout": {"type": "float", "default": 300},
            "graceful": {"type": "bool", "default": True},
            "force": {"type": "bool", "default": True},
            "wait": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
