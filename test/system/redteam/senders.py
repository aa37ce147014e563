"""More tools of the red team: the many ways to have the kernel send. Put before arsenal.py, whose helpers they use and whose runner calls them.

What an attempt prints is for the reader of a failed test only. One that begins with `not here` met a kernel or an engine without the feature.
"""
import array
import ctypes
import errno
import mmap
import os
import socket
import struct
import time

MORE, ZEROCOPY, FASTOPEN = 0x8000, 0x4000000, 0x20000000
# Of sockets: SO_ZEROCOPY, SO_TXTIME, SO_MAX_PACING_RATE. Of TCP: TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE. Of UDP: UDP_CORK, UDP_ENCAP, UDP_SEGMENT.
SO_ZEROCOPY, SO_TXTIME, SO_PACING = 60, 61, 47
FASTOPEN_CONNECT, FASTOPEN_NO_COOKIE = 30, 34
CORK, ENCAP, SEGMENT = 1, 100, 103


def said(s):
    s.settimeout(WAIT)
    return s.recv(512).decode("latin1")


def datagram_socket():
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


# -- TCP and UDP, sent otherwise -----------------------------------------------------------------------------------------------------

def fast_open(how, host, port):
    """The first packet of a connection carries data (RFC 7413); no cookie of an earlier one is needed."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.settimeout(WAIT)
        s.setsockopt(socket.IPPROTO_TCP, FASTOPEN_NO_COOKIE, 1)
        if how == "connect":
            s.setsockopt(socket.IPPROTO_TCP, FASTOPEN_CONNECT, 1)
            s.connect((host, int(port)))
            s.sendall(b"knock")
        else:
            s.sendto(b"knock", FASTOPEN, (host, int(port)))
        return said(s)


def segmented(host, port):
    """Fifty datagrams as one large one, which the kernel cuts behind the rules (UDP_SEGMENT)."""
    with datagram_socket() as s:
        s.setsockopt(socket.IPPROTO_UDP, SEGMENT, 100)
        return exchange(s, host, port, b"knock" * 1000)


def uncopied(kind, host, port):
    """The kernel sends out of our memory (MSG_ZEROCOPY), or out of a file's (`spliced`)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.connect((host, int(port)))
        if kind == "spliced":
            with tempfile.TemporaryFile() as file:
                file.write(b"knock" * 100)
                file.flush()
                os.sendfile(s.fileno(), file.fileno(), 0, 500)
        else:
            s.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
            s.send(b"knock" * 200, ZEROCOPY)
        return said(s)


def corked(how, first, then, port):
    """Begun for one place and finished for another: the first one's address is written, or (`turned`) the second's on the first one's way."""
    with datagram_socket() as s:
        if how == "more":
            s.sendto(b"kno", MORE, (first, int(port)))
            s.sendto(b"ck", (then, int(port)))
        else:
            # The way to our own address is the loopback's, and leaves us a source that fits every other.
            s.connect((own_address() if first == "own" else first, int(port)))
            s.setsockopt(socket.IPPROTO_UDP, CORK, 1)
            s.send(b"knock")
            s.connect((then, int(port)))
            s.setsockopt(socket.IPPROTO_UDP, CORK, 0)
        return "sent"


def foreign(source, host, port):
    """
    Somebody else's address as source, without a capability. The datagram is begun with an address of ours, named for it alone, so that there is a way;
    then `connect` fails for want of one, but has written the socket's own address (IP_FREEBIND) on what is held back.
    """
    with datagram_socket() as s:
        s.setsockopt(socket.IPPROTO_IP, 15, 1)
        s.bind((source, 0))
        s.sendmsg([b"knock"], [(socket.IPPROTO_IP, 8, struct.pack("=I4s4s", 0, socket.inet_aton(own_address()), bytes(4)))], MORE, (host, int(port)))
        try:
            s.connect((host, int(port)))
        except OSError:
            pass
        s.setsockopt(socket.IPPROTO_UDP, CORK, 1)
        s.setsockopt(socket.IPPROTO_UDP, CORK, 0)
        return "sent"


def turned(how, first, host, port):
    """A socket that spoke to one place, and that the kernel remembers the way to, turned to another."""
    stream = how == "stream"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.connect((first, int(port)))
        s.send(b"knock")
        s.recv(512)
        if stream:
            # AF_UNSPEC: not connected any more.
            ctypes.CDLL(None).connect(s.fileno(), bytes(16), 16)
        if how == "named":
            s.sendto(b"knock", (host, int(port)))
        else:
            s.connect((host, int(port)))
            s.send(b"knock")
        return said(s)


