#!/usr/bin/env python3
"""Lists and extracts the files of a cmbfs image; written from docs/on-disk-format.md alone, standard library only.

  read_image.py IMAGE              lists: kind, mode, uid, gid, links, size, mtime, placement, path
  read_image.py IMAGE --all DIR    extracts everything into DIR
  read_image.py IMAGE PATH         writes one file to standard output
"""
import os
import struct
import sys

BLOCK = 4096
FILE, DIRECTORY = 1, 2

TABLE = []
for n in range(256):
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    TABLE.append(n)


def crc32c(*parts):
    crc = 0xFFFFFFFF
    for part in parts:
        for byte in part:
            crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


class Damaged(Exception):
    pass


class Inode:
    def __init__(self, kind, mode, uid, gid, links, size, mtime, parent, placement=0):
        self.kind, self.mode, self.uid, self.gid = kind, mode, uid, gid
        self.links, self.size, self.mtime, self.parent = links, size, mtime, parent
        self.placement = placement
        self.entries = {}  # name -> ino
        self.blocks = {}   # file block -> (disk block, written)


class Fields:
    """Takes fields from the front of some bytes."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        if self.at + count > len(self.data):
            raise Damaged("an item is cut short")
        self.at += count
        return self.data[self.at - count:self.at]

    def ints(self, layout):
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def name(self):
        return bytes(self.take(self.take(1)[0]))

    def items(self, count=None):
        while self.at < len(self.data) if count is None else count > 0:
            kind, placement, _, length = self.ints("HBBI")
            yield kind, placement, Fields(self.take(length))
            count = None if count is None else count - 1


class Image:
    def __init__(self, path):
        self.file = open(path, "rb")
        copies = [c for c in (self.superblock(0), self.superblock(16)) if c]
        if not copies:
            raise Damaged("no readable superblock")
        self.sb = max(copies, key=lambda sb: sb["generation"])
        if self.sb["incompat"]:
            raise Damaged(f"unknown incompatible features {self.sb['incompat']:#x}")
        self.inodes = {}
        self.load_checkpoint()
        self.replay()

    def read(self, at, count):
        self.file.seek(at)
        return self.file.read(count)

    def superblock(self, block):
        raw = self.read(block * BLOCK, BLOCK)
        if raw[:8] != b"cmbfs\0SB":
            return None
        version, crc = struct.unpack_from("<II", raw, 8)
        uuid = raw[16:32]
        if crc32c(uuid, raw[:12], bytes(4), raw[16:]) != crc:
            return None
        if version != 1:
            raise Damaged(f"version {version}")
        names = ("compat ro_compat incompat generation block_size log_unit blocks log_start log_blocks log_head "
                 "sequence epoch prev_crc chunk_blocks chunk_block next_ino inodes").split()
        values = struct.unpack_from("<4Q2I6QIIQQQ", raw, 32)
        return dict(zip(names, values), uuid=uuid)

    def load_checkpoint(self):
        stream, index = b"", 0
        block, blocks = self.sb["chunk_block"], self.sb["chunk_blocks"]
        while blocks:
            raw = self.read(block * BLOCK, blocks * BLOCK)
            magic, crc, generation, number, length, block, blocks = struct.unpack_from("<4sIQIIQQ", raw)
            if (magic != b"CFSC" or generation != self.sb["generation"] or number != index
                    or crc32c(self.sb["uuid"], raw[8:64 + length]) != crc):
                raise Damaged(f"chunk {index}")
            stream += raw[64:64 + length]
            index += 1
        for kind, _, body in Fields(stream).items():
            if kind == 16:
                ino, size, _, mtime, _, parent, uid, gid, links, mode, what, placement = body.ints("6Q3IHBB")
                self.inodes[ino] = Inode(what, mode, uid, gid, links, size, mtime, parent, placement)
            elif kind == 17:
                ino, count = body.ints("QQ")
                for _ in range(count):
                    self.map(ino, *body.ints("QQII"))
            elif kind == 18:
                ino, count = body.ints("QQ")
                for _ in range(count):
                    (child,) = body.ints("Q")
                    self.inodes[ino].entries[body.name()] = child
            else:
                raise Damaged(f"item {kind} in the checkpoint")

    def record(self, log, at):
        """The record at `at`, if its CRC is good: (header fields, CRC, body, length with padding)."""
        if log[at:at + 4] != b"CFSR":
            return None
        ring = log[at:] + log[:at] if at + 64 > len(log) else log[at:at + 64]
        length = 64 + struct.unpack_from("<I", ring, 36)[0]
        if length > min(len(log) // 4, 256 << 10):
            return None
        raw = (log[at:at + length] + log)[:length]
        if crc32c(self.sb["uuid"], raw[8:]) != struct.unpack_from("<I", raw, 4)[0]:
            return None
        sequence, durable, epoch, prev_crc, _, guards, items = struct.unpack_from("<QQQ4I", raw, 8)
        unit = self.sb["log_unit"]
        header = dict(sequence=sequence, durable=durable, epoch=epoch, prev_crc=prev_crc, guards=guards, items=items)
        return header, struct.unpack_from("<I", raw, 4)[0], raw[64:], -(-length // unit) * unit

    def replay(self):
        sb = self.sb
        log = self.read(sb["log_start"] * BLOCK, sb["log_blocks"] * BLOCK)
        known = 0
        for at in range(0, len(log), sb["log_unit"]):
            found = self.record(log, at)
            if found:
                known = max(known, found[0]["durable"])
        at, sequence, prev_crc, epoch = sb["log_head"], sb["sequence"], sb["prev_crc"], sb["epoch"]
        while True:
            found = self.record(log, at)
            if found:
                header, crc, body, length = found
                body = Fields(body)
                guards = [body.ints("QII") for _ in range(header["guards"])]
            counts = (found and header["sequence"] == sequence and header["prev_crc"] == prev_crc
                      and header["epoch"] >= epoch)
            if counts and sequence > known:
                counts = all(crc32c(sb["uuid"], self.read(block * BLOCK, BLOCK)) == crc_of_block
                             for block, crc_of_block, _ in guards)
            if not counts:
                if sequence <= known:
                    raise Damaged(f"log record {sequence}")
                return
            for kind, placement, item in body.items(header["items"]):
                self.apply(kind, placement, item)
            at, sequence, prev_crc, epoch = (at + length) % len(log), sequence + 1, crc, header["epoch"]

    def map(self, ino, first, disk, count, state):
        for i in range(count):
            self.inodes[ino].blocks[first + i] = (disk + i, state == 1)

    def unlink(self, parent, name, time, keep):
        directory = self.inodes[parent]
        ino = directory.entries.pop(name)
        directory.mtime = time
        inode = self.inodes[ino]
        if inode.kind == DIRECTORY:
            directory.links -= 1
            inode.links = 0
        else:
            inode.links -= 1
        if inode.links == 0 and not keep:
            del self.inodes[ino]

    def apply(self, kind, placement, item):
        inodes = self.inodes
        if kind == 1:
            parent, ino, time, uid, gid, mode, what = item.ints("QQQIIHB")
            inodes[parent].entries[item.name()] = ino
            inodes[parent].mtime = time
            inodes[parent].links += what == DIRECTORY
            inodes[ino] = Inode(what, mode, uid, gid, 2 if what == DIRECTORY else 1, 0, time, parent)
        elif kind == 2:
            parent, ino, time = item.ints("QQQ")
            inodes[parent].entries[item.name()] = ino
            inodes[parent].mtime = time
            inodes[ino].links += 1
        elif kind == 3:
            parent, time, keep = item.ints("QQB")
            self.unlink(parent, item.name(), time, keep)
        elif kind == 4:
            source, target, time, keep = item.ints("QQQB")
            old, new = item.name(), item.name()
            if new in inodes[target].entries:
                self.unlink(target, new, time, keep)
            ino = inodes[source].entries.pop(old)
            inodes[target].entries[new] = ino
            inodes[source].mtime = inodes[target].mtime = time
            if inodes[ino].kind == DIRECTORY:
                inodes[source].links -= 1
                inodes[target].links += 1
                inodes[ino].parent = target
        elif kind == 5:
            del inodes[item.ints("Q")[0]]
        elif kind == 6:
            ino, _, mtime, _, uid, gid, mode = item.ints("4QIIH")
            inode = inodes[ino]
            inode.mtime, inode.uid, inode.gid, inode.mode, inode.placement = mtime, uid, gid, mode, placement
        elif kind == 7:
            ino, size, time, extents, ranges = item.ints("QQQII")
            extents = [item.ints("QQII") for _ in range(extents)]
            for _ in range(ranges):
                first, count = item.ints("QI")
                for block in range(first, first + count):
                    inodes[ino].blocks[block] = (inodes[ino].blocks[block][0], True)
            for extent in extents:
                self.map(ino, *extent)
            inodes[ino].size, inodes[ino].mtime = size, time
        elif kind == 8:
            ino, size, time = item.ints("QQQ")
            inode = inodes[ino]
            inode.blocks = {b: d for b, d in inode.blocks.items() if b < -(-size // BLOCK)}
            inode.size, inode.mtime = size, time
        elif kind == 9:
            ino, first, count, time = item.ints("QQQQ")
            inode = inodes[ino]
            inode.blocks = {b: d for b, d in inode.blocks.items() if not first <= b < first + count}
            inode.mtime = time
        else:
            raise Damaged(f"item {kind} in the log")

    def contents(self, inode):
        """The bytes of a file, block by block."""
        for block in range(-(-inode.size // BLOCK)):
            disk, written = inode.blocks.get(block, (0, False))
            data = self.read(disk * BLOCK, BLOCK) if written else bytes(BLOCK)
            yield data[:inode.size - block * BLOCK]

    def walk(self, ino=1, path=b""):
        """Every (path, inode) below a directory, in the order of names."""
        for name, child in sorted(self.inodes[ino].entries.items()):
            yield path + b"/" + name, self.inodes[child]
            if self.inodes[child].kind == DIRECTORY:
                yield from self.walk(child, path + b"/" + name)


def main(args):
    image = Image(args[0])
    if len(args) == 1:
        for path, i in [(b"/", image.inodes[1]), *image.walk()]:
            kind = "d" if i.kind == DIRECTORY else "-"
            print(f"{kind} {i.mode:04o} {i.uid} {i.gid} {i.links} {i.size} {i.mtime} {i.placement}", os.fsdecode(path))
    elif args[1] == "--all":
        for path, inode in image.walk():
            target = os.fsencode(args[2]) + path
            if inode.kind == DIRECTORY:
                os.makedirs(target)
                continue
            with open(target, "wb") as out:
                out.writelines(image.contents(inode))
    else:
        wanted = b"/" + os.fsencode(args[1]).strip(b"/")
        for path, inode in image.walk():
            if path == wanted and inode.kind == FILE:
                sys.stdout.buffer.writelines(image.contents(inode))
                return
        sys.exit(f"{args[1]}: no such file")


if __name__ == "__main__":
    try:
        if len(sys.argv) < 2:
            sys.exit(__doc__)
        main(sys.argv[1:])
    except Damaged as e:
        sys.exit(f"{sys.argv[1]}: damaged or not readable here: {e}")
