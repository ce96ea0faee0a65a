"""A Ctrl-C that Python drops, because it came while a weak reference was being cleaned up, is raised when it is asked for."""

import os
import signal
import sys
import weakref
from collections.abc import Iterator

import pytest

from forwardgrad.lab import interrupts


class Thing:
    """What a weak reference is made to."""


@pytest.fixture
def listening() -> Iterator[None]:
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    interrupts.listen()
    yield
    signal.signal(signal.SIGINT, before)
    sys.unraisablehook = hook
    interrupts._asked = False


@pytest.mark.usefixtures("listening")
def test_a_lost_interrupt_is_raised_at_the_next_check(capsys: pytest.CaptureFixture[str]) -> None:
    interrupts.check()  # none was asked for
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del thing  # the callback runs here, and what it raises is dropped
    assert reference() is None
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("listening")
def test_an_interrupt_elsewhere_is_raised_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
