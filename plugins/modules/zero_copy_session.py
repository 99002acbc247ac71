#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: zero_copy_session
short_description: Allows a host VM to pass a guest's memory to another one
version_added: 0.1.0
description:
  - A session lets the guest hypervisor of one host VM pass the memory of one guest to that of another host VM on the
    same machine, without copying it. Only the host dom0 can set one up, and without one neither can name the other.
  - Each guest takes a session of its own, which M(vmbeam.xen.guest_migrate) uses with
    O(vmbeam.xen.guest_migrate#module:strategy=zero_copy).
  - A channel is a session that gives the two guest dom0s some memory in common, by which everything else of a
    migration passes, with O(vmbeam.xen.guest_migrate#module:transport=channel). It serves any number of guests.
  - A host VM can be the destination of one other at a time, so that no source can name a session of another.
  - Run it in the host dom0.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
requirements:
  - The patched Xen packages of this collection
options:
  source:
    description: Name of the host VM that has the guest.
    type: str
    required: true
  destination:
    description: Name of the host VM that the guest is to move to.
    type: str
    required: true
  state:
    description:
      - V(bound) makes sure that O(count) sessions from O(source) to O(destination) exist that no guest has used yet.
      - V(absent) ends O(session), or all of that O(purpose) from O(source) to O(destination) if none is given. What is
        not committed is undone, so that the guest is the source's.
    type: str
    choices: [bound, absent]
    default: bound
  purpose:
    description: What the session is for, V(guest) to pass the memory of a guest, V(channel) to be a channel.
    type: str
    choices: [guest, channel]
    default: guest
  session:
    description: Number of the session, for O(state=absent).
    type: int
  count:
    description: How many sessions there shall be, for O(state=bound), one for each guest that moves at the same time.
    type: int
    default: 1
  memory_mb:
    description: >-
      MiB that may pass, for O(state=bound) and O(purpose=guest); at least the guest's memory. The source's memory by
      default. A channel has 32 MiB.
    type: int
seealso:
  - module: vmbeam.xen.guest_migrate
  - module: vmbeam.xen.zero_copy_info
"""

EXAMPLES = r"""
- name: Allow m1-a to pass a guest to m1-b
  vmbeam.xen.zero_copy_session:
    source: m1-a
    destination: m1-b
  register: way

- name: Let their guest dom0s talk without a network
  vmbeam.xen.zero_copy_session:
    source: m1-a
    destination: m1-b
    purpose: channel

- name: End what is left when all guests have moved
  vmbeam.xen.zero_copy_session:
    source: m1-a
    destination: m1-b
    state: absent
"""

RETURN = r"""
sessions:
  description:
    - With O(state=bound) the O(count) sessions to use. With O(state=absent) the sessions that were ended.
    - Frames are of 4 KiB.
  returned: success
  type: list
  elements: dict
  sample:
    - session: 1
      state: open
      source: 1
      destination: 2
      max_frames: 786432
      offered: 0
      shared: 0
      copies: 0
      exchanged: 0
      copied: 0
      lost: 0
      closed: []
      dead: []
      calls: 0
      p2m_writes_2m: 0
      p2m_writes_4k: 0
      channel: false
      owner: null
      role: none
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import Conflict, InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain
from ansible_collections.vmbeam.xen.plugins.module_utils._passage import between, bound, ends
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl
from ansible_collections.vmbeam.xen.plugins.module_utils._zerocopy import FRAME, HostSessions, Session


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    names = ends(params)
    xl = Xl()
    pair = [xl.domain(name) for name in names]
    channel = params["purpose"] == "channel"
    with HostSessions() as sessions:
        if params["state"] == "absent":
            return _end(module, sessions, between(sessions, pair, channel=channel))
        limit = params["memory_mb"]
        if channel and limit is not None:
            raise InvalidInput("memory_mb: a channel's size is fixed. Leave it out.")
        count = _checks.positive("count", params["count"])
        frames = None if channel else _frames(limit, pair[0])
        found, whole = bound(sessions, names, pair, count, frames, check=module.check_mode)
        return _result(count > len(found), found, whole)


def _frames(limit: int | None, source: Domain | None) -> int:
    memory_mb = (source.memory_mb if source else 0) if limit is None else _checks.positive("memory_mb", limit)
    return (memory_mb << 20) // FRAME


def _end(module: AnsibleModule, sessions: HostSessions, there: list[Session]) -> dict[str, Any]:
    number = module.params["session"]
    ended = [entry for entry in there if number in (None, entry.session)]
    refusals = []
    if not module.check_mode:
        for entry in ended:
            try:
                sessions.remove(entry.session)
            except Conflict as exc:
                refusals.append(exc.message)
    if refusals:
        raise Conflict(" ".join(refusals))
    return {**_result(bool(ended), ended, []), "sessions": [entry.as_dict() for entry in ended]}


def _result(changed: bool, before: list[Session], after: list[Session]) -> dict[str, Any]:
    described = [[entry.as_dict() for entry in entries] for entries in (before, after)]
    return {
        "changed": changed,
        "sessions": described[1],
        "diff": state_diff({"sessions": described[0]}, {"sessions": described[1]}),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "str", "required": True},
            "destination": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["bound", "absent"], "default": "bound"},
            "purpose": {"type": "str", "choices": ["guest", "channel"], "default": "guest"},
            "session": {"type": "int"},
            "count": {"type": "int", "default": 1},
            "memory_mb": {"type": "int"},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
