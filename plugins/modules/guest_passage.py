#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_passage
short_description: Makes way for guests from one host VM to the other
version_added: 0.1.0
description:
  - Does in one go, in this order, what the machine has to do before guests move. Keeps the machine reserved, as
    M(vmbeam.xen.host_lock) does with O(vmbeam.xen.host_lock#module:state=kept), attaches the guests' disks to the
    destination, as M(vmbeam.xen.host_vm_disk) does, and binds the sessions of zero-copy, as
    M(vmbeam.xen.zero_copy_session) does.
  - The first of these that fails is the end of it; what was done before stays.
  - Run it in the host dom0.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
  - vmbeam.xen.lock
options:
  source:
    description: Name of the host VM that the guests leave.
    type: str
    required: true
  destination:
    description: Name of the host VM that they go to.
    type: str
    required: true
  disks:
    description: The paths of the guests' disks in the host dom0, by the disks' ids.
    type: dict
    default: {}
  channel:
    description: Whether there has to be a channel, too, by which the two host VMs share memory.
    type: bool
    default: false
  sessions:
    description:
      - How many sessions of zero-copy there have to be that no guest has used, each for all memory of O(source).
    type: int
    default: 0
  directory:
    description: Folder that holds a folder of files for each host VM.
    type: path
    default: /var/lib/vmbeam/host-vms
  timeout:
    description: Seconds that attaching one disk may take.
    type: float
    default: 60
seealso:
  - module: vmbeam.xen.host_lock
  - module: vmbeam.xen.host_vm_disk
  - module: vmbeam.xen.zero_copy_session
  - module: vmbeam.xen.guest_migrate
"""

EXAMPLES = r"""
- name: Make way for web1
  vmbeam.xen.guest_passage:
    source: m1-a
    destination: m1-b
    lock:
      owner: upgrade-2026-11
    disks:
      web1-root: /dev/vg0/web1-root
    channel: true
    sessions: 1
  register: passage

- name: Move web1
  vmbeam.xen.guest_migrate:
    name: web1
    destination: 192.0.2.22
    strategy: zero_copy
    transport: channel
    session: "{{ passage.sessions[0].session }}"
    channel: "{{ passage.channel.session }}"
  delegate_to: m1-a
"""

RETURN = r"""
disks:
  description: The disks as they are afterwards, or in check mode would be.
  returned: success
  type: list
  elements: dict
  sample:
    - {host_vm: m1-b, id: web1-root, path: /dev/vg0/web1-root, state: attached}
sessions:
  description: The O(sessions) sessions to use, as M(vmbeam.xen.zero_copy_session) returns them.
  returned: success
  type: list
  elements: dict
  sample:
    - {session: 2, state: open}
channel:
  description: The channel, likewise, null without O(channel).
  returned: success
  type: dict
  sample: {session: 1, state: open}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._host_lock import LOCK_OPTION, keep_reserved
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm import DEFAULT_DIRECTORY, HostVms
from ansible_collections.vmbeam.xen.plugins.module_utils._host_vm_disk import plug_in
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff
from ansible_collections.vmbeam.xen.plugins.module_utils._passage import bound, ends
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Deadline
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl
from ansible_collections.vmbeam.xen.plugins.module_utils._zerocopy import FRAME, HostSessions, Session


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    names = ends(params)
    disks = {
        _checks.disk_id("disks", disk): _checks.path(f"disks.{disk}", str(path))
        for disk, path in params["disks"].items()
    }
    timeout = _checks.positive("timeout", params["timeout"])
    if params["sessions"] < 0:
        raise InvalidInput(f"sessions: {params['sessions']} is too small. Give 0 or more.")
    keep_reserved(params["lock"], check=module.check_mode)

    xl = Xl()
    destination, _record = HostVms(xl, _checks.path("directory", params["directory"])).find(names[1])
    attached, before, after = False, [], []
    for disk, path in disks.items():
        options = ("destination", f"disks.{disk}")
        seen = plug_in(
            xl, names[1], destination, disk, path, Deadline(timeout), options=options, check=module.check_mode
        )
        there = seen is not None and seen.attached
        attached |= not there
        whole = {"host_vm": names[1], "id": disk, "path": path, "state": "attached"}
        before.append(whole if there else {**whole, "path": None, "state": "detached"})
        after.append(whole)

    found, channels, sessions = _bind(module, xl, names)
    numbers = [[entry.session for entry in entries] for entries in (found, channels + sessions)]
    return {
        "changed": attached or len(found) < params["channel"] + params["sessions"],
        "disks": after,
        "sessions": [entry.as_dict() for entry in sessions],
        "channel": channels[0].as_dict() if channels else None,
        "diff": state_diff({"disks": before, "sessions": numbers[0]}, {"disks": after, "sessions": numbers[1]}),
    }


def _bind(module: AnsibleModule, xl: Xl, names: list[str]) -> tuple[list[Session], list[Session], list[Session]]:
    """Those that were found, the channel if there has to be one, and the sessions."""
    channel, count = module.params["channel"], module.params["sessions"]
    if not channel and not count:
        return [], [], []
    pair = [xl.domain(name) for name in names]
    frames = ((pair[0].memory_mb if pair[0] else 0) << 20) // FRAME
    with HostSessions() as host:
        # The channel first, as it may have been lost with its daemon since.
        there, channels = bound(host, names, pair, 1, None, check=module.check_mode) if channel else ([], [])
        found, sessions = bound(host, names, pair, count, frames, check=module.check_mode) if count else ([], [])
    return there + found, channels, sessions


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "str", "required": True},
            "destination": {"type": "str", "required": True},
            "lock": LOCK_OPTION,
            "disks": {"type": "dict", "default": {}},
            "channel": {"type": "bool", "default": False},
            "sessions": {"type": "int", "default": 0},
            "directory": {"type": "path", "default": DEFAULT_DIRECTORY},
            "timeout": {"type": "float", "default": 60},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
