"""One round: an image, sessions of a server with clients at work, and room that comes and goes meanwhile."""
import collections
import os
import random
import shutil
import threading
import time

from base import KIB, MIB, SECTOR, Complaint
from images import KINDS, TestImage
from model import stamped
from servers import PATIENCE, Gone, Server, reader_of

import nbd

# What can be told wrongly, and what must be said of it: writes and flushes that succeed but were never sent, overwriting in
# place that is refused, a cluster that is counted and nobody refers to.
LIES = {"write": "holds|in place", "flush": "holds|exit status 2", "refuse": "in place", "leak": "leak|exit status 3"}
ROOMS = (0, 0, 4 * KIB, 20 * KIB, 64 * KIB, 200 * KIB, 700 * KIB, 2 * MIB)


class Request:
    def __init__(self, verb, piece=None, index=0, count=0):
        self.verb = verb
        self.piece = piece
        self.index = index
        self.count = count

    def __str__(self):
        where = f" of {self.count} sectors at {self.piece.first + self.index}" if self.piece else ""
        return f"{self.verb}{where}"


class Connection(threading.Thread):
    """A guest with pieces of the disk that are its own, and several requests in flight."""

    def __init__(self, session, pieces, seed):
        super().__init__(daemon=True)
        self.session = session
        self.trial = session.trial
        self.model = self.trial.image.model
        self.pieces = pieces
        self.rng = random.Random(seed)
        self.refused = []
        self.client = session.server.connect()

    def run(self):
        try:
            while not self.session.over and self.session.wrong is None:
                with self.trial.space.gate.passing():
                    self._burst()
        except Gone:
            if not self.session.killed:
                self.session.complain("the server has gone away")
        except Complaint as wrong:
            self.session.complain(str(wrong))
        except Exception as error:
            self.session.complain(f"{type(error).__name__}: {error}")
            raise

    def _burst(self):
        if self.refused and self.trial.space.room_since() is not None:
            requests = self.refused
            self.refused = []
            self.trial.counts["refused requests tried again"] += len(requests)
        else:
            pieces = self.rng.sample(self.pieces, min(len(self.pieces), self.rng.randint(1, 6)))
            requests = [self._choose(piece) for piece in pieces]
            if self.rng.random() < self.session.flushes:
                requests.insert(self.rng.randint(0, len(requests)), Request("flush"))
        for request in requests:
            self._send(request)
        self.client.await_all()
        for request in requests:
            self._settle(request, self.client.outcome(request.cookie) if request.cookie else None)
        self.session.answered += len(requests)

    def _choose(self, piece):
        index = self.rng.randrange(piece.count)
        longest = piece.count - index
        count = longest if self.rng.random() < 0.3 else min(longest, int(2 ** self.rng.uniform(0, 9)))
        dice = self.rng.random()
        if dice < 0.15:
            return Request("trim", piece, index, count)
        if dice < 0.25:
            return Request("zero", piece, index, count)
        if dice < 0.32:
            return Request("read", piece, index, count)
        owned = piece.owned.find(1, index)
        if dice < 0.45 and owned >= 0:  # in place
            end = piece.owned.find(0, owned)
            return Request("write", piece, owned, min(count, (end if end >= 0 else piece.count) - owned))
        return Request("write", piece, index, count)

    def _send(self, request):
        handle, piece = self.client.handle, request.piece
        request.room = self.trial.space.room_since()
        request.durable = self.rng.random() < 0.05
        request.in_place = False
        flags = nbd.CMD_FLAG_FUA if request.durable else 0
        request.cookie = None
        try:
            if request.verb == "flush":
                request.begun = self.model.begin_flush()
                if self.trial.lie != "flush":
                    request.cookie = handle.aio_flush()
                return
            length, offset = request.count * SECTOR, (piece.first + request.index) * SECTOR
            if request.verb == "read":
                request.buffer = nbd.Buffer(length)
                request.cookie = handle.aio_pread(request.buffer, offset)
                return
            value = self.model.next_value() if request.verb == "write" else 0
            request.in_place = request.verb == "write" and piece.owned.find(0, request.index, request.index + request.count) < 0
            self.model.begin(piece, request.index, request.count, value, request.verb == "write")
            if request.verb == "trim":
                request.cookie = handle.aio_trim(length, offset, flags=flags)
            elif request.verb == "zero":
                if self.rng.random() < 0.5:
                    flags |= nbd.CMD_FLAG_NO_HOLE
                request.cookie = handle.aio_zero(length, offset, flags=flags)
            elif self.trial.lie != "write" or self.rng.random() < 0.98:
                data = bytearray(stamped(piece.first + request.index, request.count, value))
                request.buffer = nbd.Buffer.from_bytearray(data)
                request.cookie = handle.aio_pwrite(request.buffer, offset, flags=flags)
        except nbd.Error as error:
            raise Gone from error

    def _settle(self, request, error):
        piece = request.piece
        counts = self.trial.counts
        if self.trial.lie == "refuse" and request.in_place and request.room is None:
            error = "ENOSPC"
        if error is None:
            counts["requests answered"] += 1
            if request.verb == "flush":
                self.model.end_flush(request.begun)
                counts["flushes"] += 1
            elif request.verb == "read":
                self.model.saw(piece, request.index, bytes(request.buffer.to_bytearray()))
            else:
                self.model.done(piece, request.verb == "write", request.durable, request.verb == "trim")
            return
        counts["requests refused for want of room"] += 1
        if error != "ENOSPC":
            raise Complaint(f"a {request} failed with {error}")
        if request.verb in ("flush", "read"):
            raise Complaint(f"a {request} failed for want of room")
        if request.in_place:
            raise Complaint(f"a {request} failed for want of room, in place")
        if self.trial.space.room_all_along(request.room):
            raise Complaint(f"a {request} failed although there was room")
        self.model.failed(piece)
        if len(self.refused) < 4 and all(piece is not other.piece for other in self.refused):
            self.refused.append(Request(request.verb, piece, request.index, request.count))


