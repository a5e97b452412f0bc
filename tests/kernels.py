"""Commands that start Jupyter kernels, beside other tests that do."""

import re
import subprocess
import warnings

# Jupyter picks ports that are free and lets go of them until the kernel binds them. A kernel that
# starts at the same moment may be given one of them: then one ends, or is not heard, before its
# first cell. (https://github.com/nteract/papermill/issues/511; Snakemake's profile retries.)
PORT_TAKEN = re.compile(r"Kernel died before replying to kernel_info|Kernel didn't respond in \d+")


def run(command, **options) -> subprocess.CompletedProcess:
    """The ended command with what it said; called again where a kernel's port was taken."""
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if done.returncode == 0 or not PORT_TAKEN.search(done.stdout + done.stderr):
            break
        warnings.warn("a kernel's port was taken: started again", stacklevel=2)
    return done
