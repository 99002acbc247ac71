# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters of words."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.vmbeam.xen.plugins.filter.text import FilterModule

FILTERS = FilterModule().filters()


@pytest.mark.parametrize(
    ("given", "entries"),
    [
        (["web1", "db1"], ["web1", "db1"]),
        ("web1, db1,", ["web1", "db1"]),
        ("web1", ["web1"]),
        ("", []),
        (None, []),
        (7, [7]),
    ],
)
def test_a_list_as_people_give_it(given: Any, entries: list[Any]) -> None:
    assert FILTERS["listed"](given) == entries


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"failed": True, "msg": "no route"}, "no route"),
        ({"failed": True, "rc": 1}, "no reason given"),
        (
            {"msg": "One or more items failed", "results": [{"msg": "ok"}, {"failed": True, "msg": "m2: full"}]},
            "m2: full",
        ),
        ({"msg": "One or more items failed", "results": [{"failed": True}]}, "One or more items failed"),
        ({"msg": "the loop itself", "results": []}, "the loop itself"),
    ],
)
def test_why_a_task_failed(result: dict[str, Any], reason: str) -> None:
    assert FILTERS["failure_reason"](result) == reason
