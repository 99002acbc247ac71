# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of the restart after a reboot: entry points to the decisions in plugin_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils import _restart
from ansible_collections.vmbeam.xen.plugins.plugin_utils._filters import checked


class FilterModule:
    """Name the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        functions: dict[str, Callable[..., Any]] = {
            "restart_foreseen": _restart.foreseen,
            "restart_plan": _restart.restart,
            "restart_seen": _restart.seen,
        }
        return {name: checked(name, function) for name, function in functions.items()}
