"""What root in a sandbox tries. Runs inside the sandbox: `python3 -c <this file> <attack> <arguments>`.

Prints what came back. Ends with 0 when the attempt got an answer, 1 with the reason when not. Whether it got out is not decided
here: the tests' internet counts what arrived.
"""
import errno
import socket
import struct
import subprocess
import sys
import threading
import time

WAIT = 1.5


def tcp(host, port, payload="knock"):
    """One connection, one line each way."""
    with socket.create_connection((host, int(port)), WAIT) as s:
        s.sendall(payload.encode())
        return s.recv(512).decode("latin1")


def mapped(host, port):
    """The same through an IPv6 socket with an IPv4 address inside."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as s:
        s.settimeout(WAIT)
        s.connect(("::ffff:" + host, int(port)))
        s.sendall(b"knock")
        return s.recv(512).decode("latin1")


def udp(host, port, size="5"):
    """One datagram and its echo; a large size goes out in fragments."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.sendto(b"x" * int(size), (host, int(port)))
        return str(len(s.recvfrom(65536)[0]))


def fastopen(host, port):
    """Data in the SYN itself (RFC 7413): nothing may leave before the verdict."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.settimeout(WAIT)
        s.sendto(b"knock", 0x20000000, (host, int(port)))
        return s.recv(512).decode("latin1")


def marked(host, port, mark):
    """A firewall mark on our own socket, as the sidecar's packets may carry one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.setsockopt(socket.SOL_SOCKET, 36, int(mark, 0))
        s.sendto(b"knock", (host, int(port)))
        return s.recvfrom(512)[0].decode()


def question(name, kind=1):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!6H", 0x5A11, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", int(kind), 1)


def verdict(answer):
    code = answer[3] & 15
    if code != 0:
        raise OSError("rcode %d" % code)
    return "%d answers" % struct.unpack("!H", answer[6:8])[0]


def ask(name, server, port="53", proto="udp", kind="1"):
    """A question to a server of our own choice."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if proto == "udp" else socket.SOCK_STREAM) as s:
        s.settimeout(WAIT)
        s.connect((server, int(port)))
        body = question(name, kind)
        s.sendall(body if proto == "udp" else struct.pack("!H", len(body)) + body)
        answer = s.recv(4096)
        if proto == "tcp" and len(answer) == 2:
            answer += s.recv(4096)
        return verdict(answer if proto == "udp" else answer[2:])


def bound(table, address=None):
    """Local ports in use in this network namespace, which is also the sidecar's."""
    ports = set()
    for family in ("", "6"):
        try:
            lines = open("/proc/net/%s%s" % (table, family)).read().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            ip, port = line.split()[1].split(":")
            if address is None or ip == address:
                ports.add(int(port, 16))
    return sorted(ports)


def embedded(name):
    """Docker's own DNS server also listens on a port that is not 53, and forwards from another process's sockets."""
    answers = []
    for proto in ("udp", "tcp"):
        for port in bound(proto, "0B00007F"):
            try:
                answers.append(ask(name, "127.0.0.11", port, proto))
            except OSError as error:
                answers.append(str(error))
    if not any("answers" in answer for answer in answers):
        raise OSError("; ".join(answers) or "no such port here")
    return "; ".join(answers)


def borrow(name, server):
    """From every source port somebody holds here, in case the sidecar's packets are known by their port."""
    outcomes = []
    for port in bound("udp") + list(range(1, 64)):
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                s.bind(("0.0.0.0", port))
                s.sendto(question(name), (server, 53))
                s.settimeout(0.05)
                outcomes.append(verdict(s.recv(4096)))
        except OSError as error:
            outcomes.append(errno.errorcode.get(error.errno, str(error)))
    if not any("answers" in outcome for outcome in outcomes):
        raise OSError(" ".join(sorted(set(outcomes))))
    return "answered"