class Memory:
    """Bytes that stay where they are, for those who take pointers."""

    def __init__(self):
        self.kept = []

    def put(self, content):
        self.kept.append(ctypes.create_string_buffer(content, len(content)))
        return ctypes.addressof(self.kept[-1])

    def address(self, host, port):
        return self.put(struct.pack("=H", socket.AF_INET) + struct.pack("!H", int(port)) + socket.inet_aton(host) + bytes(8))

    def header(self, host, port, text=b"knock"):
        """struct msghdr with one part."""
        part = self.put(struct.pack("@PN", self.put(text), len(text)))
        return struct.pack("@PIxxxxPNPNi4x", self.address(host, port), 16, part, 1, 0, 0, 0)


def together(first, host, port):
    """Datagrams for an allowed place and another, in one call (sendmmsg)."""
    memory = Memory()
    both = b"".join(memory.header(place, port) + bytes(8) for place in (first, host))
    with datagram_socket() as s:
        return "%d sent" % ctypes.CDLL(None).sendmmsg(s.fileno(), ctypes.c_void_p(memory.put(both)), 2, 0)


def timed(host, port):
    """With a time to leave at (SO_TXTIME)."""
    with datagram_socket() as s:
        s.setsockopt(socket.SOL_SOCKET, SO_TXTIME, struct.pack("iI", time.CLOCK_MONOTONIC, 0))
        s.sendmsg([b"knock"], [(socket.SOL_SOCKET, SO_TXTIME, struct.pack("@Q", time.monotonic_ns() + 1000000))], 0, (host, int(port)))
        return said(s)


def with_options(what, host, port):
    """Forty bytes of IP options before the ports (RFC 791)."""
    options = {"route": b"\x07\x27\x04" + bytes(37), "time": b"\x44\x28\x05" + bytes(37), "nothing": b"\1" * 40}[what]
    with datagram_socket() as s:
        s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, options)
        return exchange(s, host, port)


def encapsulated(host, port):
    """From a socket for ESP in UDP (RFC 3948)."""
    with datagram_socket() as s:
        s.setsockopt(socket.IPPROTO_UDP, ENCAP, 2)
        return exchange(s, host, port)


def transformed(kind, host, port):
    """An IPv6 socket that becomes an IPv4 one (IPV6_ADDRFORM)."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as s:
        s.settimeout(WAIT)
        s.connect(("::ffff:" + host, int(port)))
        s.setsockopt(socket.IPPROTO_IPV6, 1, struct.pack("i", socket.AF_INET))
        s.send(b"knock")
        return said(s)


def on_device(kind, host, port):
    """Bound to the one device that leads out."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        s.settimeout(WAIT)
        s.connect((host, int(port)))
        s.send(b"knock")
        return said(s)


def extended_echo(host):
    """ICMP's other echo request (RFC 8335)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as s:
        s.sendto(struct.pack("!BBHHBB", 42, 0, 0, 1, 1, 1) + b"data of ours", (host, 0))
        return "sent"


# -- sockets from elsewhere --------------------------------------------------------------------------------------------------------

def passed(flags, host, port):
    """A socket is made by one process and used by another, which got it by SCM_RIGHTS and has gone into namespaces of its own."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        words = [os.strerror(ctypes.get_errno()) if int(flags, 0) and libc.unshare(int(flags, 0)) else "in"]
        _, ancillary, _, _ = there.recvmsg(9, socket.CMSG_SPACE(4))
        s = socket.socket(fileno=array.array("i", ancillary[0][2])[0])
        # Whoever made its own user namespace has every capability there; the socket is of another one.
        try:
            s.setsockopt(socket.SOL_SOCKET, 36, 0x1EE7)
            words.append("marked")
        except OSError as error:
            words.append(str(error))
        try:
            words.append(exchange(s, host, port))
        except OSError as error:
            words.append(str(error))
        there.send(", ".join(words).encode())
        os._exit(0)
    with datagram_socket() as s:
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [s.fileno()]))])
    here.settimeout(5)
    os.waitpid(child, 0)
    return here.recv(512).decode()


# -- io_uring ----------------------------------------------------------------------------------------------------------------------

SENDMSG, TIMEOUT, CONNECT, SEND, SOCKET, SEND_ZC = 9, 11, 16, 26, 45, 47
HARDLINK, POLLED = 8, 2
SETUP, ENTER = 425, 426


