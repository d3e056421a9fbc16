"""Servers of an image, and clients of them."""
import contextlib
import itertools
import os
import subprocess
import time

import nbd

from base import Complaint, bound_to_parent

PATIENCE = 30  # seconds after which somebody hangs
_numbers = itertools.count(1)


class Gone(Exception):
    """There is no server any more."""


class Client:
    def __init__(self, socket, context=None):
        self.handle = nbd.NBD()
        if context is not None:
            self.handle.add_meta_context(context)
        try:
            self.handle.connect_unix(socket)
        except nbd.Error as error:
            raise Gone(error.string) from error

    def close(self):
        with contextlib.suppress(nbd.Error):
            self.handle.shutdown()

    def pread(self, length, offset):
        return bytes(self.handle.pread(length, offset))

    def await_all(self):
        """Until everything in flight is answered."""
        deadline = time.monotonic() + PATIENCE
        while self.handle.aio_in_flight() > 0:
            if self.handle.aio_is_dead() or self.handle.aio_is_closed():
                raise Gone
            if time.monotonic() > deadline:
                raise Complaint("the server hangs: a request has no answer")
            try:
                self.handle.poll(1000)
            except nbd.Error as error:
                raise Gone from error

    def outcome(self, cookie):
        """None for success, or the name of an error."""
        try:
            self.handle.aio_command_completed(cookie)
        except nbd.Error as error:
            if error.errno in ("ENOTCONN", "ESHUTDOWN"):
                raise Gone from error
            return error.errno
        return None

    def bits(self, context, begin, end, granularity):
        """A bitmap's bits for this stretch."""
        result = []
        while begin < end:
            extents = []

            def take(name, _offset, entries, _error, extents=extents):
                if name == context:
                    extents += entries

            self.handle.block_status(end - begin, begin, take)
            for length, flags in zip(extents[::2], extents[1::2]):
                length = min(length, end - begin)
                result += [flags & 1 == 1] * -(-length // granularity)
                begin += length
        return result


class Server:
    """`qcow serve`, or QEMU's server where `program` is that."""

    def __init__(self, program, image, image_format, scratch, space=None, cache="writeback", arguments=()):
        socket = os.path.join(scratch, f"socket{next(_numbers)}")
        pid_file = socket + ".pid"
        if os.path.basename(program) == "qemu-nbd":
            command = [program, "--persistent", "--shared=8", f"--cache={cache}", "--discard=unmap", "-f", image_format]
        else:
            command = [program, "serve", "--persistent", f"--cache={cache}", "-f", image_format]
        command += [*arguments, "--socket", socket, "--pid-file", pid_file, image]
        self.socket = socket
        self._log = socket + ".log"

        def prepare():
            bound_to_parent()
            if space is not None:
                space.prepare()

        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                command, cwd=os.path.dirname(image), stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=prepare
            )
        if space is not None:
            space.adopt(self.process)
        deadline = time.monotonic() + PATIENCE
        while not os.path.exists(pid_file):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise Complaint(f"does not start: {' '.join(command)}\n{self.said()}")
            time.sleep(0.002)
        os.unlink(pid_file)

    def said(self):
        with open(self._log) as log:
            return "\n".join(log.read().splitlines()[-3:])

    def connect(self, context=None):
        return Client(self.socket, context)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Complaint("the server does not end") from None
        if status != 0:
            raise Complaint(f"the server ends with status {status}")


def reader_of(image, image_format, scratch):
    """QEMU's view of an image: gives a client, for as long as it is needed, to a server with some arguments."""

    @contextlib.contextmanager
    def opened(*arguments, context=None):
        server = Server("qemu-nbd", image, image_format, scratch, arguments=("--read-only", *arguments))
        client = server.connect(context)
        try:
            yield client
        finally:
            client.close()
            server.kill()

    return opened
