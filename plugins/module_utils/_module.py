# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What the modules' main() functions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import VmbeamError


def run_module(module: AnsibleModule, body: Callable[[AnsibleModule], dict[str, Any]]) -> None:
    """Ends the module with what body returns, or with the failure that it raises."""
    try:
        result = body(module)
    except VmbeamError as exc:
        module.fail_json(msg=exc.message, **exc.details)
    except OSError as exc:
        module.fail_json(msg=f"The operating system refused: {exc}")
    module.exit_json(**result)


def state_diff(before: Any, after: Any) -> dict[str, Any]:
    """A diff of two descriptions, for exit_json."""
    return {"before": before or {}, "after": after or {}}
