#!/usr/bin/python
# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: preview
short_description: Shows what a run would change
version_added: 0.1.0
description:
  - Returns two states as a diff, for C(--check --diff) of something that many tasks do. It does nothing else.
author:
  - vmbeam contributors (@vmbeam)
extends_documentation_fragment:
  - vmbeam.xen.attributes
  - vmbeam.xen.attributes.action_group
options:
  before:
    description: The state as it is.
    type: dict
    required: true
  after:
    description: The state as it would be.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what would be where
  vmbeam.xen.preview:
    before: {m1-a: {guests: [web1]}}
    after: {m1-b: {guests: [web1]}}
"""

RETURN = r"""
diff:
  description: Both states.
  returned: always
  type: dict
  sample:
    before: {m1-a: {guests: [web1]}}
    after: {m1-b: {guests: [web1]}}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils._module import run_module, state_diff


def body(module: AnsibleModule) -> dict[str, Any]:
    before, after = module.params["before"], module.params["after"]
    return {"changed": before != after, "diff": state_diff(before, after)}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "before": {"type": "dict", "required": True},
            "after": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    run_module(module, body)


if __name__ == "__main__":
    main()
