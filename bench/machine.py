"""What a figure was measured on: processor, memory, versions, the state of the source. No torch."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

_REPOSITORY = Path(__file__).resolve().parent.parent

#: Instruction sets that decide how fast this project's arithmetic is.
_TELLING_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
    "hypervisor",
)
_PACKAGES = ("ndif-actor", "torch", "transformers", "numpy", "aiohttp", "msgspec", "uvloop")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The computer. `flags` are those that matter here; `load` is the load average of 1 minute."""

    cpu: str
    cores: int
    flags: list[str]
    memory_gib: float
    kernel: str
    threads_setting: str | None
    load: float


class Source(msgspec.Struct, frozen=True):
    """The commit that was measured, and whether files differed from it."""

    sha: str | None
    changed: bool | None


def describe_machine() -> Machine:
    """Return the facts of this computer, as it is now."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return Machine(
        cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        flags=[flag for flag in _TELLING_FLAGS if flag in flags],
        memory_gib=round(pages * size / 2**30, 1),
        kernel=f"{platform.system()} {platform.release()}",
        threads_setting=os.environ.get("OMP_NUM_THREADS"),
        load=os.getloadavg()[0],
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe_source() -> Source:
    """Return what git says of this checkout; nothing where it is none."""
    sha = _git("rev-parse", "HEAD")
    if sha is None:
        return Source(None, None)
    # Results written by an earlier command don't change what is measured.
    return Source(sha, bool(_git("status", "--porcelain", "--", ".", ":!bench/results")))


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpuinfo(wanted: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == wanted:
            return value.strip()
    return None
