"""A guest's ext4, ten times filled until the host has no room, and half emptied. A guest that is refused for want of room
is stopped, and when there is some goes on with the same request: so does a virtual machine of QEMU's.

What it writes comes from e2fsprogs, which work on a file; the blocks that have changed there are written to the disk."""
import os

import nbd

from base import KIB, MIB, Complaint, run
from servers import Server

BLOCK = 4 * KIB
SIZE = 24 * MIB
LONGEST = 64 * KIB
FILLS = 10
KINDS = {
    "64k": ["-o", "cluster_size=64k"],
    "4k": ["-o", "cluster_size=4k"],
    "extended": ["-o", "extended_l2=on"],
    "over": ["-o", "cluster_size=16k"],  # with a backing file
}


class Guest:
    def __init__(self, space, kind, rng, *, qcow, server, scratch):
        self.space = space
        self.rng = rng
        self.qcow = qcow
        self.program = server
        self.scratch = scratch
        self.stopped = 0
        self.files = {}
        self.raw = os.path.join(scratch, "guest.raw")
        self.path = os.path.join(space.directory, "disk")
        space.empty()
        with open(self.raw, "wb") as file:
            file.truncate(SIZE)
        backing = []
        if kind == "over":
            run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), self.raw)
            base = os.path.join(scratch, "guest-base.qcow2")
            run("qemu-img", "convert", "-O", "qcow2", self.raw, base)
            backing = ["-b", base, "-F", "qcow2"]
        run("qemu-img", "create", "-q", "-f", "qcow2", *KINDS[kind], *backing, self.path, str(SIZE))
        self.known = self._contents()
        if kind != "over":
            run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), self.raw)

    def run(self):
        server = Server(self.program, self.path, "qcow2", self.scratch, self.space)
        try:
            client = server.connect()
            for fill in range(FILLS):
                self._write_changes(client.handle)
                self._change_files(fill)
                self._fill_the_host()
                self._write_changes(client.handle)
            client.close()
            server.stop()
        except (nbd.Error, Complaint) as error:
            raise Complaint(f"{error}\nThe server says: {server.said()}") from error
        finally:
            server.kill()
        self._verify()
        return {"times that a guest was stopped for want of room, and went on": self.stopped}

    def _contents(self):
        with open(self.raw, "rb") as file:
            return file.read()

    def _change_files(self, fill):
        """Some files more, and some less."""
        commands = []
        for name in self.rng.sample(sorted(self.files), len(self.files) // 2):
            commands.append(f"rm {name}")
            os.unlink(self.files.pop(name))
        for i in range(self.rng.randint(2, 6)):
            name = f"file{fill}.{i}"
            path = os.path.join(self.scratch, name)
            with open(path, "wb") as file:
                file.write(self.rng.randbytes(self.rng.randint(1, 700 * KIB)))
            commands.append(f"write {path} {name}")
            self.files[name] = path
        script = os.path.join(self.scratch, "commands")
        with open(script, "w") as file:
            file.write("\n".join(commands) + "\n")
        run("debugfs", "-w", "-f", script, self.raw)

    def _fill_the_host(self):
        self.space.set_room(self.rng.choice([0, 30 * KIB, 200 * KIB]))

    def _write_changes(self, handle):
        """And flushes, which never fails. What is refused is tried again when there is room, as soon as possible."""
        now = self._contents()
        changed = [at for at in range(0, SIZE, BLOCK) if now[at : at + BLOCK] != self.known[at : at + BLOCK]]
        while changed:
            begin = end = changed.pop(0)
            end += BLOCK
            while changed and changed[0] == end and end - begin < LONGEST:
                end = changed.pop(0) + BLOCK
            self._write(handle, now[begin:end], begin)
            if self.rng.random() < 0.05:
                handle.flush()
        handle.flush()
        self.known = now

    def _write(self, handle, data, offset):
        try:
            handle.pwrite(data, offset)
        except nbd.Error as error:
            if error.errno != "ENOSPC":
                raise
            self.stopped += 1
            if self.rng.random() < 0.5:
                handle.flush()
            self.space.set_room(None)
            handle.pwrite(data, offset)
            if self.rng.random() < 0.7:
                self._fill_the_host()

    def _verify(self):
        self.space.set_room(None)
        run("qemu-img", "check", "-q", self.path)
        run(self.qcow, "check", self.path)
        read = os.path.join(self.scratch, "read.raw")
        run("qemu-img", "convert", "-O", "raw", self.path, read)
        run("e2fsck", "-fn", read)
        run("cmp", read, self.raw)
        for name, path in self.files.items():
            copy = os.path.join(self.scratch, "copy")
            run("debugfs", "-R", f"dump {name} {copy}", read)
            run("cmp", copy, path)
            os.unlink(path)
        self.files = {}
