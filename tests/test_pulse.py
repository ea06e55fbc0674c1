"""A test that asserts seconds is run again only where the machine itself stood still."""
import os
import signal
import time

from tests.pulse import STILL, Pulse


def test_a_gap_is_noticed_and_belongs_to_its_own_test():
    pulse = Pulse()
    try:
        time.sleep(0.3)                                                             # it has started
        os.kill(pulse.process.pid, signal.SIGSTOP); time.sleep(2 * STILL); os.kill(pulse.process.pid, signal.SIGCONT)
        assert pulse.missed()
        quiet = []
        for _ in range(20): pulse.begin(); quiet.append(not pulse.missed())
        assert any(quiet)
    finally: pulse.stop()


def test_it_ends_with_its_owner():
    pulse = Pulse()
    pulse.stop()
    assert pulse.process.poll() is not None and not pulse.gaps.exists()
