"""What a guest knows of its disk: every value that each sector may hold."""
import itertools
import struct
import threading

from base import SECTOR, Complaint

ZEROS = bytes(SECTOR)


def stamp(sector, value):
    """A sector that says where it belongs and which write filled it. 0 are zeros."""
    return ZEROS if value == 0 else struct.pack("<QQ", ~sector & (2**64 - 1), value) * (SECTOR // 16)


def stamped(first, count, value):
    return b"".join(stamp(sector, value) for sector in range(first, first + count))


def value_in(sector, data):
    """The value that was read from there, or None if it is none of this sector's."""
    if data == ZEROS:
        return 0
    place, value = struct.unpack_from("<QQ", data)
    return value if data == stamp(sector, value) and place == ~sector & (2**64 - 1) else None


class Piece:
    """Some sectors that one connection has to itself, with at most one request at a time."""

    def __init__(self, first, count):
        self.first = first
        self.count = count
        self.live = [{0} for _ in range(count)]  # what a read may find, by sector
        self.older = [[] for _ in range(count)]  # (when replaced, values) that a server that is killed may leave
        self.changed = bytearray(count)  # whether anything was tried
        self.owned = bytearray(count)  # whether it has clusters of its own that are full of data
        self.initial = [0] * count
        self.in_flight = None

    def preset(self, value):
        self.live = [{value} for _ in range(self.count)]
        self.initial = [value] * self.count


class Model:
    def __init__(self, pieces):
        self.pieces = pieces
        self._lock = threading.Lock()
        self._ticks = itertools.count(1)
        self._values = itertools.count(2)

    def next_value(self):
        return next(self._values)

    def begin_flush(self):
        return next(self._ticks)

    def end_flush(self, begun):
        """It succeeded: what was replaced before it began never comes back."""
        with self._lock:
            for piece in self.pieces:
                for entries in piece.older:
                    if entries:
                        entries[:] = [entry for entry in entries if entry[0] > begun]

    def begin(self, piece, index, count, value, fills):
        """A change; `fills`: with data, which take clusters."""
        piece.in_flight = (index, count, value)
        piece.changed[index : index + count] = b"\1" * count
        if not fills:
            piece.owned[index : index + count] = bytes(count)

    def done(self, piece, fills, durable, weak):
        """It succeeded; `weak`: it may have done nothing."""
        index, count, value = piece.in_flight
        with self._lock:
            now = next(self._ticks)
            for i in range(index, index + count):
                if durable and not weak:
                    piece.older[i].clear()
                else:
                    piece.older[i].append((now, piece.live[i]))
                piece.live[i] = piece.live[i] | {value} if weak else {value}
        if fills:
            piece.owned[index : index + count] = b"\1" * count
        piece.in_flight = None

    def failed(self, piece):
        """It may have been done or not, sector by sector."""
        index, count, value = piece.in_flight
        with self._lock:
            for i in range(index, index + count):
                piece.live[i] = piece.live[i] | {value}
        piece.in_flight = None

    def killed(self):
        """The server is gone, and what was only in its memory."""
        for piece in self.pieces:
            if piece.in_flight is not None:
                self.failed(piece)
            for i, entries in enumerate(piece.older):
                for _, values in entries:
                    piece.live[i] = piece.live[i] | values
                entries.clear()
            piece.owned = bytearray(piece.count)

    def saw(self, piece, index, data):
        """Holds what was read against what may be there. From now on it is what is there."""
        for i in range(len(data) // SECTOR):
            sector = piece.first + index + i
            found = data[i * SECTOR : (i + 1) * SECTOR]
            allowed = piece.live[index + i]
            if len(allowed) == 1:
                (value,) = allowed
                if found == stamp(sector, value):
                    continue
            value = value_in(sector, found)
            if value not in allowed:
                what = "not its own data" if value is None else "zeros" if value == 0 else f"write {value}"
                raise Complaint(f"sector {sector} holds {what}, not one of the writes {sorted(allowed)}")
            piece.live[index + i] = {value}
