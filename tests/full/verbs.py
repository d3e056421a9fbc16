"""Every verb that changes or makes an image meets a full file system: it changes nothing, or is done when there is room."""
import dataclasses
import functools
import json
import os
import shutil
import struct
import subprocess

from base import KIB, MIB, Complaint, run
from commands import attempt
from images import KINDS

SIZE = 3 * MIB
SECRETS = ("--object", "secret,id=old,data=o", "--object", "secret,id=new,data=n")


@dataclasses.dataclass
class Verb:
    arguments: str  # {disk} and such are files
    image: str = "whole"
    sees: str = "disk"  # what the guest sees then: the disk or a snapshot as it was, "files" in it, or "trimmed"
    loses: str = ""  # a snapshot that is there no more
    done: str = ""  # what must be true then


VERBS = [
    Verb("snapshot -c new {disk}"),
    Verb("snapshot -a first {disk}", sees="first"),
    Verb("snapshot -d first {disk}", loses="first"),
    Verb("snapshot --rename first other {disk}", loses="first"),
    Verb("bitmap --add -g 512 {disk} new"),
    Verb("bitmap --remove {disk} changes"),
    Verb("bitmap --clear {disk} changes"),
    Verb("bitmap --disable {disk} changes"),
    Verb("bitmap --enable {disk} still"),
    Verb("bitmap --merge changes {disk} still"),
    Verb("amend -o refcount_bits=64 {disk}"),
    Verb("amend -o lazy_refcounts=on {disk}"),
    Verb("amend -o size=64M {disk}"),
    Verb("amend -o compat=0.10 {disk}", image="plain"),
    Verb("amend -o compat=1.1 {disk}", image="version 2"),
    Verb("amend --key {key} {new} -o encrypt.state=active,encrypt.new-secret=new,encrypt.iter-time=10 {disk}", image="luks"),
    Verb("commit {disk}", image="overlay", done="committed"),
    Verb("commit -d {disk}", image="overlay", done="committed"),
    Verb("rebase -b {none} {disk}", image="overlay"),
    Verb("rebase -b {other} -F raw {disk}", image="overlay"),
    Verb("rebase -c -b {other} -F raw {disk}", image="overlay"),
    Verb("check -r leaks {disk}", image="leaks"),
    Verb("check -r all {disk}", image="no refcounts"),
    Verb("compact {disk}"),
    Verb("compact --zeroes {disk}"),
    Verb("compact --compress {disk}"),
    Verb("discard {disk} 0 1M", sees="trimmed"),
    Verb("put {disk} {file} /new", image="ext4", sees="files"),
    Verb("mkdir {disk} /new", image="ext4", sees="files"),
    Verb("rm {disk} /gone", image="ext4", sees="files"),
    Verb("put {disk} {file} /new", image="fat", sees="files"),
    Verb("mkdir {disk} /new", image="fat", sees="files"),
    Verb("rm {disk} /gone", image="fat", sees="files"),
    Verb("create -q -f qcow2 -b {disk} -F qcow2 {target}", done="made"),
    Verb("convert -O qcow2 --bitmaps {disk} {target}", done="made"),
    Verb("build -q --fs ext4 --size 2M -O qcow2 -o {target} {tree}", done="built"),
]


