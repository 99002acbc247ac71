# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Which machines a rolling run takes, in which order and batches, when it stops, and what it says at its end."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible_collections.vmbeam.xen.plugins.plugin_utils._plan import kept_by_guests
from ansible_collections.vmbeam.xen.plugins.plugin_utils._text import listed, text_table

HOOKS = ("before_run", "after_run", "before_machine", "after_machine", "before_guest", "after_guest")
# Where the command of a hook can be run, the first for hooks of the run, the second for the others.
PLACES = ("controller", "machine")
HOOK_TIMEOUT = 300
# Tasks that run the command of a hook.
COMMAND_FILE = str(Path(__file__).resolve().parents[2] / "roles" / "rolling" / "tasks" / "hook.yml")
ORDERS = ("inventory", "oldest", "aging")

# Name of the in-memory host that stands for the controller in each batch.
ANCHOR = "batch-"

# How many machines of another run are named.
_NAMED = 10

LOST = "it stopped answering (unreachable)"


def select(
    names: Sequence[str],
    hostvars: Mapping[str, Mapping[str, Any]],
    order: str = "inventory",
    wanted: Any = None,
    skipped: Any = None,
) -> list[str]:
    """Return those of the machines `names` that a run takes, in its order.

    A machine is taken if its vmbeam_labels have every label of `wanted` and none of `skipped`. Labels are
    {name: value or list of values}, or text such as "rack=r1,tier=db"; of lists one value in common will do.

    Orders: inventory; oldest: the active host VM's age first (its fact rolling_created, ISO 8601 in UTC), machines of
    unknown age before all; aging: the highest vmbeam_aging_score first, then oldest.

    :raises ValueError: an unknown order, labels that cannot be read, or a machine with the name of an anchor
    """
    mistakable = [name for name in names if name.startswith(ANCHOR)]
    if mistakable:
        found = ", ".join(mistakable)
        raise ValueError(f"{found}: no machine's name may begin with '{ANCHOR}', as those of batches do")
    if order not in ORDERS:
        raise ValueError(f"vmbeam_order is '{order}': not one of {', '.join(ORDERS)}")
    out = left_out(names, hostvars, wanted, skipped)
    taken = [name for name in names if name not in out]
    if order == "inventory":
        return taken

    def age(name: str) -> str:
        return str(hostvars[name].get("rolling_created") or "")

    def key(name: str) -> tuple[float, str]:
        score = float(hostvars[name].get("vmbeam_aging_score") or 0) if order == "aging" else 0.0
        return -score, age(name)

    return sorted(taken, key=key)


def left_out(
    names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], wanted: Any = None, skipped: Any = None
) -> dict[str, str]:
    """Return why those of the machines `names` that a run does not take because of their labels are left out.

    :raises ValueError: labels that cannot be read
    """
    must, must_not = _labels(wanted), _labels(skipped)
    result = {}
    for name in names:
        lacks = [label for label, values in must.items() if not _has(hostvars[name], label, values)]
        has = [label for label, values in must_not.items() if _has(hostvars[name], label, values)]
        if lacks or has:
            words = [f"{label} is none of {', '.join(must[label])} (vmbeam_select)" for label in lacks]
            words += [f"{label} is one of {', '.join(must_not[label])} (vmbeam_skip)" for label in has]
            result[name] = "label " + "; ".join(words)
    return result


def active_since(host_vms: Sequence[Mapping[str, Any]]) -> str:
    """Return when the newest running host VM of a machine was created, empty if that is not known."""
    created = [str(vm.get("created") or "") for vm in host_vms if vm.get("domid") is not None]
    return max(created, default="")


def batches(names: Sequence[str], serial: Any, anchors: bool) -> list[list[str]]:
    """Return the machines in batches, whose sizes `serial` gives as Ansible's keyword does.

    `serial` is a number, a percentage of the machines, or a list of them ("1, 10%, 50%" as text), the last of which
    repeats. With `anchors` each batch begins with a host that stands for the controller.

    :raises ValueError: a size is not a positive number or percentage
    """
    sizes = [_amount("vmbeam_serial", size, len(names), least=1) for size in listed(serial, "vmbeam_serial")]
    if not sizes:
        raise ValueError("vmbeam_serial is empty: give a number, a percentage or a list of them")
    result: list[list[str]] = []
    left = list(names)
    while left:
        size = sizes[min(len(result), len(sizes) - 1)]
        anchor = [f"{ANCHOR}{len(result) + 1}"] if anchors else []
        result.append(anchor + left[:size])
        left = left[size:]
    return result


