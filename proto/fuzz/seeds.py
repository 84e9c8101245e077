#!/usr/bin/env python3
"""Writes the seed inputs: one valid input per target, and the heads of the recorded streams."""

import gzip
import pathlib
import struct

HERE = pathlib.Path(__file__).parent
DEVICE = b"\x04\0\0\0\x05\x05timer\0\0\0\0\0\0\0\x02\x7e\0\0\0\x05\0"
DESCRIPTION = b'{"page_size":4096,"devices":[{"name":"timer","instance_id":0,"version":2,"fields":[{"size":0}]}]}'
FOOTER = b"\x7e\0\0\0\x02"
END = struct.pack(">Q", 0x10) + FOOTER


def counted(text):
    return bytes([len(text)]) + text


def word(offset, flags):
    return struct.pack(">Q", offset | flags)


def memory():
    named = word(0x3000, 8) + counted(b"pc.ram") + b"\x05" * 4096 + word(0x4000, 0x22) + b"\0"
    return named + word(0x1000, 2) + counted(b"pc.bios") + b"\0" + word(0, 0x28) + b"\x06" * 4096


def seeds():
    table = word(272 * 4096, 4)
    table += counted(b"pc.ram") + word(256 * 4096, 0) + counted(b"pc.bios") + word(16 * 4096, 0)
    head = b"QEVM\0\0\0\x03\x07\0\0\0\x06pc-7.2\x08\0\x08\0\0\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04" + table + END
    tail = DEVICE + b"\x06" + struct.pack(">I", len(DESCRIPTION)) + DESCRIPTION
    last = b"\x03\0\0\0\x02" + memory() + END
    yield "precopy", "valid", head + b"\x02\0\0\0\x02" + memory() + END + b"\x08\0\x0b\0\0" + last + tail
    device = struct.pack(">IQ", 4, len(DEVICE)) + DEVICE
    yield "checkpoint", "valid", 2 * (b"\0\0\0\x01\0\0\0\x03\x08\0\x0b\0\0" + last + b"\0" + device)
    raw = struct.pack("<QHHI", 3, 0, 1, 4096) + b"\x07" * 4096
    yield "frame", "valid", struct.pack("<QHHI", 15, 1, 0, 0) + raw
    # Page 3 as LZ4 (zeros behind a literal), page 4 unchanged, page 5 as a difference; then a batch of page 6.
    lz4 = b"\x1f\0\1\0" + b"\xff" * 15 + b"\xe7" + b"\x50" + b"\0" * 5
    difference = b"\x10\x03new"
    coded = struct.pack("<QHHI", 3, 0, 4, len(lz4)) + lz4 + struct.pack("<QHHI", 4, 0, 2, 0)
    coded += struct.pack("<QHHI", 5, 0, 3, len(difference)) + difference
    record = struct.pack("<QHHI", 6, 0, 0, 0)
    block = b"\xf0\x01" + record
    yield "frame", "coded", coded
    yield "frame", "batch", struct.pack("<QHHI", len(record), 0, 5, len(block)) + block
    edits = b"\0\x04head" + b"\x80\x01\x21" + b"\x08" * 33 + b"\x40\x80\x02" + b"\x09" * 256
    yield "xbzrle", "valid", b"\x07" + edits
    yield "xbzrle", "whole", b"\x07\0\x80\x20" + bytes(range(256)) * 16
    yield "xbzrle", "outside", b"\x07\xff\x1f\x02\1\1"
    yield "round_trip", "valid", b"\0\0\x03\x05\0\0\x04\0\x01\0\x01\x06\x01\0\0\x07device"
    for recording in sorted((HERE / "../testdata/streams").glob("*.stream.gz")):
        yield "precopy", recording.name.split(".stream")[0], gzip.decompress(recording.read_bytes())[:2048]


for target, name, content in seeds():
    folder = HERE / "seeds" / target
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath(name).write_bytes(content)
