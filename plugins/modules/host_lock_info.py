#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: host_lock_info
short_description: Reports which run has a machine
version_added: 0.1.0
description:
  - Returns the lock that M(vmbeam.xen.host_lock) keeps in the host dom0 that the module runs in.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.info
  - vmbeam.xen.attributes.action_group
options:
  path:
    description: The file.
    type: path
    default: /run/vmbeam/host-lock.json
seealso:
  - module: vmbeam.xen.host_lock
"""

EXAMPLES = r"""
- name: See whether a run has the machine
  vmbeam.xen.host_lock_info:
  register: lock

- name: Wait for another day if one has
  ansible.builtin.meta: end_host
  when: lock.holder is not none and not lock.holder.expired
"""

RETURN = r"""
holder:
  description: Who has the machine, also if that has expired, as M(vmbeam.xen.host_lock) returns it; null if nobody has.
  returned: success
  type: dict
  sample:
    owner: upgrade-2026-11
    details: {user: alice, controller: ctl1}
    since: "2026-11-24T10:00:00+00:00"
    age_seconds: 12.5
    expires_in_seconds: 3587.5
    expired: false
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils import _checks
from ansible_collections.vmbeam.xen.plugins.module_utils._host_lock import DEFAULT_PATH, HostLock
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module


def body(module: AnsibleModule) -> dict[str, Any]:
    # The file is replaced as a whole: to read it, others need not be kept from it.
    file = HostLock(_checks.path("path", module.params["path"]))
    held = file.holder()
    return {"changed": False, "holder": held.as_dict(file.clock.now()) if held else None}


def main() -> None:
    module = AnsibleModule(
        argument_spec={"path": {"type": "path", "default": DEFAULT_PATH}},
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