def machines_in(batch: Sequence[str]) -> list[str]:
    """Return the machines of a batch, without its anchor."""
    return [name for name in batch if not name.startswith(ANCHOR)]


def hosts(run: Mapping[str, Any], by_batches: bool = True) -> list[str]:
    """Return the hosts of a run's plays, in order: `run` are the variables of the host on which the run was selected.

    A play that is not divided into batches needs the host that stands for the controller once. Without a selection it
    is the group that one makes, of which Ansible says that it is not there.
    """
    if "rolling_batches" not in run:
        return ["vmbeam_rolling"]
    names = [name for batch in run["rolling_batches"] for name in batch]
    return names if by_batches else names[:1] + machines_in(names[1:])


def budget(value: Any, total: int) -> int:
    """Return how many of `total` machines may fail before the run stops; `value` is a number or a percentage.

    :raises ValueError: it is neither
    """
    return _amount("vmbeam_failure_budget", value, total, least=0)


def held(names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], owner: str) -> list[str]:
    """Return a sentence for each other run that has some of the machines: which, whose, until when, and what to do.

    The machines' facts rolling_leased and rolling_taken are what host_lock returned when `owner` asked for the lock,
    and when it was taken from a dead run. A machine that did not answer is held by nobody who is known.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name in names:
        facts = hostvars[name]
        results = (facts.get("rolling_taken") or {}, facts.get("rolling_leased") or {})
        holder = next((result["holder"] for result in results if result.get("holder")), None)
        if holder and holder["owner"] != owner:
            found.setdefault(holder["owner"], {})[name] = holder
    return [_held_by(other, machines) for other, machines in found.items()]


def _held_by(owner: str, machines: Mapping[str, Mapping[str, Any]]) -> str:
    named = [*list(machines)[:_NAMED], *([f"{len(machines) - _NAMED} more"] if len(machines) > _NAMED else [])]
    first = next(iter(machines.values()))
    last = max(float(holder["expires_in_seconds"]) for holder in machines.values())
    details = first.get("details") or {}
    whose = f"{owner} of {details.get('user', '?')} on {details.get('controller', '?')}, since {first['since']}"
    run_id = details.get("run_id") or owner
    return (
        f"{', '.join(named)}: reserved by run {whose}; that expires in {math.ceil(last / 60)} min unless renewed. "
        f"If that run is dead, continue it with -e vmbeam_run_id='{run_id}', or take the machines from it with "
        f"-e vmbeam_break_lock='{owner}'"
    )


def outcome(plan: Mapping[str, Any], acts: bool, repairs: Mapping[str, Any]) -> dict[str, str]:
    """Return {result, reason} of a machine on which the role that is rolled has not failed.

    `plan` and `repairs` are what role rejuvenate noted of it, both empty if it is another role; `acts` is whether the
    run does more than plan.
    """
    if repairs:
        result, changes = "fresh", bool(repairs["done"])
    else:
        result, changes = "skipped" if kept_by_guests(plan) else "fresh", plan.get("action") != "skip"
    if changes:
        result = "done" if acts else "planned"
    return {"result": result, "reason": str(repairs.get("summary") or plan.get("reason") or "")}


def outcomes(names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return {machine: {result, reason}} of machines whose turn has come; one that says nothing is lost, so failed."""
    return {name: dict(hostvars[name].get("rolling_outcome") or {"result": "failed", "reason": LOST}) for name in names}


def stop_reason(failed: Sequence[str], total: int, allowed: Any) -> str:
    """Return why no further batch is begun, empty if it may be."""
    limit = budget(allowed, total)
    if len(failed) <= limit:
        return ""
    return f"{len(failed)} of {total} machine(s) failed ({', '.join(failed)}), and the failure budget is {limit}"


def report(
    names: Sequence[str], hostvars: Mapping[str, Mapping[str, Any]], begun: Sequence[str], stopped: str
) -> dict[str, Any]:
    """Return the account of a run: machines, each with result and reason, and how many there are of each result.

    `begun` are the machines of the batches that were begun; `stopped` is why the others were not.
    """
    results = outcomes(begun, hostvars)
    untouched = {"result": "not touched", "reason": stopped}
    machines = [{"machine": name, **results.get(name, untouched)} for name in names]
    counts: dict[str, int] = {}
    for machine in machines:
        counts[machine["result"]] = counts.get(machine["result"], 0) + 1
    return {
        "machines": machines,
        "counts": counts,
        "failed": [machine["machine"] for machine in machines if machine["result"] == "failed"],
        "untouched": [machine["machine"] for machine in machines if machine["result"] == "not touched"],
        "stopped": stopped,
        "outcome": "failed" if counts.get("failed") or stopped else "completed",
    }