class Verbs:
    """Some of them. Images that are alike are made once, in `scratch`."""

    def __init__(self, space, kind, rng, *, verbs, qcow, server, scratch):
        del server  # there is none
        self.space = space
        self.kind = KINDS[kind]
        self.rng = rng
        self.verbs = verbs
        self.qcow = qcow
        self.scratch = scratch
        self.refused = 0
        self.disk, self.base, self.target = (os.path.join(space.directory, name) for name in ("disk", "base", "target"))
        self.tree = os.path.join(scratch, "tree")
        os.mkdir(self.tree)
        for name, length in ("old", 100 * KIB), ("gone", 500 * KIB):
            self._put(os.path.join(self.tree, name), length)
        self.file = os.path.join(scratch, "file")
        self._put(self.file, 300 * KIB)
        self.key = os.path.join(scratch, "key")
        with open(self.key, "w") as file:
            file.write("o")
        self.other = os.path.join(scratch, "other")
        self._put(self.other, 2 * MIB)

    def run(self):
        for verb in self.verbs:
            try:
                self._try(verb)
            except Complaint as wrong:
                raise Complaint(f"{verb.arguments} on {verb.image}: {wrong}") from wrong
        return {"verbs done when there was room": len(self.verbs), "verbs that met a full file system": self.refused}

    def _try(self, verb):
        self.space.empty()
        for name in os.listdir(self._image(verb.image)):
            shutil.copyfile(os.path.join(self._image(verb.image), name), os.path.join(self.space.directory, name))
        self.before = {name: self._read(verb, name) for name in ("disk", *self._list(verb, "snapshots"))}
        places = {name: getattr(self, name) for name in ("disk", "target", "other", "file", "key", "tree")}
        arguments = [word.format(**places, new=f"--object={SECRETS[3]}", none="") for word in verb.arguments.split()]
        for room in self.rng.choice([0, 4 * KIB]), self.rng.choice([16 * KIB, 60 * KIB, 250 * KIB]), None:
            self.space.set_room(room)
            refusal = attempt(self.space, [self.qcow, *arguments], has_room=room is None)
            self.space.set_room(None)
            self._verify(verb, refusal is None)
            if refusal is None:
                return
            self.refused += 1
            if verb.image == "ext4":
                self._clean_ext4(verb)
            if not any(path in refusal for path in (self.disk, self.base, self.target)):
                raise Complaint(f"it does not say which file there is no room for: {refusal}")

    # What must be true.

    def _verify(self, verb, is_done):
        left = set(os.listdir(self.space.directory)) - set(os.listdir(self._image(verb.image)))
        if left != ({"target"} if is_done and verb.done in ("made", "built") else set()):
            raise Complaint(f"it leaves {', '.join(sorted(left)) or 'nothing'}")
        if is_done or verb.image not in ("leaks", "no refcounts"):
            run("qemu-img", "check", "-q", *self._opened(verb))
            run(self.qcow, "check", self.disk)
        if any("in-use" in bitmap["flags"] for bitmap in self._list(verb, "bitmaps").values()):
            raise Complaint("a bitmap is marked as in use")
        if verb.sees == "files":
            self._verify_files(verb, is_done)
        else:
            self._verify_contents(verb, is_done)
        if is_done and verb.done:
            getattr(self, f"_verify_{verb.done}")()

    def _verify_contents(self, verb, is_done):
        expected = dict(self.before)
        if is_done:
            trimmed = bytes(MIB) + expected["disk"][MIB:]
            expected["disk"] = trimmed if verb.sees == "trimmed" else expected[verb.sees]
            expected.pop(verb.loses, None)
        for name, contents in expected.items():
            if self._read(verb, name) != contents:
                raise Complaint(f"{name} has other contents")

    def _verify_files(self, verb, is_done):
        raw = self._raw(verb, "disk")
        check, show = {
            "ext4": (["e2fsck", "-f", "-n", raw], lambda name: ["debugfs", "-R", f"cat /{name}", raw]),
            "fat": (["fsck.fat", "-n", raw], lambda name: ["mtype", "-i", raw, f"::{name}"]),
        }[verb.image]
        run(*check)
        kept = {"old": os.path.join(self.tree, "old")}
        if is_done and verb.arguments.startswith("put"):
            kept["new"] = self.file
        for name, path in kept.items():
            shown = subprocess.run(show(name), capture_output=True, timeout=60).stdout
            with open(path, "rb") as file:
                if shown != file.read():
                    raise Complaint(f"/{name} has other contents")

    def _clean_ext4(self, verb):
        """libext2fs writes in an order of its own. Where it was refused, the file system says that e2fsck is to look at it."""
        raw = self._raw(verb, "disk")
        run("e2fsck", "-f", "-p", raw, expect=(0, 1))
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raw, self.disk)

    def _verify_committed(self):
        run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", self.disk, self.base)

    def _verify_made(self):
        run("qemu-img", "check", "-q", self.target)
        run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", self.disk, self.target)

    def _verify_built(self):
        run("qemu-img", "check", "-q", self.target)
        run(self.qcow, "get", self.target, "/old", os.path.join(self.scratch, "got"))

    # Looking at an image.

    def _opened(self, verb):
        """Arguments of qemu-img."""
        if verb.image != "luks":
            return ["-f", "qcow2", self.disk]
        return [*SECRETS, "--image-opts", f"driver=qcow2,file.filename={self.disk},encrypt.key-secret=old"]

    def _raw(self, verb, name):
        """The disk, or a snapshot of it, as a raw file."""
        raw = os.path.join(self.scratch, "read")
        snapshot = [] if name == "disk" else ["-l", f"snapshot.name={name}"]
        run("qemu-img", "convert", "-O", "raw", *snapshot, *self._opened(verb), raw)
        return raw

    def _read(self, verb, name):
        with open(self._raw(verb, name), "rb") as file:
            return file.read(SIZE)

    def _list(self, verb, what):
        """Snapshots or bitmaps, by their names."""
        info = json.loads(run("qemu-img", "info", "--output=json", *self._opened(verb)).stdout)
        listed = info.get(what, []) if what == "snapshots" else info["format-specific"]["data"].get(what, [])
        return {one["name"]: one for one in listed}

    # Making images.

    def _put(self, path, length):
        with open(path, "wb") as file:
            file.write(self.rng.randbytes(length))

    @functools.cache
    def _image(self, name):
        """A directory with the files of such an image."""
        directory = os.path.join(self.scratch, name)
        os.mkdir(directory)
        disk = os.path.join(directory, "disk")
        make = {"ext4": self._make_ext4, "fat": self._make_fat, "luks": self._make_luks}.get(name, self._make)
        make(name, disk)
        return directory

    def _options(self, *more):
        return ["-f", "qcow2", "-o", ",".join(filter(None, [f"cluster_size={self.kind.cluster}", self.kind.options, *more]))]

    def _make(self, name, disk):
        more = []
        options = self._options()
        if name == "version 2":
            options = ["-f", "qcow2", "-o", f"cluster_size={self.kind.cluster},compat=0.10"]
        if name == "plain":
            options = ["-f", "qcow2", "-o", f"cluster_size={self.kind.cluster}"]
        if name == "overlay":
            base = os.path.join(os.path.dirname(disk), "base")
            run("qemu-img", "create", "-q", *self._options(), base, str(SIZE // 2))
            run("qemu-io", "-c", f"write -q -P 7 0 {SIZE // 2}", base)
            more = ["-b", "base", "-F", "qcow2"]
        run("qemu-img", "create", "-q", *options, *more, disk, str(SIZE))
        if name == "overlay":
            run("qemu-io", "-c", "write -q -P 8 200k 100k", "-c", "write -q -P 9 2M 700k", disk)
        else:
            self._fill(disk)
        if name in ("version 2", "plain"):
            return
        if name != "overlay":
            run("qemu-img", "snapshot", "-c", "first", disk)
        for bitmap in "changes", "still":
            run("qemu-img", "bitmap", "--add", "-g", "4096", disk, bitmap)
        run("qemu-img", "bitmap", "--disable", disk, "still")
        run("qemu-io", "-d", "unmap", "-c", "write -q -P 77 300k 200k", "-c", "discard -q 1M 300k", disk)
        if name in ("leaks", "no refcounts"):
            self._damage(disk, name)

    def _fill(self, disk):
        plain = ["write -q -P 2 64k 300k", "write -q -P 3 500k 1300k", "write -q -P 0 900k 100k"]
        compressed = ["write -q -c -P 4 0 64k", "write -q -c -P 5 384k 64k"]
        run("qemu-io", *(word for write in plain + compressed for word in ("-c", write)), disk)

    def _damage(self, disk, name):
        with open(disk, "r+b") as file:
            header = file.read(104)
            (table,) = struct.unpack_from(">Q", header, 48)
            if name == "no refcounts":
                file.seek(table)
                file.write(bytes(8))
                return
            file.seek(table)
            blocks = [block for block in struct.unpack(">64Q", file.read(512)) if block]
            free = []
            for index, block in enumerate(blocks):
                file.seek(block)
                counts = file.read(self.kind.cluster)
                inside = min(len(counts), 2 * (os.path.getsize(disk) // self.kind.cluster) - index * self.kind.cluster)
                free += [block + at for at in range(0, inside, 2) if counts[at : at + 2] == bytes(2)]
            if not free:
                raise Complaint("there is no free cluster that could leak")
            for at in free[:3]:
                file.seek(at)
                file.write(b"\0\1")

    def _make_luks(self, _, disk):
        key = ["encrypt.format=luks", "encrypt.key-secret=old", "encrypt.iter-time=10"]
        run("qemu-img", "create", "-q", *SECRETS, *self._options(*key), disk, str(SIZE))
        opened = f"driver=qcow2,file.filename={disk},encrypt.key-secret=old"
        run("qemu-io", *SECRETS, "--image-opts", "-c", "write -q -P 9 100k 1M", opened)

    def _make_ext4(self, _, disk):
        raw = os.path.join(self.scratch, "raw")
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", self.tree, raw, f"{SIZE // KIB}k")
        run("qemu-img", "convert", "-f", "raw", "-O", *self._options()[1:], raw, disk)

    def _make_fat(self, _, disk):
        raw = os.path.join(self.scratch, "raw")
        with open(raw, "wb") as file:
            file.truncate(SIZE)
        run("mkfs.fat", raw)
        run("mcopy", "-i", raw, *(os.path.join(self.tree, name) for name in ("old", "gone")), "::")
        run("qemu-img", "convert", "-f", "raw", "-O", *self._options()[1:], raw, disk)
