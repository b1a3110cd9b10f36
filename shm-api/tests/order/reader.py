"""Reads records until a file appears, and prints each read: location, begin and end in nanoseconds, the record in hex."""
import os
import random
import struct
import sys
import time

clients, path, seed, over, windows, places, window = sys.argv[1:8]
sys.path.insert(0, clients)
from cmbfs_client import Client, CmbfsError, File

WITHIN = [0, 64, 4032, 4096, 9984, 16320]
windows, places, window = int(windows), int(places), int(window)
pick = random.Random(int(seed))
with Client(path) as client:
    # Raw memory by its name: opcode 44, of no length.
    body, fds = client._call(44, struct.pack("<Q", 0), b"scratch")
    raw = File(client, *struct.unpack("<5Q", body), fds[0], client._cmb)
    objects = [client.open("/auto"), client.open("/host"), raw, client.peer_memory("gpu"), client.pmr()]
    maps = [held.map(0, windows * window) for held in objects]
    print("ready", flush=True)
    notes, turn = [], 0
    while turn % 16 or not os.path.exists(over):
        turn += 1
        at = pick.randrange(len(maps) * windows * places)
        held, rest = divmod(at, windows * places)
        offset = rest // places * window + WITHIN[rest % places]
        begin = time.monotonic_ns()
        try:
            record = maps[held].read(offset, 64)
        except CmbfsError as error:
            # The drive was reset or has failed, or there is no place now.
            if error.code not in (25, 27, 32):
                raise
            continue
        notes.append((at, begin, time.monotonic_ns(), record))
        if turn % 8 == 0:
            time.sleep(0.0002)
    for at, begin, end, record in notes:
        print(at, begin, end, record.hex())
print("over", flush=True)
