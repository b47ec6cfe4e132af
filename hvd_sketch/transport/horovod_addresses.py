"""Where the ranks of a Horovod job can meet outside of Horovod: an address of rank 0 that all of them reach."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

# Who names the interfaces to use; the first that is set counts. The user; horovodrun over Gloo; and over MPI what
# --network-interfaces makes of them for Open MPI, and for MPICH and Intel MPI, which are told nothing but NCCL's.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_include", "NCCL_SOCKET_IFNAME")
REACH_S = 3.0  # after which an address that does not answer is taken for unreachable
NOT_REACHED = "-"


def own_addresses() -> list[str]:
    """IPv4 addresses of this host on the interfaces that INTERFACE_VARIABLES name, or on all; loopback at the end."""
    import psutil  # which Horovod needs

    found = [
        (name, each.address)
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if each.family == socket.AF_INET
    ]
    named = next(filter(None, (os.environ.get(variable) for variable in INTERFACE_VARIABLES)), "")
    chosen = [address for name, address in found if not named or _is_among(name, address, named.split(","))]
    return sorted(chosen, key=lambda address: ip_address(address).is_loopback)


def _is_among(name: str, address: str, wanted: list[str]) -> bool:
    """Whether an interface is wanted by its name, or as Open MPI allows by its network, such as 10.0.0.0/8."""
    return name in wanted or any("/" in each and ip_address(address) in ip_network(each, False) for each in wanted)


def addresses_towards(offers: list[str], port: int) -> Iterator[str]:
    """For each address of rank 0 the one of this host to use with it, or NOT_REACHED. Communication: one connection."""
    own = own_addresses()
    for offer in offers:
        try:
            with socket.create_connection((offer, port), REACH_S) as connection:
                at = connection.getsockname()[0]
        except OSError:
            yield NOT_REACHED
        else:
            yield at if at in own else next(iter(own), NOT_REACHED)