def bind(proto, address, port):
    """Take the place of somebody who listens here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if proto == "udp" else socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        s.bind((address, int(port)))
        if proto == "tcp":
            s.listen()
        return "bound"


def ping(host):
    if subprocess.run(["ping", "-c", "1", "-W", "1", host], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise OSError("no answer")
    return "answered"


def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def datagram(source, host, sport, port, payload=b"knock!"):
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(payload), 1, 0, 64, 17, 0, socket.inet_aton(source), socket.inet_aton(host))
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return head + struct.pack("!HHHH", sport, port, 8 + len(payload), 0) + payload


def own_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("198.51.100.1", 9))
        return s.getsockname()[0]


def raw(host, port):
    """A packet with headers of our own, from a port of our choice."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as s:
        s.sendto(datagram(own_address(), host, 5353, int(port)), (host, 0))
        return "sent"


def frame(host, port):
    """A whole Ethernet frame: it does not pass the output hook at all."""
    interface = [name for _, name in socket.if_nameindex() if name.startswith("eth")][0]
    source = own_address()
    gateway = [line.split()[2] for line in open("/proc/net/route") if line.split()[1] == "00000000"][0]
    router = socket.inet_ntoa(struct.pack("<I", int(gateway, 16)))
    try:
        tcp(router, 1)
    except OSError:
        pass
    hardware = [line.split()[3] for line in open("/proc/net/arp") if line.startswith(router + " ")][0]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind((interface, 0x0800))
        own = s.getsockname()[4]
        s.send(bytes.fromhex(hardware.replace(":", "")) + own + b"\x08\x00" + datagram(source, host, 5353, int(port)))
        return "sent"


def reverse(address, server="127.0.0.11"):
    """The name behind an address."""
    name = ".".join(reversed(address.split("."))) + ".in-addr.arpa"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.connect((server, 53))
        s.send(question(name, 12))
        answer = s.recv(4096)
        verdict(answer)
        name_end, _ = labels_at(answer, len(question(name, 12)))
        return labels_at(answer, name_end + 10)[1]


def labels_at(message, offset):
    """Reads a name (RFC 1035 4.1.4); returns where it ends and its text."""
    parts, end = [], None
    while message[offset]:
        if message[offset] >= 0xC0:
            end = end or offset + 2
            offset = struct.unpack("!H", message[offset : offset + 2])[0] & 0x3FFF
            continue
        parts.append(message[offset + 1 : offset + 1 + message[offset]].decode())
        offset += 1 + message[offset]
    return end or offset + 1, ".".join(parts)


def beacon(*hosts):
    """One datagram to each place every 20 ms, for as long as the container lives."""
    while True:
        for host in hosts:
            try:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                    s.sendto(b"knock", (host, 4444))
            except OSError:
                pass
        time.sleep(0.02)


def storm(allowed, denied, good, bad):
    """Datagrams and connections to both places, questions for names below both suffixes, without a pause, as long as the container lives."""

    def forever(work):
        count = 0
        while True:
            count += 1
            try:
                work(count)
            except OSError:
                pass
            time.sleep(0.005)

    def connect(host):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
            s.settimeout(0.2)
            s.connect((host, 443))

    def resolve(count):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(0.02)
            for name in ("n%d.%s" % (count, good), "n%d.%s" % (count, bad)):
                s.sendto(question(name), ("198.51.100.53", 53))
            s.recv(512)

    for work in (lambda _: connect(allowed), lambda _: connect(denied), resolve):
        threading.Thread(target=forever, args=(work,), daemon=True).start()
    beacon(allowed, denied)


def together(*tries):
    """Several attempts at once, each one argument of words; prints one line of ok or what was wrong for each, in order."""
    outcomes = [""] * len(tries)

    def attempt(index):
        try:
            name, *arguments = tries[index].split(" ")
            globals()[name](*arguments)
            outcomes[index] = "ok"
        except (OSError, IndexError, struct.error) as error:
            outcomes[index] = str(error)

    threads = [threading.Thread(target=attempt, args=(index,)) for index in range(len(tries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "\n".join(outcomes)


try:
    print(globals()[sys.argv[1]](*sys.argv[2:]))
except (OSError, IndexError, struct.error) as error:
    print(error)
    sys.exit(1)