class Ring(Memory):
    """Just enough of io_uring: entries that are done one after the other."""

    def __init__(self, flags=0):
        super().__init__()
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.params = ctypes.create_string_buffer(struct.pack("@5I", 0, 0, flags, 0, 2000) + bytes(100), 120)
        self.fd = self.libc.syscall(SETUP, 8, self.params)
        if self.fd < 0:
            raise OSError("not here: io_uring, %s" % os.strerror(ctypes.get_errno()))
        self.polled = flags & POLLED != 0
        count, self.done = struct.unpack_from("@2I", self.params)
        self.sq, self.cq = struct.unpack_from("@7I", self.params, 40), struct.unpack_from("@6I", self.params, 80)
        self.queue = mmap.mmap(self.fd, self.sq[6] + count * 4, offset=0)
        self.results = mmap.mmap(self.fd, self.cq[5] + self.done * 16, offset=0x8000000)
        self.entries = mmap.mmap(self.fd, count * 64, offset=0x10000000)

    def submit(self, *entries):
        """Each is (opcode, flags, fd, off, addr, len)."""
        tail = struct.unpack_from("@I", self.queue, self.sq[1])[0]
        for number, (opcode, flags, fd, off, addr, length) in enumerate(entries):
            slot = (tail + number) & 7
            struct.pack_into("@BBHiQQII", self.entries, slot * 64, opcode, flags, 0, fd, off, addr, length, 0)
            struct.pack_into("@QQQQ", self.entries, slot * 64 + 32, number, 0, 0, 0)
            struct.pack_into("@I", self.queue, self.sq[6] + slot * 4, slot)
        struct.pack_into("@I", self.queue, self.sq[1], tail + len(entries))
        # Polled, a thread of the kernel finds them by itself; this only wakes it.
        return self.libc.syscall(ENTER, self.fd, len(entries), 0, 2 if self.polled else 0, None, 0)

    def wait(self):
        """The result of the first that is done, and forgets it."""
        end = time.monotonic() + 3
        while time.monotonic() < end:
            head, tail = [struct.unpack_from("@I", self.results, self.cq[i])[0] for i in (0, 1)]
            if head != tail:
                result = struct.unpack_from("@i", self.results, self.cq[5] + (head & (self.done - 1)) * 16 + 8)[0]
                struct.pack_into("@I", self.results, self.cq[0], head + 1)
                return result
            time.sleep(0.005)
        return -errno.ETIMEDOUT

    def do(self, *entry):
        self.submit(entry)
        result = self.wait()
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result


def uring(how, host, port):
    """The kernel makes the socket, connects it and sends: `all`; or sends only: `message`, `uncopied`; or a thread of its own does: `polled`."""
    ring = Ring(POLLED if how == "polled" else 0)
    if how == "all":
        fd = ring.do(SOCKET, 0, socket.AF_INET, socket.SOCK_STREAM, 0, 0)
        ring.do(CONNECT, 0, fd, 16, ring.address(host, port), 0)
        ring.do(SEND, 0, fd, 0, ring.put(b"knock"), 5)
        return "sent"
    with datagram_socket() as s:
        if how == "uncopied":
            s.connect((host, int(port)))
            ring.do(SEND_ZC, 0, s.fileno(), 0, ring.put(b"knock" * 100), 500)
        else:
            ring.do(SENDMSG, 0, s.fileno(), 0, ring.put(ring.header(host, port)), 1)
        return said(s)


# -- IPv6 --------------------------------------------------------------------------------------------------------------------------

