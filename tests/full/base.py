"""What the parts of this search share."""
import ctypes
import signal
import subprocess

KIB = 1024
MIB = 1024 * KIB
SECTOR = 512

LIBC = ctypes.CDLL(None, use_errno=True)
CAP_SYS_RESOURCE = 24  # with which quotas would not count
PR_CAPBSET_DROP = 24
PR_SET_PDEATHSIG = 1


class Complaint(Exception):
    """What must not be."""


def bound_to_parent():
    """For a process that is about to begin: it dies with this one, and has no more space than anybody."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    LIBC.prctl(PR_CAPBSET_DROP, CAP_SYS_RESOURCE)


def run(*command, expect=(0,), directory=None):
    """Runs a program, there, that has to end with one of these statuses."""
    done = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    if done.returncode not in expect:
        raise Complaint(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done


def works(*command):
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
