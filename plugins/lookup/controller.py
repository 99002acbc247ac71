# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: controller
author: vmbeam contributors (@vmbeam)
version_added: 0.1.0
short_description: Who runs this playbook
description:
  - Returns who runs C(ansible-playbook), and where, the same each time within one run.
  - The rejuvenate role writes it into the lock of each machine, so that a later run can tell whether the one that holds
    a lock is still alive.
options: {}
"""

EXAMPLES = r"""
- name: Show the identifier of this run
  ansible.builtin.debug:
    msg: "{{ lookup('vmbeam.xen.controller').run_id }}"
"""

RETURN = r"""
_raw:
  description:
    - C(run_id), which no other run has, C(user), C(controller), the name of its host, and C(process), by which the
      filter P(vmbeam.xen.host_lock_abandoned#filter) recognizes it.
  type: list
  elements: dict
"""

from typing import Any

from ansible.plugins.lookup import LookupBase
from ansible_collections.vmbeam.xen.plugins.plugin_utils._controller import identity


class LookupModule(LookupBase):  # type: ignore[misc]
    """Entry point; the work is done in plugin_utils."""

    def run(self, terms: list[Any], variables: dict[str, Any] | None = None, **kwargs: Any) -> list[dict[str, Any]]:
        """Return the identity of this run."""
        return [identity()]
