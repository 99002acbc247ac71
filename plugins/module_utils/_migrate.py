# Copyright (c) vmbeam contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Private to vmbeam.xen: not an interface for other collections.
"""Migrates a guest from this guest dom0 to another one."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from ansible_collections.vmbeam.xen.plugins.module_utils import _process
from ansible_collections.vmbeam.xen.plugins.module_utils._cold import STATES, ColdMove, ColdOptions
from ansible_collections.vmbeam.xen.plugins.module_utils._errors import (
    CommandError,
    CommandTimeout,
    Conflict,
    Undecided,
    VmbeamError,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._file_lock import try_lock
from ansible_collections.vmbeam.xen.plugins.module_utils._migration_state import (
    AWAY,
    DESTINATION,
    INCOMING,
    NOWHERE,
    SOURCE,
    UNKNOWN,
    Phase,
    Repair,
    Sighting,
    Verdict,
    judge,
)
from ansible_collections.vmbeam.xen.plugins.module_utils._parse import Domain
from ansible_collections.vmbeam.xen.plugins.module_utils._wait import Clock, Deadline, wait_for
from ansible_collections.vmbeam.xen.plugins.module_utils._xl import Xl

LOCKS = "/run/lock"
# Exit code of flock when another receiver holds the lock.
LOCKED = 75
# How long xl may take to resume the guest after its transport is gone: it waits a minute for a
# guest that does not suspend.
SETTLE = 150.0
# How long a receiver that lost its sender may take to end: a channel notices after 80 s that nobody is there any more.
RECEIVER_END = 90.0
TAIL = 40

_TRANSPORT = re.compile(r"vmbeam-transport (\d+)")
# libxl, at debug level, when the guest's CPUs have stopped; xl, when they run again.
_SUSPENDED = "guest has suspended"
_STARTED = "migration target: Domain started"
#: What ends each phase of a migration by xl, as a line of its log; the last phase ends with xl.
_MARKS = (
    ("connect", "migration target: Ready to receive domain"),
    ("memory", _SUSPENDED),
    ("state", "Target has acknowledged transfer"),
    ("hand_over", "Giving target permission to start"),
    ("start", _STARTED),
)
_LAST_PHASE = "clean_up"
# Our patched xl, after the hand-over.
_PASSED_ON = re.compile(
    r"Zero-copy session (?P<session>\d+): (?P<pages_passed_on>\d+) pages passed on, (?P<pages_copied>\d+) copied, "
    r"(?P<hypercalls>\d+) calls, (?P<p2m_writes_4k>\d+) 4KiB and (?P<p2m_writes_2m>\d+) 2MiB entries"
)
# Our patched libxenguest, before that: what the toolstack copies itself, which the host hypervisor does not see.
_SENT = re.compile(r"Zero-copy session \d+: \d+ frames shared, (?P<pages_sent>\d+) copied")
_CHATTER = re.compile(r"(^|\s)(debug|detail|verbose): |vmbeam-transport")

_HINTS = (
    ("failed to free memory", "The destination has too little free memory for the guest."),
    ("Permission denied (", "The destination refuses the ssh key of this dom0's root."),
    ("Host key verification failed", "The destination's host key is not in known_hosts."),
    ("guest didn't acknowledge suspend", "The guest does not answer the request to suspend; it may hang."),
    ("guest did not suspend", "The guest does not answer the request to suspend; it may hang."),
    ("does not exist and is not writable", "A disk of the guest is not attached to the destination."),
    (f"error status {LOCKED}", "Another receiver of this guest is still at work at the destination."),
    ("failed to open", "A disk or file of the guest may be missing at the destination."),
)


@dataclass
class Report:
    """What a migration did. Times are in seconds; None is unknown."""

    guest: str
    strategy: str
    seconds: float | None = None
    downtime_seconds: float | None = None
    bytes: int | None = None
    phases: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int | None] | None = None
    repairs: list[str] = field(default_factory=list)
    log_tail: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Log:
    """Lines of running commands, each with the time at which it was read."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lines: list[tuple[float, str]] = []
        self._readers: list[threading.Thread] = []

    def follow(self, stream: IO[bytes]) -> None:
        reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._readers.append(reader)
        reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        with suppress(OSError, ValueError):
            for raw in stream:
                self.add(raw.decode(errors="replace").rstrip())

    def add(self, line: str) -> None:
        self._lines.append((self._clock.now(), line))

    def finish(self) -> None:
        """Waits a little for what is still in the pipes; a stray process may hold one open."""
        for reader in self._readers:
            reader.join(2.0)

    def time_of(self, text: str) -> float | None:
        """When the last line with this text was read."""
        return next((when for when, line in reversed(self._lines) if text in line), None)

    def search(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        return next((found for _when, line in list(self._lines) if (found := pattern.search(line))), None)

    def contains(self, text: str) -> bool:
        return self.time_of(text) is not None

    def tail(self) -> list[str]:
        return [line for _when, line in self._lines if line and not _CHATTER.search(line)][-TAIL:]


@dataclass(frozen=True)
class Links:
    """The two guest dom0s, and how a stream gets from one to the other.

    rune: makes of a shell command for the destination a shell command for the source that runs it with
    its standard input and output.
    receive: makes of a receiver, as vmbeam-channel names it, and a guest's name a shell command that runs that at the
    destination in the same way; None: by rune.
    glance: a faster way to see the domains of the destination, by what receive goes by. What is to be repaired is never
    judged by it, because repairs take the other way, and the two may not lead to the same place.
    """

    source: Xl
    destination: Xl
    rune: Callable[[str], str]
    receive: Callable[[str, str], str] | None = None
    glance: Callable[[], list[Domain]] | None = None


class Migration:
    """The migration of one guest."""

    def __init__(
        self,
        name: str,
        links: Links,
        strategy: str,
        timeout: float,
        clock: Clock | None = None,
        locks: str = LOCKS,
        *,
        session: int | None = None,
        cold: ColdOptions | None = None,
    ) -> None:
        """session: of strategy zero_copy; None lets xl take one that is free. cold: of strategy cold."""
        self._name = name
        self._session = session
        self._links = links
        self._timeout = timeout
        self._clock = clock or Clock()
        self._send_lock = f"{locks}/vmbeam-send-{name}.lock"
        self._receive_lock = f"{locks}/vmbeam-receive-{name}.lock"
        self._lock: int | None = None
        self._phase = Phase.NONE
        self._log = Log(self._clock)
        self.report = Report(guest=name, strategy=strategy)
        self._cold_move = ColdMove(name, links, cold, self._clock) if cold else None
        self._glanced = False

    # --- observing

    def verdict(self) -> Verdict:
        """Where the guest is, by what both dom0s say."""
        return self._look()[0]

    def _look(self) -> tuple[Verdict, list[Domain]]:
        """The verdict, and the domains of the destination."""
        source = Sighting.of(self._name, self._links.source.domains())
        # A suspension ends with commands to the destination: it is no use if only the faster way is there.
        if self._links.glance and self.report.strategy != "suspend":
            with suppress(VmbeamError):
                there = self._links.glance()
                self._glanced = True
                verdict = judge(self._name, source, Sighting.of(self._name, there), self._phase)
                if not verdict.repairs and not verdict.problem:
                    return verdict, there
        there = self._links.destination.domains()
        return judge(self._name, source, Sighting.of(self._name, there), self._phase), there

    def verdict_alone(self) -> Verdict:
        """What the source alone can tell, when the destination cannot be asked."""
        return judge(self._name, Sighting.of(self._name, self._links.source.domains()), None, self._phase)

    def location(self) -> str:
        """Where the guest is, for results: never raises."""
        for look in (self.verdict, self.verdict_alone):
            with suppress(VmbeamError):
                return look().location
        return UNKNOWN

    def foresee(self) -> tuple[str, bool]:
        """The guest's location, and whether a run would change anything; raises Undecided, or why a run would fail."""
        location = self._cold_location()
        if location and self._cold_move:
            self._cold_move.check()
            return location, True
        verdict = _decided(self.verdict())
        if verdict.location == SOURCE and not self._glanced:
            self._try_receive()
        return verdict.location, verdict != Verdict(DESTINATION)

    def _try_receive(self) -> None:
        """Raises an error if the way of the stream, where that is not the way of _look(), is not there."""
        if self._links.glance:
            self._links.glance()

    # --- acting

    def run(self) -> bool:
        """Repairs what an earlier attempt left, migrates the guest, and returns whether anything changed.

        On every failure it verifies where the guest is, repairs what can be, and raises an error whose
        details have the location.
        """
        started = self._clock.now()
        try:
            with self._locked():
                return self._run()
        except VmbeamError as exc:
            exc.details.setdefault("location", self.location())
            raise
        finally:
            self._log.finish()
            self.report.log_tail = self._log.tail()
            self.report.seconds = round(self._clock.now() - started, 3)

    def _run(self) -> bool:
        if self._cold_move:
            # A run that was cut may have left a start at work there.
            self._await_receiver_end()
            if (self._cold_location() or self._settle()) != DESTINATION:
                self._cold(self._cold_move)
                return True
        if self._settle() == DESTINATION:
            return bool(self.report.repairs)
        guest = self._links.source.domain(self._name)
        if guest is None:
            raise Conflict(f"{self._name} disappeared from the source just now.")
        attempt = {"precopy": self._precopy, "suspend": self._suspend, "zero_copy": self._zero_copy}[
            self.report.strategy
        ]
        try:
            attempt(guest)
        except (VmbeamError, OSError) as exc:
            self._after_failure(exc)
        self._verify()
        return True

    def _after_failure(self, error: VmbeamError | OSError) -> None:
        """Returns if the guest reached the destination all the same, else raises."""
        self._log.finish()
        hints = [hint for text, hint in _HINTS if self._log.contains(text)]
        reason = " ".join([str(error), *hints])
        try:
            location = self._settle()
        except Undecided as exc:
            raise CommandError(f"{reason} After that: {exc.message}", **exc.details) from error
        except VmbeamError as exc:
            # The destination cannot be asked, or not be tidied up: a later run does that. The guest
            # must not wait for it.
            reason = f"{reason} After that: {exc.message}"
            try:
                location = self._repair(self.verdict_alone())
            except VmbeamError as last:
                raise CommandError(f"{reason} {last.message}", **last.details) from error
        if location != DESTINATION:
            raise CommandError(f"{reason} The guest runs on at the {location}.", location=location) from error

    def _verify(self) -> None:
        """Raises unless the guest is at the destination only, and runs there."""
        verdict, domains = self._look()
        there = next((domain for domain in domains if domain.name == self._name), None)
        if verdict != Verdict(DESTINATION) or there is None or not there.live:
            raise Conflict(
                f"xl reported success, but {self._name} is not running at the destination: "
                f"{verdict.problem or f'it is {there.state if there else verdict.location}'}.",
                location=verdict.location,
            )

    # --- repairing

    def _settle(self) -> str:
        """Repairs the remains of an attempt and returns the guest's location; raises Undecided."""
        verdict = self.verdict()
        if self.report.strategy == "zero_copy" and (verdict.repairs or verdict.problem):
            self._recover_session()
            verdict = self.verdict()
        verdict = _decided(verdict)
        if verdict.repairs:
            # A receiver that is still alive may rename, start or destroy its copy at any moment.
            self._await_receiver_end()
            verdict = self.verdict()
        location = self._repair(verdict)
        if verdict.repairs:
            left = _decided(self.verdict())
            if left.repairs:
                raise Conflict(f"{left.repairs[0]} had no effect.", location=left.location)
        return location

    def _recover_session(self) -> None:
        """Lets xl end what is left of a zero-copy migration: the session knows whose the guest is.

        The destination first, because what it does decides what is left to do at the source.
        """
        self._await_receiver_end()
        for side, xl, suffix in (
            (DESTINATION, self._links.destination, INCOMING),
            (SOURCE, self._links.source, AWAY),
        ):
            for domain in xl.domains():
                if domain.name == self._name + suffix or (domain.name == self._name and not domain.live):
                    # It fails if the domain has no session: then this is for us to judge.
                    with suppress(CommandError):
                        xl.migrate_recover(domain.domid)
                        self.report.repairs.append(
                            f"xl migrate-recover {domain.name} (domain {domain.domid}, {domain.state}) at the {side}"
                        )

    def _repair(self, verdict: Verdict) -> str:
        """Does a verdict's repairs and returns its location; raises Undecided."""
        for repair in _decided(verdict).repairs:
            self._apply(repair)
            self.report.repairs.append(str(repair))
        self._enter(Phase.NONE)
        return verdict.location

    def _apply(self, repair: Repair) -> None:
        xl = self._links.source if repair.side == SOURCE else self._links.destination
        domid = repair.domain.domid
        if repair.verb == "destroy":
            xl.destroy(domid)
            wait_for(
                lambda: not _has(xl, domid),
                Deadline(60.0, self._clock),
                f"{repair.domain.name} to be destroyed",
            )
        elif repair.verb == "rename":
            xl.rename(domid, self._name)
        elif repair.verb == "resume":
            xl.resume(domid)
        else:
            xl.unpause(domid)

    def _await_receiver_end(self) -> None:
        command = f"flock -w {RECEIVER_END:.0f} {shlex.quote(self._receive_lock)} true"
        if self._links.destination.shell(command, timeout=RECEIVER_END + 60.0).rc != 0:
            raise Conflict(
                f"A receiver of {self._name} is still at work at the destination. Try again when it has ended."
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One migration of a guest at a time. xl inherits the lock, in case that we die before it."""
        self._lock = os.open(self._send_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not try_lock(self._lock):
                raise Conflict(
                    f"Another migration of {self._name} is at work in this dom0. Try again when it has ended."
                )
            # Left by a run that was killed half-way.
            self._phase = Phase(os.pread(self._lock, 64, 0).decode())
            yield
        finally:
            os.close(self._lock)
            self._lock = None

    def _enter(self, phase: Phase) -> None:
        """Remembers, also for a later run, what we do to the source's copy."""
        self._phase = phase
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, phase.value.encode(), 0)

    # --- strategies

    def _receiver(self, command: str) -> str:
        """Holds a lock at the destination as long as the receiver, but not its daemon, lives."""
        return f"flock -n -o -E {LOCKED} {shlex.quote(self._receive_lock)} {command}"

    def _receiving(self, name: str, command: str) -> str:
        """The shell command of a receiver, by its name at the channel, or by what the destination is to run."""
        if self._links.receive:
            return self._links.receive(name, self._name)
        return self._links.rune(command)

    def _start(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return _process.start(argv, pass_fds=[self._lock] if self._lock is not None else [], **options)

    def _precopy(self, guest: Domain) -> None:
        """xl's own live migration."""
        self._xl_migrate(guest, self._receiving("receive-copy", self._receiver("xl migrate-receive")))

    def _zero_copy(self, guest: Domain) -> None:
        """xl's migration that passes the memory on, in a session that the host dom0 has set up."""
        number = f"={self._session}" if self._session else ""
        rune = self._receiving("receive", self._receiver("xl migrate-receive --zero-copy"))
        self._xl_migrate(guest, rune, f"--zero-copy{number}")

    def _xl_migrate(self, guest: Domain, rune: str, *options: str) -> None:
        # The transport tells its process id, so that it can be ended alone: xl then resumes the guest
        # by itself. Ending xl could leave the guest suspended.
        rune = f"echo vmbeam-transport $$ >&2; {rune}"
        xl = self._start(
            # An empty -s makes xl run its last argument as the transport. -vvv tells the suspension.
            ["xl", "-vvv", "migrate", *options, "-s", "", str(guest.domid), rune],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._log.follow(_process.pipe(xl.stdout))
        started = self._clock.now()
        try:
            rc = xl.wait(self._timeout)
        except subprocess.TimeoutExpired as exc:
            self._end_transport(xl)
            self._end_gently(xl)
            raise self._too_late() from exc
        except BaseException:
            self._end_transport(xl)
            self._end_gently(xl)
            raise
        ended = self._clock.now()
        self._log.finish()
        if rc != 0:
            raise self._failed("xl migrate", rc)
        self._measure_downtime(self._log.time_of(_STARTED))
        self._measure_phases(started, ended)

    def _suspend(self, guest: Domain) -> None:
        """Saves the guest into a pipe that restores it at the destination, both paused; then switches over."""
        # xl save suspends the guest at once, whoever takes what it writes.
        self._try_receive()
        self._enter(Phase.PAUSED)
        self._copy(guest)
        old = self._links.source.domain(self._name)
        if old is None or old.state != "paused":
            raise Conflict(f"The old copy of {self._name} is {old.state if old else 'absent'}, not paused.")
        new = self._links.destination.domain(self._name)
        if new is None or new.uuid != guest.uuid or not new.never_ran:
            raise Conflict(f"The new copy of {self._name} is {new.state if new else 'absent'}, not paused and new.")
        # From here on it can only go forward: the new copy is complete, and the old one has not run since.
        self._enter(Phase.GIVEN_UP)
        self._apply(Repair(SOURCE, "destroy", guest))
        self._links.destination.unpause(new.domid)
        self._measure_downtime(self._clock.now())
        self._enter(Phase.NONE)

    def _copy(self, guest: Domain) -> None:
        deadline = Deadline(self._timeout, self._clock)
        # xl opens the file by name, which fails for a socket (ssh's standard input): hence cat.
        restore = f"cat | {self._receiver('xl restore -p /dev/stdin')}"
        receiver = self._start(
            ["sh", "-c", self._receiving("restore", restore)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            sender = self._start(
                ["xl", "-vvv", "save", "-p", str(guest.domid), "/dev/stdout"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except BaseException:
            _process.end(receiver)
            raise
        self._log.follow(_process.pipe(receiver.stdout))
        self._log.follow(_process.pipe(sender.stderr))
        pump = Pump(_process.pipe(sender.stdout), _process.pipe(receiver.stdin))
        pump.start()
        try:
            sender_rc = sender.wait(deadline.left)
            receiver_rc = receiver.wait(deadline.left)
        except subprocess.TimeoutExpired as exc:
            raise self._too_late() from exc
        finally:
            # The receiver first: then xl sees a broken pipe and resumes the guest by itself.
            if receiver.poll() is None:
                _process.end(receiver)
            self._end_gently(sender)
            pump.join(5.0)
        self._log.finish()
        # A receiver that ends early breaks the sender's pipe: its failure is the reason then.
        if sender_rc != 0 and receiver_rc != LOCKED:
            raise self._failed("xl save", sender_rc)
        if receiver_rc != 0:
            raise self._failed("xl restore at the destination", receiver_rc)
        self.report.bytes = pump.bytes

    # --- strategy cold

    def _cold_location(self) -> str | None:
        """Where a guest is that can be moved cold as it is, running or not; None if that is for the verdict to say."""
        if self._cold_move is None:
            return None
        here = Sighting.of(self._name, self._links.source.domains())
        there = Sighting.of(self._name, self._links.destination.domains())
        if there.all() or here.incoming or here.away:
            return None
        if here.guest is None:
            return NOWHERE
        return SOURCE if here.guest.state in STATES else None

    def _cold(self, move: ColdMove) -> None:
        """Shuts the guest down, if it is not already, and starts it at the destination."""
        move.check()
        asked = self._clock.now()
        guest = self._links.source.domain(self._name)
        if guest:
            try:
                move.stop(guest)
            except VmbeamError as exc:
                raise CommandError(f"{exc.message} Nothing was started at the destination.", **exc.details) from exc
            self.report.phases["stop"] = round(self._clock.now() - asked, 3)
        started = self._clock.now()
        try:
            move.start(self._timeout, self._receiver)
        except VmbeamError as exc:
            reason = f"{self._name} was shut down, and it could not be started at the destination: {exc.message}"
            try:
                self._await_receiver_end()
                self.report.repairs.append(move.undo_start(self._timeout))
            except VmbeamError as last:
                raise CommandError(f"{reason} Nor at the source: {last.message}", **exc.details) from exc
            raise CommandError(f"{reason} It was started again at the source.", **exc.details) from exc
        self._verify()
        self.report.phases["start"] = round(self._clock.now() - started, 3)
        if guest and guest.live:
            self.report.downtime_seconds = round(self._clock.now() - asked, 3)

    # --- helpers of the strategies

    def _end_transport(self, xl: subprocess.Popen[bytes]) -> None:
        found = self._log.search(_TRANSPORT)
        if not found:
            return
        pid = int(found[1])
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == xl.pid:
                os.kill(pid, signal.SIGTERM)

    def _end_gently(self, xl: subprocess.Popen[bytes]) -> None:
        """Gives xl the time to resume the guest before it is ended."""
        with suppress(subprocess.TimeoutExpired):
            xl.wait(SETTLE)
        if xl.poll() is None:
            _process.end(xl)

    def _too_late(self) -> VmbeamError:
        return CommandTimeout(
            f"timeout: the migration of {self._name} did not end within {self._timeout:g} s and was broken off."
        )

    def _failed(self, what: str, rc: int) -> VmbeamError:
        if rc == LOCKED:
            return Conflict(f"Another receiver of {self._name} is at work at the destination.")
        tail = self._log.tail()
        return CommandError(f"{what} of {self._name} failed with exit code {rc}: {tail[-1] if tail else 'no message'}.")

    def _measure_downtime(self, resumed: float | None) -> None:
        suspended = self._log.time_of(_SUSPENDED)
        if suspended is not None and resumed is not None and resumed >= suspended:
            self.report.downtime_seconds = round(resumed - suspended, 3)

    def _measure_phases(self, started: float, ended: float) -> None:
        """Tells what took how long; a phase whose end was not seen is a part of the next one."""
        marks = [(phase, self._log.time_of(text)) for phase, text in _MARKS]
        for phase, at in marks:
            if at is not None and at >= started:
                self.report.phases[phase] = round(at - started, 3)
                started = at
        # The last line may be read after xl has ended.
        self.report.phases[_LAST_PHASE] = round(max(0.0, ended - started), 3)
        self.report.memory = self._counted()

    def _counted(self) -> dict[str, int | None] | None:
        """What the host hypervisor and the toolstack counted; an older toolstack does not tell its part."""
        found, sent = self._log.search(_PASSED_ON), self._log.search(_SENT)
        if not found:
            return None
        counted = {key: int(value) for key, value in found.groupdict().items()}
        return {**counted, "pages_sent": int(sent["pages_sent"]) if sent else None}


class Pump(threading.Thread):
    """Moves a stream from one pipe to another inside the kernel and counts its bytes."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._sink = sink
        self.bytes = 0

    def run(self) -> None:
        # A broken pipe is no error here: closing the other end tells it to that side.
        with suppress(OSError):
            while moved := os.splice(self._source.fileno(), self._sink.fileno(), 1 << 20):
                self.bytes += moved
        for stream in (self._sink, self._source):
            with suppress(OSError):
                stream.close()


def _decided(verdict: Verdict) -> Verdict:
    if verdict.problem:
        raise Undecided(verdict.problem, location=verdict.location)
    return verdict


def _has(xl: Xl, domid: int) -> bool:
    """A dying domain, whose memory is still being freed, does not count: it never runs again."""
    return any(domain.domid == domid and domain.state != "dying" for domain in xl.domains())
