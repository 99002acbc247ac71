# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The option of modules that act only as long as the machine is reserved for the run."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  lock:
    description:
      - The machine's lock, which has to be the run's own. It is renewed first, as M(vmbeam.xen.host_lock) does with
        O(vmbeam.xen.host_lock#module:state=kept), and if it is lost nothing is done.
      - If omitted, the lock is left alone.
    type: dict
    suboptions:
      owner:
        description: Who has to have the machine.
        type: str
        required: true
      ttl:
        description: Seconds for which it is kept from now.
        type: int
        default: 3600
      details:
        description: What to tell of the owner.
        type: dict
        default: {}
      path:
        description: The lock's file.
        type: path
        default: /run/vmbeam/host-lock.json
"""
