"""Where the ranks of a Horovod job can meet outside of Horovod: an address of rank 0 that all of them reach."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

# Who names the interfaces to use; the first that is set counts. The user; horovodrun over Gloo; and over MPI what
# --network-interfaces makes of them for Open MPI, and for MPICH and Intel MPI, which are told nothing but NCCL's.
NCCLS = "NCCL_SOCKET_IFNAME"
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "OMPI_MCA_btl_tcp_if_include", NCCLS)
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
    variable = next((variable for variable in INTERFACE_VARIABLES if os.environ.get(variable)), None)
    is_wanted = _of_nccl if variable == NCCLS else _is_among
    chosen = [address for name, address in found if variable is None or is_wanted(name, address, os.environ[variable])]
    return sorted(chosen, key=lambda address: ip_address(address).is_loopback)


def _is_among(name: str, address: str, wanted: str) -> bool:
    """Whether an interface is wanted by its name, or as Open MPI allows by its network, such as 10.0.0.0/8."""
    return any(name == each or _is_in(address, each) for each in wanted.split(","))


def _is_in(address: str, network: str) -> bool:
    try:
        return "/" in network and ip_address(address) in ip_network(network, False)
    except ValueError:  # neither a network nor the name of an interface
        return False


def _of_nccl(name: str, _: str, wanted: str) -> bool:
    """Whether an interface is wanted by NCCL's rules: "eth" is a prefix, "=eth0" a name, and "^" leaves such out."""
    leaves_out, is_exact = wanted.startswith("^"), wanted.removeprefix("^").startswith("=")
    parts = [part for part in wanted.removeprefix("^").removeprefix("=").split(",") if part]
    return any(name == part if is_exact else name.startswith(part) for part in parts) != leaves_out


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
