#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_lock
short_description: Reserves a machine for one run
version_added: 0.1.0
description:
  - Takes, renews and gives back the lock of a machine, a file in its host dom0 that says which run may change it, so
    that two controllers cannot rejuvenate the same machine.
  - A lock expires O(ttl) seconds after it was taken or renewed last, by the machine's clock since its boot. A reboot
    removes it.
  - An expired lock can be taken by everybody. One that has not expired is taken over only from the owner that
    O(takeover) names.
  - Run it in the host dom0.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
options:
  owner:
    description:
      - Who wants the machine, a text that no other run uses.
      - The owner that has the lock already renews it, and only the owner can give it back.
    type: str
    required: true
  state:
    description:
      - With V(present) the lock is O(owner)'s afterwards, for O(ttl) seconds from now. Fails if another one has it.
      - With V(absent) it is not O(owner)'s any more. The lock of another one is left as it is.
      - With V(kept) a lock that O(owner) has is renewed. Fails if nobody has it or another one has, as the machine may
        have been changed since; the lock is left as it is then.
    type: str
    choices: [present, kept, absent]
    default: present
  ttl:
    description: >-
      Seconds until the lock expires unless it is renewed. Give more than the longest step between two renewals takes.
    type: int
    default: 3600
  details:
    description: What else others shall be told of the owner, such as user and controller.
    type: dict
    default: {}
  takeover:
    description:
      - An owner from whom the lock is taken even if it has not expired, as that run is known to be dead.
      - If somebody else has the lock by now, it stays theirs.
    type: str
  path:
    description: The file.
    type: path
    default: /run/vmbeam/host-lock.json
attributes:
  idempotent:
    support: partial
    details: O(state=present) and O(state=kept) renew the lock each time, which does not count as a change.
"""

EXAMPLES = r"""
- name: Reserve the machine
  vmbeam.xen.host_lock:
    owner: upgrade-2026-11
    ttl: 3600

- name: Take over from a run whose controller is gone
  vmbeam.xen.host_lock:
    owner: upgrade-2026-11-again
    takeover: upgrade-2026-11

- name: Go on only if no other run has had the machine since
  vmbeam.xen.host_lock:
    owner: upgrade-2026-11
    ttl: 3600
    state: kept

- name: Give the machine back
  vmbeam.xen.host_lock:
    owner: upgrade-2026-11
    state: absent
"""

RETURN = r"""
holder:
  description:
    - Who has the machine afterwards, or in check mode would have; who has it if the module fails for that. Null if
      nobody has.
    - C(since) is in UTC; ages are in seconds.
  returned: success, or if it fails for whose the lock is
  type: dict
  sample:
    owner: upgrade-2026-11
    details: {user: alice, controller: ctl1}
    since: "2026-11-24T10:00:00+00:00"
    age_seconds: 12.5
    expires_in_seconds: 3587.5
    expired: false
previous:
  description: The owner that it was taken from, null if it was free or O(owner)'s own.
  returned: success
  type: str
  sample: upgrade-2026-10
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import Conflict, InvalidInput
from ansible_collections.vmbeam.xen.plugins.module_utils._host_lock import DEFAULT_PATH, HostLock, Lock
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff


def body(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    owner = params["owner"].strip()
    if not owner:
        raise InvalidInput("owner: it is empty. Give a text that no other run uses.")
    ttl = _checks.positive("ttl", params["ttl"])
    file = HostLock(_checks.path("path", params["path"]))
    with file.exclusive(make_folder=not module.check_mode):
        if params["state"] == "kept":
            return _result(False, *file.keep(owner, ttl, params["details"], check=module.check_mode))
        held, now = file.holder(), file.clock.now()
        ours = held is not None and held.owner == owner
        if params["state"] == "absent":
            if ours and not module.check_mode:
                file.remove()
            return _result(ours, held, None if ours else held, now)
        if held and not ours and not held.expired(now) and held.owner != params["takeover"]:
            raise _refusal(held, now)
        lock = Lock(owner, params["details"], held.since if held and ours else now, now + ttl)
        if not module.check_mode:
            file.write(lock)
        return _result(not ours, held, lock, now)


def _refusal(held: Lock, now: float) -> Conflict:
    seen = held.as_dict(now)
    told = ", ".join(f"{key} {value}" for key, value in held.details.items() if isinstance(value, str | int))
    return Conflict(
        f"This machine is reserved by {held.owner}{f' ({told})' if told else ''}, "
        f"for {seen['age_seconds']:.0f} s now; that expires in {seen['expires_in_seconds']:.0f} s. "
        f"Wait for that run; if it is dead for sure, wait for the expiry, or take over by naming its owner.",
        holder=seen,
    )


def _result(changed: bool, before: Lock | None, after: Lock | None, now: float) -> dict[str, Any]:
    owners = [lock.owner if lock else None for lock in (before, after)]
    return {
        "changed": changed,
        "holder": after.as_dict(now) if after else None,
        "previous": owners[0] if changed and owners[0] != owners[1] and after else None,
        "diff": state_diff({"owner": owners[0]}, {"owner": owners[1]}),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "owner": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "kept", "absent"], "default": "present"},
            "ttl": {"type": "int", "default": 3600},
            "details": {"type": "dict", "default": {}},
            "takeover": {"type": "str"},
            "path": {"type": "path", "default": DEFAULT_PATH},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
