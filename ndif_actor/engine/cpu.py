"""What this machine's processor can do, and the settings its arithmetic wants. No torch.

Settings must be in the environment before torch is imported.
"""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_NATIVE_HALF = frozenset(("avx512_bf16", "amx_bf16", "bf16", "svebf16"))


def has_native_half(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether this processor multiplies bfloat16 natively; assumed where it can't be told."""
    flags = _field(cpuinfo, "flags") or _field(cpuinfo, "Features")
    return flags is None or not _NATIVE_HALF.isdisjoint(flags.split())


def kernel_environment(dtype: str, cpuinfo: Path = _CPUINFO) -> dict[str, str]:
    """Return the environment that makes matrix products independent of how many rows share them.

    Intel MKL's strict mode gives a row the same bits whatever the other rows are. In float32 its
    AVX2 kernels also add in the order that the default mode uses for a short prompt alone, so a
    shared forward agrees with a solo one more closely; half precision takes the faster AVX-512.

    Args:
        dtype: the model's, "float32", "bfloat16", ...
    """
    flags = (_field(cpuinfo, "flags") or "").split()
    if _field(cpuinfo, "vendor_id") != "GenuineIntel" or "avx2" not in flags:
        return {}
    wide = "avx512f" in flags and dtype in ("bfloat16", "float16")
    return {"MKL_CBWR": "AVX512,STRICT" if wide else "AVX2,STRICT"}


def _field(cpuinfo: Path, wanted: str) -> str | None:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == wanted:
            return value.strip()
    return None
