#!/usr/bin/env python3
"""A client of a cmbfs server, with nothing but the standard library.

    from cmbfs_client import Client
    with Client("/run/cmbfs.sock") as client:
        print(client.list("/"))
        with client.open("/hello") as file:
            print(file.read())            # through shared-memory windows
            window = file.map(0, 4096)    # and again and again, without a system call:
            print(window.read(0, 16))

Reads follow the seqlock protocol of docs/protocol.md. They rely on the memory order of x86-64; on weaker machines use the C
header or the Rust client. Run as a program: cmbfs_client.py SOCKET ls|cat|stat PATH.
"""
import array
import mmap
import os
import socket
import struct
import sys

MAGIC, VERSION, REPLY, MAX_MESSAGE = 0x46424D43, 1, 0x8000, 32768
HELLO, INFO, OPEN, CLOSE, STAT, LIST, MAP, UNMAP, FAULT, MEMORY = 1, 2, 16, 17, 18, 20, 32, 33, 35, 45
MEMORY_PMR, MEMORY_SHARED = 1, 3
ORDINARY = (1 << 64) - 1
LAYOUT_MAP, LAYOUT_COMMIT, LAYOUT_RELEASE, LAYOUT_RECALLS = 64, 66, 67, 68
OPEN_READ, OPEN_WRITE, MAP_HOST = 1, 2, 2
HOLE, UNWRITTEN, WRITTEN = 0, 1, 2
HEADER = struct.Struct("<IHHQIIII")
MAX_WINDOWS = 1024


class CmbfsError(OSError):
    """The server refused. `code` is its error code, `errno` the closest errno."""

    def __init__(self, code, errno, text):
        super().__init__(errno, text)
        self.code = code


class ServerGone(ConnectionError):
    """The server died or closed the connection."""


