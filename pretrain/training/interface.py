"""Which network interface of this host leads to the others."""

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface, by its name."""


def interface_towards(host: str) -> str | None:
    """The name of the interface through which `host` is reached; None where that is not known.

    gloo by itself takes the interface of this host's own name, which many systems set to a loopback address: then the
    ranks of other hosts cannot be reached.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 1))  # a datagram socket: nothing is sent
        except OSError:
            return None
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