class Session:
    """The life of a server."""

    def __init__(self, trial, rng):
        self.trial = trial
        self.rng = rng
        self.over = False
        self.killed = False
        self.wrong = None
        self.answered = 0
        self.flushes = rng.choice([0, 0.1, 0.3])
        cache = rng.choice(["writeback"] * 4 + ["none", "writethrough"])
        kind = trial.image.kind
        self.server = Server(trial.server, trial.image.path, kind.format, trial.scratch, trial.space, cache)
        self.connections = []

    def complain(self, what):
        if self.wrong is None:
            said = self.server.said()
            self.wrong = what + (f"\nThe server says: {said}" if said else "")

    def run(self, kill):
        rng, image = self.rng, self.trial.image
        try:
            count = rng.randint(1, 4)
            shares = [[] for _ in range(count)]
            for piece in image.model.pieces:
                rng.choice(shares).append(piece)
            self.connections = [Connection(self, share, rng.random()) for share in shares if share]
            for connection in self.connections:
                connection.start()
            for _ in range(rng.randint(1, 3)):
                self._weather()
            if rng.random() < 0.5:
                self._look_into_the_file()
            if kill:
                self.killed = True
                self.server.kill()
            self._end(kill)
        finally:
            self.over = True
            self.server.kill()
            for connection in self.connections:
                if connection.is_alive():
                    connection.join(PATIENCE)

    def _wait_for(self, requests):
        """Until so many more are answered. Time passes, too, where all are refused."""
        goal = self.answered + requests
        progress, since = self.answered, time.monotonic()
        while self.answered < goal and self.wrong is None:
            time.sleep(0.001)
            if self.answered != progress:
                progress, since = self.answered, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                self.complain("the server hangs")
        if self.wrong is not None:
            raise Complaint(self.wrong)

    def _weather(self):
        """Room goes and comes."""
        rng, space = self.rng, self.trial.space
        if rng.random() < 0.3:  # with every gust
            for _ in range(rng.randint(5, 20)):
                space.set_room(rng.choice(ROOMS))
                self._wait_for(rng.randint(1, 8))
        else:
            space.set_room(rng.choice(ROOMS))
            self._wait_for(rng.randint(20, 150))
        self.trial.counts["times that room was taken away"] += 1
        if rng.random() < 0.8:
            space.set_room(None)
            self._wait_for(rng.randint(10, 80))

    def _look_into_the_file(self):
        """What a flush covers is in the file, whatever the server has in memory."""
        trial = self.trial
        directory = os.path.join(trial.scratch, "copy")
        with trial.space.gate.shut():
            if self.wrong is not None:
                raise Complaint(self.wrong)
            self._flush()
            copy = trial.image.copy_of_files(directory)
            trial.image.check(copy)
            trial.verify_contents(copy)
        shutil.rmtree(directory)
        trial.counts["looks into the file after a flush"] += 1

    def _flush(self):
        begun = self.trial.image.model.begin_flush()
        try:
            client = self.server.connect()
            try:
                if self.trial.lie != "flush":
                    client.handle.flush()
            finally:
                client.close()
        except nbd.Error as error:
            raise Complaint(f"a flush failed: {error}\nThe server says: {self.server.said()}") from error
        self.trial.image.model.end_flush(begun)

    def _end(self, kill):
        """Clients leave, and the server is told to stop."""
        self.over = True
        for connection in self.connections:
            connection.join(2 * PATIENCE)
        if self.wrong is not None:
            raise Complaint(self.wrong)
        image = self.trial.image
        if kill:
            image.model.killed()
            self.trial.counts["servers killed"] += 1
            return
        if self.rng.random() < 0.5:
            self._flush()
        for connection in self.connections:
            connection.client.close()
        try:
            self.server.stop()
        except Complaint as wrong:
            self.complain(str(wrong))
            raise Complaint(self.wrong) from None
        image.model.end_flush(image.model.begin_flush())
        self.trial.counts["servers stopped"] += 1


