"""Builds the emulator: Debian's QEMU source plus ``lab/qemu-patches``, TCG only."""

from __future__ import annotations

import os
import pathlib
import shutil

from . import cache, paths
from .errors import LabError
from .shell import run

PATCHES = paths.LAB / "qemu-patches"

_CONFIGURE = (
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-system",
    "--enable-tools",
    "--enable-tcg",
    "--enable-slirp",
    "--enable-fdt=system",
    "--disable-docs",
)


def series() -> list[pathlib.Path]:
    """Return the patches in the order in which they apply."""
    names = (PATCHES / "series").read_text().split()
    return [PATCHES / name for name in names]


def _source_version() -> str:
    """Return the version that ``apt-get source qemu`` gives now."""
    lines = run(["apt-cache", "showsrc", "--only-source", "qemu"], timeout=60).splitlines()
    versions = [line.split(None, 1)[1] for line in lines if line.startswith("Version: ")]
    if not versions:
        raise LabError("no source package qemu: enable deb-src for Debian 12 in apt's sources (make setup)")
    newest = versions[0]
    for version in versions[1:]:
        if not os.spawnlp(os.P_WAIT, "dpkg", "dpkg", "--compare-versions", version, "gt", newest):
            newest = version
    return newest


def build() -> pathlib.Path:
    """Return the directory that holds qemu-system-x86_64 and qemu-img."""
    version = _source_version()
    key = cache.digest(version, _CONFIGURE, series())

    def make(entry: pathlib.Path) -> None:
        work, log = entry / "work", entry / "build.log"
        work.mkdir()
        run(["apt-get", "source", "--download-only", f"qemu={version}"], cwd=work, timeout=900, log=log)
        run(["dpkg-source", "-x", next(work.glob("*.dsc")), work / "src"], timeout=300, log=log)
        for patch in series():
            run(
                ["patch", "--batch", "--fuzz=0", "-p1", "-i", patch],
                cwd=work / "src",
                timeout=60,
                log=log,
            )
        (work / "src" / "build").mkdir()
        run(["../configure", *_CONFIGURE], cwd=work / "src" / "build", timeout=600, log=log)
        run(
            ["ninja", "qemu-system-x86_64", "qemu-img"],
            cwd=work / "src" / "build",
            timeout=3600,
            log=log,
        )
        for name in ("qemu-system-x86_64", "qemu-img"):
            shutil.copy2(work / "src" / "build" / name, entry / name)
        shutil.rmtree(work)

    return cache.once("qemu", key, make)
