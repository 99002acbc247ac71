# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters of rolling runs: entry points to the decisions in plugin_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils import _controller, _fleet_plan, _repair, _rolling, _windows
from ansible_collections.vmbeam.xen.plugins.plugin_utils._filters import checked


class FilterModule:
    """Name the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        functions: dict[str, Callable[..., Any]] = {
            "host_lock_abandoned": _controller.abandoned,
            "host_lock_owner": _controller.lock_owner,
            "rejuvenation_close_run": _repair.close_run,
            "rejuvenation_done_in_run": _rolling.done_in_run,
            "rejuvenation_repairs": _repair.repairs,
            "rolling_active_since": _rolling.active_since,
            "rolling_batches": _rolling.batches,
            "rolling_budget": _rolling.budget,
            "rolling_closed": _windows.closed,
            "rolling_held": _rolling.held,
            "rolling_hosts": _rolling.hosts,
            "rolling_hooks": _rolling.hooks,
            "rolling_left_out": _rolling.left_out,
            "rolling_machines": _rolling.machines_in,
            "rolling_outcome": _rolling.outcome,
            "rolling_outcomes": _rolling.outcomes,
            "rolling_plan": _fleet_plan.fleet_plan,
            "rolling_plan_objections": _fleet_plan.objections,
            "rolling_plan_text": _fleet_plan.plan_text,
            "rolling_report": _rolling.report,
            "rolling_report_text": _rolling.report_text,
            "rolling_select": _rolling.select,
            "rolling_stop_reason": _rolling.stop_reason,
        }
        return {name: checked(name, function) for name, function in functions.items()}
