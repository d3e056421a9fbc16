"""Commands that meet a full file system: they say so, change what they were to change or nothing, and leak nothing."""
import os
import re
import subprocess

from base import KIB, MIB, SECTOR, Complaint, bound_to_parent, run
from images import KINDS
from model import Model, Piece, stamped

STEPS = 12
SIZE = 8 * MIB
NO_ROOM = "No space left|File too large|Disk quota exceeded"


def attempt(space, command, *, has_room, data=b""):
    """Nothing if it succeeds, else what it says. Where it fails, there was no room, and it says so."""

    def prepare():
        bound_to_parent()
        space.prepare()

    done = subprocess.run(command, input=data, capture_output=True, preexec_fn=prepare, timeout=60)
    said = (done.stdout + done.stderr).decode(errors="replace").strip()
    if done.returncode == 0:
        return None
    if done.returncode != 1 or has_room or re.search(NO_ROOM, said) is None:
        raise Complaint(f"{' '.join(command)}: exit status {done.returncode}: {said}")
    return said


class Commands:
    def __init__(self, space, kind, rng, *, qcow, server, scratch):
        del server  # there is none
        self.space = space
        self.kind = KINDS[kind]
        self.rng = rng
        self.qcow = qcow
        self.scratch = scratch
        self.refused = 0
        self.path = os.path.join(space.directory, "disk")
        self.target = os.path.join(space.directory, "target")
        self.piece = Piece(0, SIZE // SECTOR)
        self.model = Model([self.piece])
        space.empty()
        options = ",".join(filter(None, [f"cluster_size={self.kind.cluster}", self.kind.options]))
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, self.path, str(SIZE))

    def run(self):
        for _ in range(STEPS):
            has_room = self.rng.random() < 0.4
            self.space.set_room(None if has_room else self.rng.choice([0, 8 * KIB, 100 * KIB, 600 * KIB]))
            # With so little left the disk itself has filled it.
            has_room = has_room and self.space.free() > SIZE + 2 * MIB
            step = self.rng.choice([*[self._write] * 3, self._zero, self._resize, self._convert, self._convert_into, self._create])
            step(has_room)
            self._verify()
        return {"commands that met a full file system": self.refused}

    def _command(self, has_room, *arguments, data=b""):
        """Whether it succeeded."""
        refusal = attempt(self.space, [self.qcow, *arguments], has_room=has_room, data=data)
        self.refused += refusal is not None
        return refusal is None

    def _change(self, has_room, command, value, data=b""):
        index = self.rng.randrange(self.piece.count)
        count = min(self.piece.count - index, int(2 ** self.rng.uniform(0, 12)))
        if value:
            data = stamped(index, count, value)
        self.model.begin(self.piece, index, count, value, bool(value))
        length = [] if value else [str(count * SECTOR)]
        if self._command(has_room, command, "-f", "qcow2", self.path, str(index * SECTOR), *length, data=data):
            self.model.done(self.piece, bool(value), True, False)
        else:
            self.model.failed(self.piece)

    def _write(self, has_room):
        self._change(has_room, "write", self.model.next_value())

    def _zero(self, has_room):
        self._change(has_room, "zero", 0)

    def _resize(self, has_room):
        """To a disk with many tables, and back."""
        if self._command(has_room, "resize", "-f", "qcow2", self.path, "2G"):
            self._command(False, "resize", "-f", "qcow2", "--shrink", self.path, str(SIZE))

    def _convert(self, has_room):
        target, *options = self.rng.choice([["raw"], ["qcow2"], ["qcow2", "-c"]])
        if self._command(has_room, "convert", "-O", target, *options, self.path, self.target):
            run("qemu-img", "compare", "-f", "qcow2", "-F", target, self.path, self.target)
        self._remove_target()

    def _convert_into(self, has_room):
        value = self.model.next_value()
        source = os.path.join(self.scratch, "source.raw")
        with open(source, "wb") as file:
            file.write(stamped(0, self.piece.count, value))
        self.model.begin(self.piece, 0, self.piece.count, value, True)
        if self._command(has_room, "convert", "-f", "raw", "-n", source, self.path):
            self.model.done(self.piece, True, True, False)
        else:
            self.model.failed(self.piece)

    def _create(self, has_room):
        options = f"preallocation={self.rng.choice(['metadata', 'falloc', 'full'])},cluster_size=4k"
        self._command(has_room, "create", "-q", "-o", options, self.target, str(SIZE // 2))
        self._remove_target()

    def _remove_target(self):
        """Whether it is complete, or not there at all."""
        if os.path.exists(self.target):
            run(self.qcow, "check" if self._is_qcow2(self.target) else "info", self.target)
            os.unlink(self.target)
        left = sorted(set(os.listdir(self.space.directory)) - {"disk"})
        if left:
            raise Complaint(f"a command leaves {', '.join(left)}")

    def _is_qcow2(self, path):
        with open(path, "rb") as file:
            return file.read(4) == b"QFI\xfb"

    def _verify(self):
        run("qemu-img", "check", "-q", "-f", "qcow2", self.path)
        run(self.qcow, "check", self.path)
        read = os.path.join(self.scratch, "read.raw")
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path, read)
        with open(read, "rb") as file:
            self.model.saw(self.piece, 0, file.read(SIZE))
