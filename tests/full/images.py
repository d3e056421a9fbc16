"""Images of many kinds, and what must be true of them afterwards."""
import dataclasses
import hashlib
import json
import os

from base import KIB, MIB, SECTOR, Complaint, run
from model import Model, Piece, stamped

BITMAP = "changes"
GRANULARITY = 64 * KIB


@dataclasses.dataclass
class Kind:
    cluster: int = 64 * KIB
    options: str = ""
    format: str = "qcow2"
    base: str = ""  # the format of what lies below
    filled: str = ""  # with first contents: plain or compressed
    snapshot: bool = False
    bitmap: bool = False
    data_file: bool = False
    preallocated: bool = False
    largest: int = 64 * 1024 * MIB  # of what is scattered over a disk of this size


KINDS = {
    "64k": Kind(),
    "4k": Kind(4 * KIB, largest=8 * 1024 * MIB),
    "512": Kind(512, largest=512 * MIB),
    "2m": Kind(2 * MIB),
    "v2": Kind(options="compat=0.10"),
    "extended": Kind(64 * KIB, "extended_l2=on"),
    "extended-16k": Kind(16 * KIB, "extended_l2=on"),
    "over-qcow2": Kind(base="qcow2"),
    "over-qcow2-512k": Kind(512 * KIB, base="qcow2"),
    "over-raw-4k": Kind(4 * KIB, base="raw", largest=8 * 1024 * MIB),
    "extended-over-qcow2": Kind(64 * KIB, "extended_l2=on", base="qcow2"),
    "snapshot": Kind(filled="plain", snapshot=True),
    "snapshot-4k": Kind(4 * KIB, filled="plain", snapshot=True, largest=8 * 1024 * MIB),
    "compressed": Kind(filled="compressed"),
    "compressed-snapshot-4k": Kind(4 * KIB, filled="compressed", snapshot=True, largest=8 * 1024 * MIB),
    "lazy": Kind(options="lazy_refcounts=on"),
    "lazy-snapshot": Kind(16 * KIB, "lazy_refcounts=on", filled="plain", snapshot=True),
    "narrow-refcounts": Kind(4 * KIB, "refcount_bits=1", largest=8 * 1024 * MIB),
    "wide-refcounts": Kind(512, "refcount_bits=64", largest=512 * MIB),
    "data-file": Kind(data_file=True),
    "data-file-raw": Kind(16 * KIB, "data_file_raw=on", data_file=True, largest=64 * MIB),
    "bitmap": Kind(bitmap=True),
    "bitmap-4k": Kind(4 * KIB, bitmap=True, largest=8 * 1024 * MIB),
    "bitmap-over": Kind(base="qcow2", bitmap=True),
    "preallocated": Kind(options="preallocation=falloc", preallocated=True, largest=4 * MIB),
    "raw": Kind(format="raw"),
}


def cut_into_pieces(rng, kind):
    """Which sectors of a disk are used, and its size: all of them, one behind the other, or some of a large disk."""
    pieces = []
    if kind.preallocated or rng.random() < 0.5:
        size = (4 * MIB if kind.preallocated else rng.choice([6, 16, 24]) * MIB) // SECTOR
        first = 0
        while first < size:
            count = min(size - first, int(2 ** rng.uniform(0, 11.5)))
            pieces.append(Piece(first, count))
            first += count
    else:
        size = kind.largest // SECTOR
        places = rng.randint(12, 60)
        for i in range(places):
            count = int(2 ** rng.uniform(0, 10.5))
            begin, end = size * i // places, size * (i + 1) // places
            pieces.append(Piece(rng.randint(begin, max(begin, end - count)), min(count, end - begin)))
    return pieces, size * SECTOR


