"""What becomes of the tensors of an exchange, of which a thread of gloo keeps a reference for a moment."""

import threading

import pytest
import torch

from forwardgrad.ranks import hold, wire


def test_python_ends_after_all_others_have_let_the_tensors_go() -> None:
    message = torch.zeros(6)
    others = [message.view(2, 3)]  # has a reference of C++'s to the message, as gloo's thread does
    hold(message)
    assert message._use_count() == 2  # type: ignore[attr-defined]
    timer = threading.Timer(0.1, others.clear)
    timer.start()
    wire._let_go()
    assert message._use_count() == 1  # type: ignore[attr-defined]
    timer.join()


def test_python_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    message = torch.zeros(6)
    view = message.view(2, 3)
    hold(message)
    monkeypatch.setattr(wire, "LETTING_GO_SECONDS", 0.05)
    wire._let_go()
    assert view._base is message
    hold()


def test_what_is_large_is_not_kept_in_memory() -> None:
    hold(torch.zeros(wire.HELD_BYTES // 4))
    assert len(wire._held) == 1
    hold(torch.zeros(wire.HELD_BYTES // 4 + 1))
    assert not wire._held
