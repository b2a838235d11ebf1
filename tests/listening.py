"""Where a process listens."""

import ipaddress

import psutil


def listening(process: psutil.Process) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        sockets = process.net_connections(kind="inet")
    except psutil.NoSuchProcess:
        return []
    listed = (ipaddress.ip_address(found.laddr.ip) for found in sockets if found.status == psutil.CONN_LISTEN)
    return [getattr(address, "ipv4_mapped", None) or address for address in listed]
