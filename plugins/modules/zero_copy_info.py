#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: zero_copy_info
short_description: Reports the sessions of zero-copy migration
version_added: 0.1.0
description:
  - In a host dom0 it returns all sessions of the machine, in a guest dom0 those that its host VM takes part in.
  - Where the hypervisor or its tools have no zero-copy migration there are none, which is no failure.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.info
  - vmbeam.xen.attributes.action_group
options: {}
seealso:
  - module: vmbeam.xen.zero_copy_session
"""

EXAMPLES = r"""
- name: Look for migrations that have not come to an end
  vmbeam.xen.zero_copy_info:
  register: zero_copy
  failed_when: >-
    zero_copy.sessions | rejectattr('channel') | rejectattr('state', 'eq', 'open') | rejectattr('closed', 'eq',
    ['source', 'destination']) | length > 0

- name: See whether guests of a host VM can move without being copied
  vmbeam.xen.zero_copy_info:
  delegate_to: m1-a
  register: zero_copy
  failed_when: not zero_copy.capable
"""

RETURN = r"""
capable:
  description: >-
    Whether guests of this dom0 can migrate by zero-copy: both its hypervisor and the one below know how. False in a
    host dom0, which has no guests.
  returned: success
  type: bool
  sample: true
channel_version:
  description: >-
    The version of the channel that the daemon of this guest dom0 speaks; null if none tells, and in a host dom0. Two
    host VMs can have a channel only if theirs are the same.
  returned: success
  type: int
  sample: 3
sessions:
  description:
    - The sessions by number, frames being of 4 KiB.
    - In a host dom0 C(source) and C(destination) are the domain ids of the host VMs, C(source_name) and
      C(destination_name) their names, null for one that is gone. In a guest dom0 these are null, C(role) is that of
      this host VM, and C(owner) the domain id of the guest that uses the session.
    - C(state) is V(open), V(committing), V(committed), V(undoing) or V(aborted).
    - C(offered), C(shared), C(copies), C(exchanged) and C(copied) count frames that the source has lent, the
      destination has taken or asked to be copied, and that have changed hands or been copied by now; C(lost) those that
      could not be given back; C(calls) hypercalls; C(p2m_writes_4k) and C(p2m_writes_2m) changed page table entries.
    - C(closed) names the roles whose guest hypervisor has closed the session, C(dead) those whose host VM is shut down
      or gone. A session that was committed, or tried to be, stays until it is closed.
  returned: success
  type: list
  elements: dict
  sample:
    - session: 3
      state: open
      source: 1
      source_name: m1-a
      destination: 2
      destination_name: m1-b
      channel: false
      role: none
      owner: null
      max_frames: 786432
      offered: 32768
      shared: 32768
      copies: 0
      exchanged: 0
      copied: 0
      lost: 0
      closed: []
      dead: []
      calls: 20
      p2m_writes_2m: 64
      p2m_writes_4k: 0
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module
from ansible_collections.vmbeam.xen.plugins.module_utils._transport import channel_version
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl
from ansible_collections.vmbeam.xen.plugins.module_utils._zerocopy import (
    GuestSessions,
    HostSessions,
    Unsupported,
    require_capable,
)


def body(_module: AnsibleModule) -> dict[str, Any]:
    try:
        require_capable()
    except Unsupported:
        return {"changed": False, "capable": False, "channel_version": None, "sessions": _of_the_machine()}
    with GuestSessions() as guest_sessions:
        return {
            "changed": False,
            "capable": True,
            "channel_version": channel_version(),
            "sessions": [
                {**session.as_dict(), "source_name": None, "destination_name": None} for session in guest_sessions.all()
            ],
        }


def _of_the_machine() -> list[dict[str, Any]]:
    try:
        with HostSessions() as host_sessions:
            found = host_sessions.all()
    except Unsupported:
        return []
    names: dict[int | None, str] = {domain.domid: domain.name for domain in Xl().domains()}
    return [
        {
            **session.as_dict(),
            "source_name": names.get(session.source),
            "destination_name": names.get(session.destination),
        }
        for session in found
    ]


def main() -> None:
    run_module(AnsibleModule(argument_spec={}, supports_check_mode=True), body)


if __name__ == "__main__":
    main()
