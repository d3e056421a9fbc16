"""How much of the last room on a file system a disk can use: nothing may be refused without need."""
import os

import nbd

from base import KIB, MIB, Complaint, run
from servers import Server

CLUSTER = 64 * KIB
SLACK = 6  # of tables
TRIMMED = 16


class LastRoom:
    def __init__(self, space, rng, *, qcow, server, scratch):
        self.space = space
        self.rng = rng
        self.qcow = qcow
        self.program = server
        self.scratch = scratch
        self.written = 0
        self.path = os.path.join(space.directory, "disk")
        space.empty()
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", self.path, "1G")

    def run(self):
        self.space.set_room(self.rng.randint(2 * MIB, 5 * MIB))
        room = (self.space.free() - self.space.HELD_BACK) // CLUSTER
        server = Server(self.program, self.path, "qcow2", self.scratch, self.space)
        try:
            client = server.connect()
            used = self._write_until_refused(client.handle)
            if used < room - SLACK:
                raise Complaint(f"of room for {room} clusters {used} were used")
            client.handle.trim(TRIMMED * CLUSTER, 0)
            client.handle.flush()
            used = self._write_until_refused(client.handle)
            if used < TRIMMED - SLACK - self.space.HELD_BACK // CLUSTER:
                raise Complaint(f"of room for {TRIMMED} clusters that were trimmed {used} were used")
            client.handle.flush()
            client.close()
            server.stop()
        except (nbd.Error, Complaint) as error:
            raise Complaint(f"{error}\nThe server says: {server.said()}") from error
        finally:
            server.kill()
        run("qemu-img", "check", "-q", self.path)
        run(self.qcow, "check", self.path)
        return {"clusters written in the last room of a file system": self.written}

    def _write_until_refused(self, handle):
        used = 0
        while True:
            try:
                handle.pwrite(bytes([1 + self.written % 255]) * CLUSTER, self.written * CLUSTER)
            except nbd.Error as error:
                if error.errno != "ENOSPC":
                    raise
                return used
            used += 1
            self.written += 1
