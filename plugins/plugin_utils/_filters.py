# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""What the filter plugins share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` as a filter: input of the wrong form becomes an error that names the filter."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except KeyError as error:
            raise AnsibleFilterError(f"vmbeam.xen.{name}: the input lacks '{error.args[0]}'") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise AnsibleFilterError(f"vmbeam.xen.{name}: the input has the wrong form: {error}") from error

    return apply
