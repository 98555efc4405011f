"""Start-up notices are kept off the screen; warnings, errors and the user's own choice are not."""

from __future__ import annotations

import pytest

from hvdscale.runtime.console import is_notice

LINES = [
    ("WARNING: All log messages before absl::InitializeLog() is called are written to STDERR", True),
    ("I0000 00:00:1.2 15304 port.cc:153] oneDNN custom operations are on.", True),
    ("To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow", True),
    ("E0000 00:00:1.2 1 cuda_fft.cc:477] Unable to register cuFFT factory", True),
    ("W0000 00:00:1.2 1 allocator.cc:1] Allocation exceeds 10% of free memory.", False),
    ("E0000 00:00:1.2 1 loader.cc:1] Could not load library", False),
    ("UserWarning: Important", False),
    ("", False),
]


@pytest.mark.parametrize(("line", "notice"), LINES, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_what_a_notice_is(line: str, notice: bool) -> None:
    assert is_notice(line) is notice