def six(what, own, host, other, port="443"):
    """A datagram behind extension headers (RFC 8200), made by hand."""
    def carried(text):
        plain = segment(5353, int(port), text)
        pseudo = socket.inet_pton(socket.AF_INET6, own) + socket.inet_pton(socket.AF_INET6, host) + struct.pack("!II", len(plain), 17)
        return plain[:6] + struct.pack("!H", checksum(pseudo + plain) or 0xFFFF) + plain[8:]

    def whole(first, body, hops=64):
        return struct.pack("!IHBB", 6 << 28, len(body), first, hops) + socket.inet_pton(socket.AF_INET6, own) + socket.inet_pton(socket.AF_INET6, host) + body

    def padding(then):
        return struct.pack("!BB", then, 0) + b"\1\4\0\0\0\0"

    def piece(then, offset, more):
        return struct.pack("!BBHI", then, 0, offset << 3 | more, os.getpid())

    def route(kind):
        return struct.pack("!BBBBI", 17, 2, kind, 0, 0) + socket.inet_pton(socket.AF_INET6, other)

    def solicitation():
        plain = struct.pack("!BBHI", 135, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, host) + b"data of ours"
        pseudo = socket.inet_pton(socket.AF_INET6, own) + socket.inet_pton(socket.AF_INET6, host) + struct.pack("!II", len(plain), 58)
        return plain[:2] + struct.pack("!H", checksum(pseudo + plain)) + plain[4:]

    body = carried(b"knock!")
    long = carried(b"x" * 24)
    packets = {
        "hop-by-hop": [whole(0, padding(17) + body)],
        "options": [whole(60, padding(17) + body)],
        "ten-options": [whole(60, padding(60) * 9 + padding(17) + body)],
        "route-0": [whole(43, route(0) + body)],
        "route-4": [whole(43, route(4) + body)],
        "atomic": [whole(44, piece(17, 0, 0) + body)],
        "fragments": [whole(44, piece(17, 0, 1) + long[:16]), whole(44, piece(17, 2, 0) + long[16:])],
        "backward": [whole(44, piece(17, 2, 0) + long[16:]), whole(44, piece(17, 0, 1) + long[:16])],
        "late-port": [whole(44, piece(60, 0, 1) + padding(17)), whole(44, piece(60, 1, 0) + body)],
        "AH": [whole(51, struct.pack("!BBHII", 17, 4, 0, 1, 1) + bytes(12) + body)],
        "ESP": [whole(50, struct.pack("!II", 1, 1) + body)],
        "nothing": [whole(59, body)],
        "mobility": [whole(135, struct.pack("!BBBBI", 17, 0, 0, 0, 0) + body)],
        "unknown": [whole(253, body)],
        # With the hop limit of those that stay on the link, which only their receiver looks at (RFC 4861 7.1.1).
        "discovery": [whole(58, solicitation(), 255)],
        "discovery-behind": [whole(0, padding(58) + solicitation(), 255)],
    }[what]
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as s:
        for packet_ in packets:
            try:
                s.sendto(packet_, (host, 0))
            except OSError as error:
                return str(error)
    return "sent"


def routed_six(host, other, port="443"):
    """A segment route (RFC 8754), which needs no capability: sent to `host`, meant for another."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RTHDR, struct.pack("!8B", 0, 4, 4, 1, 1, 0, 0, 0) + bytes(16) + socket.inet_pton(socket.AF_INET6, host))
        s.sendto(b"knock", (other, int(port)))
        return "sent"


def foreign_six(how, host, own):
    """From an address that is not ours to one that is (IPV6_FREEBIND): what the kernel answers goes to `host`."""
    echo = how == "echo"
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM if echo else socket.SOCK_STREAM, socket.IPPROTO_ICMPV6 if echo else 0) as s, socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as listener:
        s.setsockopt(socket.IPPROTO_IPV6, 78, 1)
        s.bind((host, 0))
        if echo:
            s.sendto(struct.pack("!BBHHH", 128, 0, 0, 1, 1) + b"data of ours", (own, 0))
            return "sent"
        listener.bind((own, 0))
        if how == "handshake":
            listener.listen()
        # Nobody finishes it.
        s.settimeout(0.3)
        try:
            s.connect(listener.getsockname()[:2])
        except OSError as error:
            return str(error)


# -- what waits in the kernel ------------------------------------------------------------------------------------------------------

def begun(seconds, cork, paced, ring_place, port):
    """Sends that begin now and go on after the file /tmp/over is there, for so many seconds."""
    first = datagram_socket()
    first.sendto(b"kno", MORE, (cork, int(port)))
    slow = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    slow.setsockopt(socket.SOL_SOCKET, SO_PACING, 100000)
    slow.connect((paced, int(port)))
    slow.setblocking(False)
    while True:
        try:
            slow.send(bytes(65536))
        except BlockingIOError:
            break
    later, end = datagram_socket(), "over"
    try:
        ring = Ring()
        # The kernel waits by itself, and then sends: twice a second, a while longer than anybody looks.
        for wait in range(1, int(4 * float(seconds)) + 8, 2):
            tick = ring.put(struct.pack("@qq", wait // 4, wait % 4 * 250000000))
            ring.submit((TIMEOUT, HARDLINK, -1, 0, tick, 1), (SENDMSG, 0, later.fileno(), 0, ring.put(ring.header(ring_place, port)), 1))
    except OSError as error:
        end = str(error)
    write("/tmp/begun", "")
    while not os.path.exists("/tmp/over"):
        time.sleep(0.01)
    try:
        first.sendto(b"ck", (cork, int(port)))
    except OSError as error:
        end += ", " + str(error)
    # The kernel goes on with the rest.
    time.sleep(float(seconds))
    return end
