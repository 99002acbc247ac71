# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The attributes that the modules of this collection have in common."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Predicts what would change, and changes nothing.
    support: full
  diff_mode:
    description: Returns what changed, or in check mode would change, as C(diff).
    support: full
  idempotent:
    description: A second run with the same arguments changes nothing.
    support: full
  platform:
    description: The systems that the module runs on.
    platforms: Debian
    support: full
requirements:
  - Xen 4.17 or newer with the C(xl) command
  - root privileges in the dom0 that the module runs in
  - Python 3.11 or newer
"""

    # For modules that only read.
    INFO = r"""
options: {}
attributes:
  diff_mode:
    description: Returns what changed, or in check mode would change, as C(diff).
    support: N/A
    details: The module changes nothing.
"""

    ACTION_GROUP = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/vmbeam.xen.all) in C(module_defaults) to set defaults for all modules.
    support: full
    membership:
      - vmbeam.xen.all
"""
