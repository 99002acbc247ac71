"""Host VMs that misuse the zero-copy interface, for the tests that have such.

They are Linux domains with one program (hostile.c) that calls the host hypervisor itself, which no dom0 of a guest
hypervisor can. They run one level deep, so this is quick.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import pathlib
import re
import shlex
import subprocess
import time

from vmbeam_lab import build, wait
from vmbeam_lab.errors import LabError

HERE = pathlib.Path(__file__).resolve().parent
DIRECTORY = "/root/hostile"
SECONDS = 60  #: how long two hostile host VMs go on at random
LONGEST = 5 * SECONDS + 120  #: and until they have ended, if they go on until a session has been committed

PAIR = ("hostile-a", "hostile-b")
OTHERS = ("hostile-c", "hostile-d")
CONFIG = """\
name = "{name}"
type = "pvh"
memory = 112
vcpus = 3
cpus = "1-2"
nestedhvm = 1
kernel = "{directory}/vmlinux"
ramdisk = "{directory}/initramfs.img"
cmdline = "console=hvc0 quiet loglevel=3 nokaslr mitigations=off panic=0 maxcpus={cpus} hugepages=10 {options}"
on_crash = "preserve"
{more}
"""

#: Starts a domain and copies its console to a file; xenconsoled makes that when it has seen the domain.
FOLLOW = """\
for _ in $(seq 100); do
  tty=$(xenstore-read "/local/domain/$(xl domid {name})/console/tty")
  [ -z "$tty" ] || break
  sleep 0.2
done
cat "$tty" > {directory}/{name}.log 2>&1 < /dev/null &
xl unpause {name}
"""


def put(lab, path: pathlib.Path, target: str) -> None:
    """Copy a file to host dom0."""
    command = lab.emulated.ssh_command(f"gunzip > {shlex.quote(target)}")
    subprocess.run(command, input=gzip.compress(path.read_bytes(), 1), check=True, timeout=300)


def install(lab) -> None:
    """Give the machine what hostile host VMs boot from."""
    files = build.single_program(HERE / "hostile.c", ["xen-privcmd"])
    lab.host("mkdir", "-p", DIRECTORY)
    for name in ("vmlinux", "initramfs.img"):
        put(lab, files / name, f"{DIRECTORY}/{name}")


def start(lab, name: str, label: str | None = None, **options: int) -> None:
    """Start a hostile host VM, whose console is written to a file.

    :param label: the type that a security policy has it as, not the one for any domain
    """
    words = " ".join(f"hostile.{key}={value}" for key, value in options.items())
    more = f'seclabel = "system_u:system_r:{label}"' if label else ""
    cpus = options.get("cpus", 1)
    config = CONFIG.format(name=name, directory=DIRECTORY, options=words, cpus=cpus, more=more)
    lab.host("sh", "-c", shlex.quote(f"cat > {DIRECTORY}/{name}.cfg <<'EOF'\n{config}EOF\n"))
    lab.host("xl", "create", "-p", "-q", f"{DIRECTORY}/{name}.cfg", timeout=120)
    lab.host("sh", "-c", shlex.quote(FOLLOW.format(name=name, directory=DIRECTORY)))


def log_of(lab, name: str) -> str:
    return lab.host("cat", f"{DIRECTORY}/{name}.log").replace("\r", "")


def await_lines(lab, pattern: str, *names: str, timeout: float) -> dict[str, re.Match]:
    """Wait until each console has a line that matches, and return the matches."""

    def found() -> dict[str, re.Match] | None:
        matches = {name: re.search(pattern, log_of(lab, name)) for name in names}
        return matches if all(matches.values()) else None

    return wait.until(
        found,
        timeout=timeout,
        failure=lambda: AssertionError("\n".join(f"{name}:\n{log_of(lab, name)}" for name in names)),
    )


def bind(lab, source: str, destination: str, **options: object) -> None:
    pair = {"source": f"hostile-{source}", "destination": f"hostile-{destination}"}
    lab.module("vmbeam.xen.zero_copy_session", **pair, **options)


def set_up(lab, **options: int) -> None:
    """Two host VMs that will misuse their sessions, and two more, with each of which only one of them has a session."""
    start(lab, "hostile-a", role=1, seconds=SECONDS, **options)
    start(lab, "hostile-b", role=2, seconds=SECONDS, **options)
    for name in OTHERS:
        start(lab, name, role=0)
    bind(lab, "a", "c", memory_mb=3)
    bind(lab, "b", "d", memory_mb=3)
    bind(lab, "a", "b", memory_mb=2, count=2)
    bind(lab, "a", "b", memory_mb=4, count=4)
    bind(lab, "b", "a", memory_mb=4)
    bind(lab, "a", "b", memory_mb=256)


def begin(lab) -> None:
    """Give them the channel, for which they wait before they do anything."""
    bind(lab, "a", "b", purpose="channel")


def disturb(lab) -> None:
    """Give both new sessions, and end the old ones, as far as that is allowed, until they have made their calls.

    By turns many, which contend for the same frames, and one, in which all of these can be passed on.
    """
    deadline = time.monotonic() + LONGEST
    for count in itertools.cycle((1, 20)):
        if time.monotonic() > deadline or all("HOSTILE DONE" in log_of(lab, name) for name in PAIR):
            return
        # Refused if there are too many that the two have not closed yet.
        with contextlib.suppress(LabError):
            bind(lab, "a", "b", memory_mb=16, count=count)
            bind(lab, "a", "b", purpose="channel")
        # Refused if a session has been committed, and one of the two has not closed it.
        with contextlib.suppress(LabError):
            bind(lab, "a", "b", state="absent")


def destroy(lab, *names: str) -> None:
    for name in names:
        lab.host("xl", "destroy", name, timeout=120)


def misuse(lab) -> None:
    """Let the two that have been set up do all they can, first by turns, then at random; they find nothing wrong."""
    begin(lab)
    for name, match in await_lines(lab, r"HOSTILE CHECKED checks=(\d+) failures=(\d+)", *PAIR, timeout=600).items():
        assert int(match[1]) > 50
        assert match[2] == "0", log_of(lab, name)
    disturb(lab)
    ends = await_lines(lab, r"HOSTILE DONE .*", *PAIR, timeout=LONGEST)
    print(*(f"{name}: {end[0]}" for name, end in ends.items()), sep="\n")
    for name in PAIR:
        assert "HOSTILE FAIL" not in log_of(lab, name), log_of(lab, name)
    # The game is worth nothing if nothing was ever passed on.
    assert int(re.search(r"extents=(\d+)", ends["hostile-b"][0])[1]) > 100
    # Either may miss that a session is committed, when the other one gives it back, or closes it, soon enough.
    assert any(int(re.search(r"committed=(\d+)", end[0])[1]) > 0 for end in ends.values())
