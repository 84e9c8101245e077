#!/usr/bin/env python3
"""Records what QEMU sends to its COLO peer: the precopy and a few checkpoints of a small guest.

The recorder knows nothing of the stream's format. It takes turns with QEMU and learns where a part ends from
QEMU itself: a part is complete when QEMU waits for an answer and its socket is empty. So what a reader says about
the recording can be checked against it. While QEMU waits in a checkpoint, the guest is stopped, and its memory is
dumped through QMP for the same purpose.

Writes DIR/NAME.stream.gz, all bytes, and DIR/NAME.json, what is known about them.
"""

import argparse
import gzip
import json
import pathlib
import select
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib

READY, REPLY, RECEIVED, LOADED = 0, 2, 5, 6
# The message SHUT of the return path: type 1, four bytes, no error.
SHUT = struct.pack(">HHI", 1, 4, 0)
QUIET_SECONDS = 0.5
STEP_SECONDS = 60
# Below it lie the VGA window and the firmware's shadow, where an address is not an offset in pc.ram.
DUMP_FROM = 1 << 20


class Qmp:
    """A QMP connection; events are of no interest."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(STEP_SECONDS)
        retry(lambda: self.socket.connect(str(path)), (FileNotFoundError, ConnectionRefusedError))
        self.lines = self.socket.makefile("rw")
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        reply = self.ask(command, **arguments)
        if "error" in reply:
            sys.exit(f"{command}: {reply['error']['desc']}")
        return reply["return"]

    def ask(self, command, **arguments):
        """The reply as it is, whether it is one or an error."""
        json.dump({"execute": command, "arguments": arguments}, self.lines)
        self.lines.flush()
        while True:
            reply = json.loads(self.lines.readline())
            if "error" in reply or "return" in reply:
                return reply


def retry(action, errors):
    """Repeats `action` until it raises none of `errors`."""
    end = time.monotonic() + STEP_SECONDS
    while True:
        try:
            return action()
        except errors:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def wait_for(condition):
    """Waits until `condition()` holds."""
    end = time.monotonic() + STEP_SECONDS
    while not condition():
        if time.monotonic() > end:
            sys.exit("QEMU does not go on")
        time.sleep(0.01)


def set_capabilities(qmp):
    """Switches checkpoints on; says whether this QEMU wants a return path for them."""
    names = ["x-colo"]
    refused = qmp.ask("migrate-set-capabilities", capabilities=[{"capability": "x-colo", "state": True}])
    if "return-path" in refused.get("error", {}).get("desc", ""):
        names.append("return-path")
    qmp("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])
    return "return-path" in names


def read_until_quiet(peer, is_due):
    """All bytes until `is_due()` holds and nothing has come for a while."""
    received = bytearray()
    end = time.monotonic() + STEP_SECONDS
    while True:
        readable, _, _ = select.select([peer], [], [], QUIET_SECONDS)
        if readable:
            piece = peer.recv(1 << 20)
            if not piece:
                sys.exit("QEMU has closed the connection")
            received += piece
        elif received and is_due():
            return bytes(received)
        if time.monotonic() > end:
            sys.exit(f"no end after {len(received)} bytes")


def send(peer, *messages):
    peer.sendall(b"".join(struct.pack(">I", m) for m in messages))


def build_guest(folder):
    """Assembles guest.S into a multiboot kernel."""
    source = pathlib.Path(__file__).with_name("guest.S")
    object_file, kernel = folder / "guest.o", folder / "guest.elf"
    subprocess.run(["as", "--32", source, "-o", object_file], check=True)
    link = "ld -m elf_i386 -e _start --section-start=.multiboot=0x100000 -Ttext=0x100020".split()
    subprocess.run([*link, object_file, "-o", kernel], check=True)
    return kernel


def dump_crc(qmp, folder, memory_bytes):
    """CRC-32 of the guest's memory from DUMP_FROM on, as QEMU itself dumps it."""
    dump = folder / "memory"
    qmp("pmemsave", val=DUMP_FROM, size=memory_bytes - DUMP_FROM, filename=str(dump))
    return zlib.crc32(dump.read_bytes())


def record(qmp, folder, arguments):
    """Gives the parts of the stream and what is known of each."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "migration"))
    listener.listen(1)
    listener.settimeout(STEP_SECONDS)
    memory_bytes = arguments.memory << 20
    return_path = set_capabilities(qmp)
    qmp("migrate-set-parameters", **{"x-checkpoint-delay": 20, "max-bandwidth": 1 << 40})
    qmp("migrate", uri=f"unix:{folder / 'migration'}")
    peer, _ = listener.accept()
    # With a return path, QEMU waits in `device` until that is shut.
    waits = "device" if return_path else "colo"
    parts = [read_until_quiet(peer, lambda: qmp("query-migrate").get("status") == waits)]
    facts = [{"bytes": len(parts[0]), "crc": dump_crc(qmp, folder, memory_bytes)}]
    if return_path:
        peer.sendall(SHUT)
        wait_for(lambda: qmp("query-migrate").get("status") == "colo")
    send(peer, READY)
    for _ in range(arguments.checkpoints):
        request = read_until_quiet(peer, lambda: True)
        send(peer, REPLY)
        part = request + read_until_quiet(peer, lambda: qmp("query-status")["status"] == "colo")
        parts.append(part)
        facts.append({"bytes": len(part), "crc": dump_crc(qmp, folder, memory_bytes)})
        send(peer, RECEIVED, LOADED)
    return parts, facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qemu", default="qemu-system-x86_64", help="command that runs QEMU")
    parser.add_argument("--machine", required=True, help="pc or q35")
    parser.add_argument("--device", action="append", default=[], help="QEMU device, may be repeated")
    parser.add_argument("--memory", type=int, default=16, help="MiB of guest memory")
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--boot-seconds", type=float, default=8, help="time for the firmware")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("streams"))
    parser.add_argument("name")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        guest = ["-machine", arguments.machine, "-accel", "kvm", "-cpu", "qemu64", "-m", str(arguments.memory)]
        guest += ["-nodefaults", "-display", "none", "-kernel", str(build_guest(folder))]
        guest += [word for device in arguments.device for word in ("-device", device)]
        control = ["-qmp", f"unix:{folder / 'qmp'},server=on,wait=off"]
        qemu = subprocess.Popen([*shlex.split(arguments.qemu), *guest, *control], stdin=subprocess.DEVNULL)
        try:
            qmp = Qmp(folder / "qmp")
            time.sleep(arguments.boot_seconds)
            version = qmp("query-version")["qemu"]
            parts, facts = record(qmp, folder, arguments)
        finally:
            qemu.kill()
            qemu.wait()

    known = {
        "qemu": "{major}.{minor}.{micro}".format(**version),
        "machine": arguments.machine,
        "memory_bytes": arguments.memory << 20,
        "dump_from": DUMP_FROM,
        "parts": facts,
    }
    stream = gzip.compress(b"".join(parts), compresslevel=9, mtime=0)
    arguments.out.joinpath(arguments.name + ".stream.gz").write_bytes(stream)
    arguments.out.joinpath(arguments.name + ".json").write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
