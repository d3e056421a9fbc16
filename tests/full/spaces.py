"""Places where files can be, and where room can be taken away and given back while they are in use."""
import contextlib
import os
import resource
import subprocess
import threading

from base import KIB, LIBC, MIB, works


class Unavailable(Exception):
    pass


class Gate:
    """Those who pass go on side by side, until somebody shuts it and has it alone."""

    def __init__(self):
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    @contextlib.contextmanager
    def passing(self):
        with self._changed:
            self._changed.wait_for(lambda: not self._shut)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def shut(self):
        with self._changed:
            self._changed.wait_for(lambda: not self._shut)
            self._shut = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._shut = False
                self._changed.notify_all()


class Space:
    """`directory` is where files go. What is there is taken away by `close`."""

    # With so much room nothing may be refused: more than all that can be in flight takes.
    ENOUGH = 4 * MIB
    # What the file system keeps for itself of the room that it says there is.
    HELD_BACK = 0

    def __init__(self, scratch):
        self.directory = os.path.join(scratch, type(self).__name__)
        self.gate = Gate()
        self._epoch = 0  # odd while there is room
        os.makedirs(self.directory)

    def room_since(self):
        """Something to ask `room_all_along` about later; None if there is not enough room now."""
        epoch = self._epoch
        return epoch if epoch % 2 == 1 and self.free() >= self.ENOUGH else None

    def room_all_along(self, since):
        return since is not None and since == self._epoch and self.free() >= self.ENOUGH

    def set_room(self, room):
        """Leaves that many bytes, or all that there are."""
        if self._epoch % 2 == 1:
            self._epoch += 1
        self._set_room(room)
        if room is None:
            self._epoch += 1

    def prepare(self):
        """In a process that is about to become a server."""

    def adopt(self, process):
        """A server that runs now."""

    def empty(self):
        self.set_room(None)
        for name in os.listdir(self.directory):
            os.unlink(os.path.join(self.directory, name))


class FilledSpace(Space):
    """A file system of its own, with a file in it that takes the room away."""

    def __init__(self, scratch):
        super().__init__(scratch)
        self._file = None
        self.mount(os.path.join(scratch, type(self).__name__ + ".fs"))
        self._file = os.open(self.directory, os.O_TMPFILE | os.O_RDWR)

    def _mount(self, *arguments):
        done = subprocess.run(["mount", *arguments, self.directory], capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(done.stderr.strip().splitlines()[0])

    def free(self):
        status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize

    def _set_room(self, room):
        # What others give back at the same time is taken, too.
        for _ in range(8):
            size = os.fstat(self._file).st_size
            excess = size if room is None else room - self.free()
            if excess >= 0 or room is None:
                return os.ftruncate(self._file, max(0, size - excess))
            self._grow(size, -excess)
            if self.free() <= room:
                return None
        return None

    def _grow(self, size, more):
        while more >= KIB:
            try:
                return os.posix_fallocate(self._file, size, more)
            except OSError:
                more //= 2
        return None

    def empty(self):
        super().empty()
        LIBC.syncfs(self._file)  # some give back later what was in use

    def close(self):
        if self._file is not None:
            os.close(self._file)
        subprocess.run(["umount", self.directory], capture_output=True)


class Tmpfs(FilledSpace):
    def mount(self, _):
        self._mount("-t", "tmpfs", "-o", "size=12M", "none")


class Ext4(FilledSpace):
    SIZE = 16 * MIB
    BLOCK = 4 * KIB
    FEATURES = ()
    OPTIONS = "loop"

    def mount(self, device):
        with open(device, "wb") as file:
            file.truncate(self.SIZE)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-b", str(self.BLOCK), *self.FEATURES, device], check=True)
        self._mount("-o", self.OPTIONS, device)
        os.rmdir(os.path.join(self.directory, "lost+found"))


class Ext4SmallBlocks(Ext4):
    BLOCK = KIB


class Xfs(FilledSpace):
    HELD_BACK = 1 * MIB

    def mount(self, device):
        with open(device, "wb") as file:
            file.truncate(320 * MIB)  # there are none smaller than 300 MB
        subprocess.run(["mkfs.xfs", "-q", device], check=True)
        self._mount("-o", "loop", device)


class Quota(Ext4):
    """A directory of a file system that has room."""

    SIZE = 64 * MIB
    FEATURES = ("-O", "quota,project", "-E", "quotatype=prjquota", "-I", "256")
    OPTIONS = "loop,prjquota"
    PROJECT = "42"

    def mount(self, device):
        super().mount(device)
        directory = os.path.join(self.directory, "limited")
        os.mkdir(directory)
        limit = ["xfs_quota", "-x", "-f", "-c", f"limit -p bhard=12m {self.PROJECT}", self.directory]
        if not works("chattr", "-p", self.PROJECT, "+P", directory) or not works(*limit):
            raise Unavailable("the limit cannot be set")
        self.mounted, self.directory = self.directory, directory

    def close(self):
        self.directory = getattr(self, "mounted", self.directory)
        super().close()


class FileSizeLimit(Space):
    """`ulimit -f`: no file grows beyond a size. Files that are longer already could not even be overwritten, so nothing
    may be in flight when the limit is set."""

    def __init__(self, scratch):
        super().__init__(scratch)
        self._limit = resource.RLIM_INFINITY
        self._process = None

    def _longest(self):
        sizes = [os.stat(os.path.join(self.directory, name)).st_size for name in os.listdir(self.directory)]
        return max(sizes, default=0)

    def free(self):
        return 1 << 40 if self._limit == resource.RLIM_INFINITY else self._limit - self._longest()

    def _set_room(self, room):
        with self.gate.shut():
            self._limit = resource.RLIM_INFINITY if room is None else self._longest() + room
            if self._process is not None and self._process.poll() is None:
                resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (self._limit, resource.RLIM_INFINITY))

    def prepare(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._limit, resource.RLIM_INFINITY))

    def adopt(self, process):
        self._process = process

    def close(self):
        pass


SPACES = {"ext4": Ext4, "ext4-1k": Ext4SmallBlocks, "xfs": Xfs, "tmpfs": Tmpfs, "quota": Quota, "file-size": FileSizeLimit}
