# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The filters of words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from ansible_collections.vmbeam.xen.plugins.filter.text import FilterModule

FILTERS = FilterModule().filters()


@pytest.mark.parametrize(
    ("given", "entries"),
    [
        (["web1", "db1"], ["web1", "db1"]),
        ("web1, db1,", ["web1", "db1"]),
        ("web1 db1\nweb2", ["web1", "db1", "web2"]),
        (' ["web1", "db1"] ', ["web1", "db1"]),
        ("[]", []),
        ("web1", ["web1"]),
        ("", []),
        (None, []),
        (7, [7]),
    ],
)
def test_a_list_as_people_give_it(given: Any, entries: list[Any]) -> None:
    assert FILTERS["listed"](given) == entries


KEYS = ["ssh-ed25519 AAAA me@home, sweet home", 'from="192.0.2.1,192.0.2.2" ssh-rsa AAAB you']


@pytest.mark.parametrize(
    ("given", "form", "entries"),
    [
        (KEYS[0], "lines", KEYS[:1]),
        ("\r\n".join([*KEYS, ""]), "lines", KEYS),
        (json.dumps(KEYS), "lines", KEYS),
        (KEYS, "lines", KEYS),
        ("console=com1 com1=115200,8n1", "options", ["console=com1", "com1=115200,8n1"]),
        ('[{"name": "a"}]', "json", [{"name": "a"}]),
        ("", "json", []),
        ({"name": "a"}, "json", [{"name": "a"}]),
    ],
)
def test_how_a_list_is_written_as_text_depends_on_its_entries(given: Any, form: str, entries: list[Any]) -> None:
    assert FILTERS["listed"](given, "my_list", form) == entries


@pytest.mark.parametrize(
    ("given", "form", "error"),
    [
        ('["web1"', "words", r"my_list is '\[\"web1\"', which is not JSON .*: give a list, or .* commas or spaces"),
        ("-4 -C", "json", r"my_list is '-4 -C': give a list, or one in JSON such as '\[\"a\", \"b\"\]'$"),
        ("web1", "word", "form 'word' is not one of words, options, lines, json"),
    ],
)
def test_text_that_is_no_list_is_refused_by_the_name_of_its_variable(given: str, form: str, error: str) -> None:
    with pytest.raises(AnsibleFilterError, match=error):
        FILTERS["listed"](given, "my_list", form)


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
