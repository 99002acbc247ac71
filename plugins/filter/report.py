# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Filters that tell what runs did: entry points to what is in plugin_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils import _fleet, _metrics, _page
from ansible_collections.vmbeam.xen.plugins.plugin_utils._filters import checked


class FilterModule:
    """Name the filters."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        functions: dict[str, Callable[..., Any]] = {
            "rejuvenation_metrics": _metrics.metrics_text,
            "rejuvenation_fleet_report": _fleet.fleet_report,
            "rejuvenation_page": _page.page,
        }
        return {name: checked(name, function) for name, function in functions.items()}
