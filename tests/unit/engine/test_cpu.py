"""What is read of a processor, from files that describe well-known ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ndif_actor.engine.cpu import has_native_half, kernel_environment

SKYLAKE = "vendor_id\t: GenuineIntel\nmodel name\t: Xeon\nflags\t\t: fpu avx avx2 avx512f\n"
SAPPHIRE_RAPIDS = "vendor_id\t: GenuineIntel\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16\n"
HASWELL = "vendor_id\t: GenuineIntel\nflags\t\t: avx avx2\n"
OLD = "vendor_id\t: GenuineIntel\nflags\t\t: sse4_2\n"
EPYC = "vendor_id\t: AuthenticAMD\nflags\t\t: avx2 avx512f avx512_bf16\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve svebf16 bf16\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(request.param)
    return path


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [(SKYLAKE, False), (HASWELL, False), (SAPPHIRE_RAPIDS, True), (EPYC, True), (GRAVITON, True)],
    indirect=["cpuinfo"],
)
def test_a_processor_has_native_half_precision_if_it_says_so(cpuinfo: Path, native: bool) -> None:
    assert has_native_half(cpuinfo) is native


def test_where_nothing_can_be_told_native_half_precision_is_assumed(tmp_path: Path) -> None:
    assert has_native_half(tmp_path / "missing")


@pytest.mark.parametrize(
    ("cpuinfo", "single", "half"),
    [
        (SKYLAKE, "AVX2,STRICT", "AVX512,STRICT"),
        (HASWELL, "AVX2,STRICT", "AVX2,STRICT"),
        (OLD, None, None),
        (EPYC, None, None),
        (GRAVITON, None, None),
    ],
    indirect=["cpuinfo"],
)
def test_matrix_products_are_made_independent_of_the_batch_where_mkl_can(
    cpuinfo: Path, single: str | None, half: str | None
) -> None:
    assert kernel_environment("float32", cpuinfo).get("MKL_CBWR") == single
    assert kernel_environment("bfloat16", cpuinfo).get("MKL_CBWR") == half
