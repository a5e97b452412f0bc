"""Programs that a test starts, and ends by a signal as a terminal does."""

import signal
import subprocess
import time
from pathlib import Path


def start(args: list[str], **options) -> subprocess.Popen:
    """A program in a group of processes of its own, which has its number."""

    def heed_signals():
        # Whoever runs the tests in the background may ignore these, which is inherited.
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.Popen(args, **options, start_new_session=True, preexec_fn=heed_signals)


def wait_for(path: Path, program: subprocess.Popen, seconds: float) -> None:
    """Until a program that still runs has written a file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