class Trial:
    def __init__(self, space, kind, rng, *, qcow, server, scratch, lie=None):
        self.space = space
        self.server = server
        self.scratch = scratch
        self.lie = lie
        self.counts = collections.Counter()
        self.rng = rng
        space.empty()
        self.image = TestImage(kind, space, scratch, qcow, rng)

    def run(self):
        sessions = self.rng.randint(1, 3)
        for number in range(sessions):
            last = number == sessions - 1
            kill = not last and self.rng.random() < 0.6
            if self.rng.random() < 0.7:
                self.space.set_room(None)
            # Else it begins with as little as the last one ended with.
            Session(self, self.rng).run(kill)
            if self.lie == "leak" and not kill:
                self._leak()
            leaks = self.image.check(leaks_allowed=None if kill else self.image.leaks)
            self.image.leaks = leaks
            self.verify_contents(self.image.path)
        self.space.set_room(None)
        self.image.verify_others(self._reader(self.image.path))
        if self.image.kind.bitmap:
            what = self.image.verify_bitmap(self._reader(self.image.path))
            if what != "true" and self.counts["servers killed"] == 0:
                raise Complaint("the bitmap is marked as not to be trusted, although all servers were stopped in order")
            self.counts[f"bitmaps that are {what} in the end"] += 1
        return self.counts

    def _reader(self, path):
        return reader_of(path, self.image.kind.format, self.scratch)

    def verify_contents(self, path):
        with self._reader(path)() as client:
            for piece in self.image.model.pieces:
                self.image.model.saw(piece, 0, client.pread(piece.count * SECTOR, piece.first * SECTOR))

    def _leak(self):
        """One more cluster, which is counted, and nothing refers to. (Where the first block has 16 bits for it.)"""
        width = 2
        size = self.image.kind.cluster
        number = -(-os.stat(self.image.path).st_size // size)
        with open(self.image.path, "r+b") as file:
            header = file.read(512)
            if header[:4] != b"QFI\xfb" or header[7] < 3 or 1 << header[99] != 8 * width or number >= size // width:
                return
            file.seek(int.from_bytes(header[48:56], "big"))
            file.seek(int.from_bytes(file.read(8), "big") + number * width)
            file.write(b"\0\1")
            file.truncate((number + 1) * size)