def report_text(account: Mapping[str, Any]) -> list[str]:
    """Return the account as lines for a person."""
    counts = ", ".join(f"{count} {result}" for result, count in sorted(account["counts"].items()))
    lines = [f"Run {account['outcome']}: {counts}"]
    if account["stopped"]:
        lines.append(f"Stopped: {account['stopped']}")
    if account["untouched"]:
        lines.append(f"Not touched: {', '.join(account['untouched'])}")
    return [*lines, "", *text_table(account["machines"], ["machine", "result", "reason"])]


def hooks(given: Any, folder: str) -> dict[str, dict[str, Any]]:
    """Return the hooks by their names, each with its name, and file, the tasks that it is.

    A hook is given as the path of a task file, below `folder` if it is not absolute, or as a command: a list of words,
    or {command, timeout, on}. One that is a command has command, timeout (seconds) and on (one of PLACES) as well, and
    its file is the one that runs commands.

    :raises ValueError: a hook is not one of HOOKS, or neither a path nor a command
    """
    unknown = sorted(set(given or {}) - set(HOOKS))
    if unknown:
        raise ValueError(f"vmbeam_hooks: {', '.join(unknown)} is not one of {', '.join(HOOKS)}")
    return {name: {"name": name, **_hook(name, hook, folder)} for name, hook in (given or {}).items() if hook}


def _hook(name: str, given: Any, folder: str) -> dict[str, Any]:
    if isinstance(given, str):
        return {"file": os.path.join(folder, given)}
    hook: Any = {"command": given} if isinstance(given, list | tuple) else given
    place = PLACES[0] if name.endswith("_run") else PLACES[1]
    if isinstance(hook, Mapping) and set(hook) <= {"command", "timeout", "on"}:
        command, timeout, on = hook.get("command"), hook.get("timeout", HOOK_TIMEOUT), hook.get("on", place)
        # The host of a run's hook is none of the machines.
        places = PLACES[:1] if name.endswith("_run") else PLACES
        if command and isinstance(command, list | tuple) and on in places and str(timeout).isdigit() and int(timeout):
            words = [str(word) for word in command]
            return {"file": COMMAND_FILE, "command": words, "timeout": int(timeout), "on": on}
    raise ValueError(
        f"vmbeam_hooks.{name} is {given!r}: give the path of a task file, a command as a list of words, or a "
        f"dictionary of command, and optionally timeout (seconds, {HOOK_TIMEOUT} by default) and on (controller or, "
        f"but for hooks of the run, machine)"
    )


def done_in_run(observed: Mapping[str, Any], run_id: str) -> bool:
    """Return whether the run called `run_id` has rejuvenated the machine already, though it may have been cut since."""
    state = observed.get("state") or {}
    if any(
        run.get("run_id") == run_id and run.get("outcome") == "completed" and run.get("destination")
        for run in state.get("history") or []
    ):
        return True
    run = state.get("run") or {}
    running = {vm["name"] for vm in observed["host_vms"] if vm.get("domid") is not None}
    return run.get("run_id") == run_id and running == {run.get("destination")}


def _has(variables: Mapping[str, Any], label: str, values: list[str]) -> bool:
    return any(value in values for value in _labels(variables.get("vmbeam_labels")).get(label, []))


def _labels(given: Any) -> dict[str, list[str]]:
    if not given:
        return {}
    if isinstance(given, str):
        # There may be spaces around the equals sign, too.
        pairs = [pair.split("=", 1) for pair in re.split(r"[,\s]+", re.sub(r"\s*=\s*", "=", given.strip()))]
        if any(len(pair) != 2 or not pair[0] for pair in pairs):
            raise ValueError(f"labels '{given}': write name=value, several with commas or spaces between them")
        labels: dict[str, list[str]] = {}
        for name, value in pairs:
            labels.setdefault(name.strip(), []).append(value.strip())
        return labels
    if not isinstance(given, Mapping):
        raise ValueError(f"labels {given!r}: write a dictionary, or name=value as text")
    return {
        str(name): [str(value) for value in (values if isinstance(values, list | tuple) else [values])]
        for name, values in given.items()
    }


def _amount(option: str, value: Any, total: int, least: int) -> int:
    """Return a number of machines, of a number or a percentage of `total`; a percentage is never less than `least`."""
    text = str(value).strip()
    try:
        number = max(int(float(text[:-1]) * total / 100), least) if text.endswith("%") else int(text)
    except ValueError:
        number = -1
    if number < least:
        raise ValueError(f"{option}: '{value}' is neither a number from {least} nor a percentage")
    return number
