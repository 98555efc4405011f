"""A call that other ranks do not make says so, and in the end it ends the job."""

from __future__ import annotations

import time
from typing import Any

import pytest

from hvdscale.runtime import patience as module


def test_a_call_that_waits_is_named_and_ended(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(module, "abort", ended.append)
    with module.patience("state_dict()", warn_seconds=0.01, end_seconds=0.03):
        time.sleep(0.2)
    said = capsys.readouterr().err
    assert "has waited 0.01 s for other ranks: state_dict() needs all ranks" in said
    assert "ended the job" in said
    assert ended == [1]


def test_a_call_that_is_answered_says_nothing(capsys: Any) -> None:
    with module.patience("state_dict()", warn_seconds=0.05, end_seconds=0.05):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