class TestImage:
    """In `space`; what belongs to it and needs no room goes to `scratch`."""

    def __init__(self, name, space, scratch, qcow, rng):
        self.kind = KINDS[name]
        self.qcow = qcow
        self.scratch = scratch
        self.directory = space.directory
        self.path = os.path.join(self.directory, "disk")
        self.data = os.path.join(self.directory, "data")
        pieces, self.size = cut_into_pieces(rng, self.kind)
        self.model = Model(pieces)
        self.leaks = 0  # that a killed server left
        self._make(rng)

    def _make(self, rng):
        kind = self.kind
        base = os.path.join(self.scratch, "base")
        if os.path.exists(base):
            os.unlink(base)
        if kind.format == "raw":
            with open(self.path, "wb") as file:
                file.truncate(self.size)
            return
        options = [f"cluster_size={kind.cluster}", *filter(None, [kind.options])]
        if kind.data_file:
            options.append("data_file=data")  # QEMU looks for it where it is itself
        if kind.base or kind.filled:
            first = self._first_contents(rng, most=1 * MIB if kind.filled else 8 * MIB)
        if kind.base:
            run("qemu-img", "convert", "-O", kind.base, first, base)
            options += [f"backing_file={base}", f"backing_fmt={kind.base}"]
        if kind.filled:
            compress = ["-c"] if kind.filled == "compressed" else []
            run("qemu-img", "convert", "-O", "qcow2", *compress, "-o", ",".join(options), first, self.path)
        else:
            program = rng.choice(["qemu-img", self.qcow])
            create = [program, "create", "-q", "-f", "qcow2", "-o", ",".join(options), self.path, str(self.size)]
            run(*create, directory=self.directory)
        if kind.snapshot:
            run("qemu-img", "snapshot", "-c", "first", self.path)
        if kind.bitmap:
            run("qemu-img", "bitmap", "--add", "-g", str(GRANULARITY), self.path, BITMAP)
        if rng.random() < 0.3 and not kind.preallocated:
            self._make_sparse()
        if kind.preallocated:
            for piece in self.model.pieces:
                piece.owned = bytearray(b"\1" * piece.count)
        self._base_sum = self._sum(base)

    def _make_sparse(self):
        """As a copy may be: where a table has only zeros there is no room for it in the file yet."""
        run("fallocate", "--dig-holes", self.path)

    def _first_contents(self, rng, most):
        path = os.path.join(self.scratch, "first")
        with open(path, "wb") as file:
            file.truncate(self.size)
            for piece in self.model.pieces:
                if rng.random() < 0.5 and piece.count * SECTOR <= most:
                    most -= piece.count * SECTOR
                    piece.preset(1)
                    file.seek(piece.first * SECTOR)
                    file.write(stamped(piece.first, piece.count, 1))
        return path

    def _sum(self, path):
        if not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def copy_of_files(self, directory):
        """The files as they are, in another place."""
        os.makedirs(directory, exist_ok=True)
        for path in [self.path, *([self.data] if self.kind.data_file else [])]:
            run("cp", "--sparse=always", path, directory)
        return os.path.join(directory, "disk")

    def check(self, path=None, leaks_allowed=None):
        """Nothing is corrupt, and no more leaks than that. Returns how many there are. The refcounts of an image that is
        dirty are counted when it is opened next."""
        path = path or self.path
        directory = os.path.dirname(path)
        if self.kind.format == "raw":
            return 0
        info = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", path, directory=directory).stdout)
        if info["format-specific"]["data"].get("corrupt"):
            raise Complaint("the image is marked as corrupt")
        if info["dirty-flag"] and leaks_allowed is None:
            return 0
        statuses = (0, 3) if leaks_allowed is None or leaks_allowed > 0 else (0,)
        check = ["qemu-img", "check", "--output=json", "-f", "qcow2", path]
        theirs = json.loads(run(*check, expect=statuses, directory=directory).stdout)
        run(self.qcow, "check", path, expect=statuses)
        leaks = theirs.get("leaks", 0)
        if leaks_allowed is not None and leaks > leaks_allowed:
            raise Complaint(f"{leaks} clusters leak, {leaks_allowed} did when a server had been killed")
        return leaks

    def verify_others(self, opened):
        """What nobody may have changed; `opened` gives a client of QEMU's server with these arguments."""
        base = os.path.join(self.scratch, "base")
        if self.kind.base and self._sum(base) != self._base_sum:
            raise Complaint("the backing file has changed")
        if not self.kind.snapshot:
            return
        with opened("--load-snapshot", "first") as client:
            for piece in self.model.pieces:
                data = client.pread(piece.count * SECTOR, piece.first * SECTOR)
                if data != stamped(piece.first, piece.count, piece.initial[0]):
                    raise Complaint(f"the snapshot has changed in the {piece.count} sectors from {piece.first} on")

    def verify_bitmap(self, opened):
        """Whether it is there and true: all that has changed is in it, and nothing near which nobody tried to change
        anything. One that is marked as not to be trusted may be anything. Returns which of the two it is."""
        info = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", self.path).stdout)
        (bitmap,) = info["format-specific"]["data"]["bitmaps"]
        if "in-use" in bitmap["flags"]:
            return "marked"
        context = f"qemu:dirty-bitmap:{BITMAP}"
        per_bit = GRANULARITY // SECTOR
        pieces = self.model.pieces
        tried = {(piece.first + i) // per_bit for piece in pieces for i in range(piece.count) if piece.changed[i]}
        with opened("--bitmap", BITMAP, context=context) as client:
            for piece in pieces:
                first = piece.first // per_bit
                end = min(self.size, -(-(piece.first + piece.count) // per_bit) * GRANULARITY)
                dirty = client.bits(context, first * GRANULARITY, end, GRANULARITY)
                for i in range(piece.count):
                    if piece.live[i] != {piece.initial[i]} and not dirty[(piece.first + i) // per_bit - first]:
                        raise Complaint(f"the bitmap does not know that sector {piece.first + i} has changed")
                for bit, is_dirty in enumerate(dirty):
                    if is_dirty and first + bit not in tried:
                        raise Complaint(f"the bitmap claims that something at {(first + bit) * GRANULARITY} has changed")
        return "true"