class Client:
    """A connection to a server. One thread at a time.

    A server that is silent for `timeout` seconds is given up with a TimeoutError. One that works on something for longer is waited for, since it
    answers meanwhile.
    """

    def __init__(self, path, timeout=30.0):
        self._requests = 0
        self._timeout = timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A connection counts as sending. Half the time for an answer: then the server is asked whether it lives.
        for option, seconds in ((socket.SO_SNDTIMEO, timeout), (socket.SO_RCVTIMEO, timeout / 2)):
            whole, part = divmod(max(seconds, 0.001), 1)
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(whole), int(part * 1e6)))
        try:
            self._socket.connect(path)
        except BlockingIOError:
            raise TimeoutError(f"the server on {path} takes no clients: it is stopped or hung") from None
        body, fds = self._call(HELLO, struct.pack("<HHI", VERSION, VERSION, 0))
        (control_len, _slots, ring_len, cmb_len, cmb_offset, self.uuid, _version, _, self.cmb_reason,
         self.uid, self.number) = struct.unpack_from("<5Q16sHHIII", body)
        self.cmb_text = body[72:].decode()
        self._control = mmap.mmap(fds[0], control_len, mmap.MAP_SHARED, mmap.PROT_READ)
        # Loads of whole aligned words, which is what the protocol is made of.
        self._words = memoryview(self._control).cast("Q")
        self._halves = memoryview(self._control).cast("I")
        self._ring = memoryview(mmap.mmap(fds[2], ring_len, mmap.MAP_SHARED, mmap.PROT_READ)).cast("I")
        self._cmb = None
        if self.cmb_reason == 0:
            self._cmb = mmap.mmap(fds[3], cmb_len, mmap.MAP_SHARED, mmap.PROT_READ, offset=cmb_offset)
        for fd in fds:
            os.close(fd)

    def _call(self, op, body=b"", tail=b""):
        self._requests += 1
        self._send(op, self._requests, body + tail)
        while True:
            data, control = self._receive()
            fds = array.array("i")
            for level, kind, rights in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
            if not data:
                raise ServerGone("the server closed the connection")
            magic, version, opcode, request, length, status, count, _ = HEADER.unpack_from(data)
            if magic != MAGIC or version != VERSION or not opcode & REPLY or length != len(data):
                raise ServerGone("the server's answer breaks the protocol")
            if request not in (self._requests, 0):
                continue
            if status:
                (errno, _) = struct.unpack_from("<II", data, HEADER.size)
                raise CmbfsError(status, errno, data[HEADER.size + 8:].decode(errors="replace"))
            if count != len(fds):
                raise ServerGone("descriptors are missing")
            return data[HEADER.size:], list(fds)

    def _send(self, op, request, payload=b""):
        header = HEADER.pack(MAGIC, VERSION, op, request, HEADER.size + len(payload), 0, 0, 0)
        try:
            self._socket.sendall(header + payload)
        except BlockingIOError:
            raise TimeoutError(f"the server has read nothing for {self._timeout:g} s") from None

    def _receive(self):
        """The next message and what came with it."""
        room = socket.CMSG_SPACE(8 * array.array("i").itemsize)
        for is_last in (False, True):
            try:
                return self._socket.recvmsg(MAX_MESSAGE, room, socket.MSG_CMSG_CLOEXEC)[:2]
            except BlockingIOError:
                if not is_last:
                    # By a number of its own: the answer is for nobody.
                    self._send(INFO, 1 << 63)
        raise TimeoutError(f"the server has not answered for {self._timeout:g} s: it is stopped or hung")

    @property
    def server_alive(self):
        """Whether the server lives, by its robust word: no system call."""
        word = self._halves[72 // 4]
        return not word & 0x40000000 and bool(word & 0x3FFFFFFF)

    def stat(self, path):
        """Attributes of a file or directory, as a dict."""
        body, _ = self._call(STAT, tail=path.encode())
        names = "ino size allocated mtime_ns ctime_ns kind mode uid gid links placement placed_by".split()
        return dict(zip(names, struct.unpack("<5Q5I2H", body)))

    def list(self, path):
        """Names and sizes in a directory."""
        entries, more = [], True
        while more:
            after = entries[-1][0].encode() if entries else b""
            where = path.encode()
            body, _ = self._call(LIST, struct.pack("<II", len(where), len(after)), where + after)
            count, more = struct.unpack_from("<II", body)
            at = 8
            for _ in range(count):
                _ino, size, _kind, _mode, _uid, length = struct.unpack_from("<QQIIII", body, at)
                entries.append((body[at + 32:at + 32 + length].decode(), size))
                at += 32 + length
        return entries

    @property
    def recall_count(self):
        """How often something was asked back of this client's layouts: no system call."""
        return self._ring[448 // 4]

    def recalls(self):
        """What is asked back: (lease, device generation, offset, length, deadline in ns since 1970) each."""
        body, _ = self._call(LAYOUT_RECALLS)
        (count, _more) = struct.unpack_from("<II", body)
        return [struct.unpack_from("<5Q", body, 8 + 40 * n) for n in range(count)]

    def open(self, path, writable=False):
        """Opens a file for reading; `writable`: for writing too, through a layout."""
        flags = OPEN_READ | (OPEN_WRITE if writable else 0)
        body, fds = self._call(OPEN, struct.pack("<II", flags, 0), path.encode())
        return File(self, *struct.unpack("<5Q", body), fds[0], self._cmb)

    def pmr(self):
        """The drive's Persistent Memory Region, for reading."""
        return self._memory(MEMORY_PMR, "")

    def peer_memory(self, name):
        """The memory of a peer that was exported under this name, for reading."""
        return self._memory(MEMORY_SHARED, name)

    def _memory(self, what, name):
        body, fds = self._call(MEMORY, struct.pack("<IIQ", what, 0, 0), name.encode())
        length, start, canary, reason, _ = struct.unpack_from("<3Q2I", body, 40)
        direct = None
        # Memory on a device wants accesses that Python does not make: the host cache serves instead.
        if reason == 0 and canary == ORDINARY:
            direct = mmap.mmap(fds[1], length, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
        for fd in fds[1:]:
            os.close(fd)
        return File(self, *struct.unpack_from("<5Q", body), fds[0], direct)

    def close(self):
        """Closes the connection."""
        self._socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class File:
    """An open file."""

    def __init__(self, client, handle, ino, size, _cache_len, window_size, cache, direct):
        self._client, self._handle, self._cache, self._direct = client, handle, cache, direct
        self.ino, self.size, self.window_size = ino, size, window_size

    def map(self, offset, length):
        """Maps a range."""
        return Mapped(self, offset, length)

    def map_blocks(self, offset, length, write=False):
        """The device's blocks behind a range, under a lease (for the server's own user)."""
        return Layout(self, offset, length, write)

    def read(self):
        """The whole file."""
        return self.map(0, self.size).read(0, self.size) if self.size else b""

    def close(self):
        """Closes it, and what was mapped through it."""
        self._client._call(CLOSE, struct.pack("<Q", self._handle))
        os.close(self._cache)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Layout:
    """Block numbers and the right to use them. `extents` are (file offset, lba, blocks of 4 KiB, state) each."""

    def __init__(self, file, offset, length, write):
        self._client = file._client
        request = struct.pack("<QQQII", file._handle, offset, length, 2 if write else 1, 0)
        body, _ = self._client._call(LAYOUT_MAP, request)
        (self.lease, self.device_generation, self.ino, self.size, self.uuid, self.block_size, _, count,
         _) = struct.unpack_from("<4Q16s4I", body)
        self.extents = [struct.unpack_from("<QQQI", body, 64 + 32 * n) for n in range(count)]

    def commit(self, size=0):
        """What was written to the blocks becomes the file's contents, durably, at least `size` bytes long."""
        records = b"".join(struct.pack("<QQQII", *extent, 0) for extent in self.extents)
        head = struct.pack("<QQQII", self.lease, self.device_generation, size, len(self.extents), 0)
        body, _ = self._client._call(LAYOUT_COMMIT, head + records)
        return struct.unpack("<Q", body)[0]

    def release(self, offset=0, length=0):
        """Gives a part back, or all of it."""
        self._client._call(LAYOUT_RELEASE, struct.pack("<4Q", self.lease, self.device_generation, offset, length))


class Mapped:
    """A mapped range of a file. `counts` says how many window reads each place served."""

    def __init__(self, file, offset, length):
        self._file, self._client, self._offset, self.length = file, file._client, offset, length
        self._windows, self._maps = [], []
        self.counts = {"cmb": 0, "host": 0, "faults": 0}
        size = file.window_size
        first = at = offset - offset % size
        while at < offset + length:
            want = min(offset + length - at, size * MAX_WINDOWS)
            body, _ = self._client._call(MAP, struct.pack("<QQQII", file._handle, at, want, 0, 0))
            number, _first, _size, _window, count, _ = struct.unpack_from("<4QII", body)
            self._maps.append(number)
            self._windows += [struct.unpack_from("<II", body, 40 + 16 * n) for n in range(count)]
            at += count * size
        self._first, self._host = first, {}

    def read(self, offset, length):
        """Copies bytes out."""
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError("outside the mapping")
        at, out = self._offset - self._first + offset, []
        while length:
            index, inside = divmod(at, self._file.window_size)
            part = min(length, self._file.window_size - inside)
            out.append(self._read_window(index, inside, part))
            at, length = at + part, length - part
        return b"".join(out)

    def _read_window(self, index, inside, length):
        slot, incarnation = self._windows[index]
        client, base = self._client, 4096 + slot * 32
        words, halves = client._words, client._halves
        while True:
            if halves[(base + 16) // 4] != incarnation:
                raise ServerGone("the window is not mapped any more")
            device, generation, place = words[64 // 8], words[base // 8], words[base // 8 + 1]
            home, at = place & 3, ((place >> 2) & ((1 << 46) - 1)) << 12
            if home not in (1, 2) or place >> 48 != device & 0xFFFF:
                self._fault(index, 0)
                continue
            if home == 1 and self._file._direct is None:
                self._fault(index, MAP_HOST)
                continue
            memory = (self._file._direct, at) if home == 1 else (self._map_host(at), 0)
            data = memory[0][memory[1] + inside:memory[1] + inside + length]
            if words[base // 8] == generation and words[64 // 8] == device:
                if not client.server_alive:
                    raise ServerGone("the server died")
                self.counts["cmb" if home == 1 else "host"] += 1
                return data

    def _map_host(self, at):
        if at not in self._host:
            size = self._file.window_size
            self._host[at] = mmap.mmap(self._file._cache, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=at)
        return self._host[at]

    def _fault(self, index, flags):
        if not self._client.server_alive:
            raise ServerGone("the server died")
        self.counts["faults"] += 1
        offset = self._first + index * self._file.window_size
        try:
            self._client._call(FAULT, struct.pack("<QQII", self._file._handle, offset, flags, 0))
        except CmbfsError as error:
            if error.code not in (32, 36, 38):  # not resident, leased, moving: ask again
                raise

    def close(self):
        """Gives the mapping back."""
        for number in self._maps:
            self._client._call(UNMAP, struct.pack("<Q", number))
        self._maps = []


def main():
    """The command line."""
    if len(sys.argv) != 4 or sys.argv[2] not in ("ls", "cat", "stat"):
        sys.exit(f"usage: {sys.argv[0]} SOCKET ls|cat|stat PATH")
    with Client(sys.argv[1]) as client:
        if sys.argv[2] == "ls":
            for name, size in client.list(sys.argv[3]):
                print(size, name)
        elif sys.argv[2] == "stat":
            print(client.stat(sys.argv[3]))
        else:
            with client.open(sys.argv[3]) as file:
                sys.stdout.buffer.write(file.read())


if __name__ == "__main__":
    main()
