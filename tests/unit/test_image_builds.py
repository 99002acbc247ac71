"""Builds of images that are interrupted or meet, by real processes, mounts and loop devices."""

import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lab"))

from vmbeam_lab import cache, images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VMBEAM_CACHE", str(tmp_path / "cache"))


def until(check, seconds=60):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Build:
    """A build of an image whose playbook hangs or fails, for in place of Ansible a script runs."""

    def __init__(self, directory: Path, script: str) -> None:
        self.image = directory / "disk.raw"
        self.ready = directory / "ready"
        programs = directory / "bin"
        programs.mkdir()
        playbook = programs / "ansible-playbook"
        # Its name is a word of each process of the build, to look for.
        playbook.write_text(f"#!/bin/sh\ntouch {self.ready}\n{script}\n")
        playbook.chmod(0o755)
        with tarfile.open(directory / "base.tar", "w") as base:
            base.add(programs, "etc", recursive=False)
        self.log = directory / "log"
        arguments = ("--base", directory / "base.tar", "--size-mb", "64", "--playbook", directory / "none.yml")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, images.BUILDER, *arguments, "--output", self.image],
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
            )

    def text(self) -> str:
        return self.log.read_text()

    def processes(self) -> list[str]:
        """Return the ids of processes that name the build's directory."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and str(self.image.parent).encode() in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
            except OSError:
                pass
        return found

    def loops(self) -> str:
        done = subprocess.run(["losetup", "--associated", self.image], capture_output=True, text=True, check=True)
        return done.stdout

    def mounts(self) -> bool:
        return str(self.image.parent) in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def builds(tmp_path):
    """Start builds; skip where none can get as far as to the playbook."""
    made = []

    def start(script):
        if os.getuid() != 0:
            pytest.skip("images are built by root")
        build = Build(tmp_path, script)
        made.append(build)
        until(lambda: build.ready.exists() or build.process.poll() is not None)
        if not build.ready.exists():
            for refused in ("unshare failed", "/dev/loop", "only root can use"):
                if refused in build.text():
                    pytest.skip(f"no mounts or loop devices here: {build.text()[-300:]}")
        assert build.ready.exists(), build.text()
        return build

    yield start
    for build in made:
        build.process.kill()
        build.process.wait(10)


def test_a_killed_build_leaves_no_process_mount_or_device(builds):
    build = builds("sleep 600; :")
    assert build.loops()
    assert not build.mounts()
    build.process.send_signal(signal.SIGKILL)
    build.process.wait(10)
    until(lambda: not build.processes())
    until(lambda: not build.loops())
    assert not build.mounts()


def test_a_build_dies_with_who_started_it(builds, tmp_path):
    build = builds("sleep 600; :")
    # The process that the test started is the one that unshare(1) replaced: its child is the builder proper.
    children = Path(f"/proc/{build.process.pid}/task/{build.process.pid}/children").read_text().split()
    assert len(children) == 1
    os.kill(int(children[0]), signal.SIGKILL)
    build.process.wait(10)
    until(lambda: not build.processes())
    until(lambda: not build.loops())


def test_a_build_that_fails_says_why_and_frees_the_device(builds):
    build = builds("exit 3")
    assert build.process.wait(60) == 1
    assert "ansible-playbook" in build.text().splitlines()[-1]
    assert "exit status 3" in build.text().splitlines()[-1]
    until(lambda: not build.loops())


def test_the_next_build_takes_the_place_of_a_killed_one(tmp_path):
    kind = tmp_path / "cache" / "image"
    program = (
        "import time; from vmbeam_lab import cache\n"
        "def make(entry):\n    (entry / 'half').touch(); time.sleep(600)\n"
        "cache.once('image', 'key', make)"
    )
    lab = str(Path(__file__).resolve().parents[2] / "lab")
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": lab})
    until((kind / "key" / "half").exists)
    process.kill()
    process.wait(10)
    assert cache.lookup("image", "key") is None
    entry = cache.once("image", "key", lambda entry: (entry / "whole").touch())
    assert (entry / "whole").exists()
    assert not (entry / "half").exists()


def test_a_second_build_waits_and_takes_the_firsts_result():
    building, go_on, result = threading.Event(), threading.Event(), []

    def first(entry):
        building.set()
        assert go_on.wait(30)
        (entry / "first").touch()

    def second(entry):
        raise AssertionError("built twice")

    threads = [threading.Thread(target=lambda: result.append(cache.once("image", "key", first)))]
    threads[0].start()
    assert building.wait(30)
    threads.append(threading.Thread(target=lambda: result.append(cache.once("image", "key", second))))
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive(), "it did not wait"
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert [(entry / "first").exists() for entry in result] == [True, True]


def test_what_dead_builds_of_other_sources_left_is_removed_and_live_ones_are_not(tmp_path):
    kind = tmp_path / "cache" / "image"
    (kind / "dead").mkdir(parents=True)
    (kind / "live").mkdir()
    with cache._locked(kind / "live.lock"):
        cache.once("image", "key", lambda entry: None)
    assert sorted(path.name for path in kind.iterdir() if path.is_dir()) == ["key", "live"]
