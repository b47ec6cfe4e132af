"""Hosts, cables and the switch: building a lab, shaping its traffic, reading its counters, removing it."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

from netlab_lib.lab import ENDINGS, INTERFACE, STATE, Host, Lab, LabError, reserved, step
from netlab_lib.processes import end, residents
from netlab_lib.remote_shell import start_remote_shell

SWITCH = "switch"
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
BURST_S = 0.001  # of the rate may pass at once; more, and small messages would not feel the rate
QUEUE_S, LEAST_QUEUE_BYTES = 0.02, 512 * 1024  # what one end of a cable can hold back before it drops
NETEM_PACKETS = 100_000  # the cable holds what is under way, and never drops
# No addresses but ours, so that an idle interface counts nothing. The same TCP everywhere: cubic, or Reno where the
# machine allows only its own default in namespaces; over a short cable the two behave alike.
TUNE_NETWORK = """
ipv6=/proc/sys/net/ipv6/conf/all/disable_ipv6
[ ! -e $ipv6 ] || echo 1 >$ipv6
tcp=/proc/sys/net/ipv4/tcp
grep -qw cubic ${tcp}_allowed_congestion_control && choice=cubic || choice=reno
echo $choice >${tcp}_congestion_control
"""


def build(name: str, count: int, slots: int, remote_shell: str, rate: str, delay: str) -> Lab:
    """Make a lab in place of what is left of a former one of its name; on failure or Ctrl-C nothing of it stays.

    Returns with `ENDINGS` blocked: from the moment the lab is whole, what becomes of it is the caller's to say.
    """
    if (STATE / name).exists():
        with reserved(name):
            remove(name)
    remove(name)  # processes that outlived their folder
    try:
        (STATE / name).mkdir(parents=True, mode=0o700)
        with reserved(name):
            hosts = {f"{name}-{number}": f"10.77.0.{number}" for number in range(1, count + 1)}
            write_host_files(STATE / name, hosts, slots)
            switch = start_host(name, SWITCH, "")
            step("make the switch", switch.inside("ip", "link", "add", SWITCH, "type", "bridge"))
            step("start the switch", switch.inside("ip", "link", "set", SWITCH, "up"))
            started = [start_host(name, host, address) for host, address in hosts.items()]
            lab = Lab(name, slots, remote_shell, rate, delay, switch, started)
            for number, host in enumerate(lab.hosts, 1):
                connect(switch, host, f"port{number}")
            shape(lab, rate, delay)
            start_remote_shell(lab)
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
            lab.save()
    except BaseException:
        remove(name)
        raise
    return lab


def write_host_files(folder: Path, hosts: dict[str, str], slots: int) -> None:
    """The host file for mpirun, and the /etc/hosts of each."""
    known = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in hosts.items())
    for name in [SWITCH, *hosts]:
        (folder / f"{name}.hosts").write_text(known)
    (folder / "hosts").write_text("".join(f"{name} slots={slots}\n" for name in hosts))


def start_host(lab: str, name: str, address: str) -> Host:
    """New namespaces, and the process that holds them."""
    # Marked first of all, so that `remove` finds the holder; one that we did not live to see marked reads no answer.
    hold = 'mount --bind "$0" /etc/hosts && echo held && read -r _ && exec sleep infinity >/dev/null 2>&1 </dev/null'
    unshare = ["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sh", "-c", hold]
    holder = subprocess.Popen(
        [*unshare, str(STATE / lab / f"{name}.hosts")],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert holder.stdin and holder.stdout
    said = holder.stdout.readline().strip()
    if said != "held":
        raise LabError(f"could not make namespaces for {name}, does this machine or container allow them? {said}")
    print("stay", file=holder.stdin, flush=True)
    host = Host(name, address, [holder.pid])
    step(f"name {name}", host.inside("hostname", name))
    step(f"show {name} its own interfaces", host.inside("mount", "-t", "sysfs", "sysfs", "/sys"))
    step(f"tune the network of {name}", host.inside("sh", "-ec", TUNE_NETWORK))
    step(f"start the loopback of {name}", host.inside("ip", "link", "set", "lo", "up"))
    return host


def connect(switch: Host, host: Host, port: str) -> None:
    """A cable from the host's eth0 to a port of the switch; both ends appear where they belong, never in between."""
    peer = ["peer", "name", INTERFACE, "netns", str(host.pids[0])]
    step(f"connect {host.name}", switch.inside("ip", "link", "add", port, "type", "veth", *peer))
    step(f"plug {host.name} in", switch.inside("ip", "link", "set", port, "master", SWITCH, "up"))
    address = ["ip", "address", "add", f"{host.address}/24", "dev", INTERFACE]
    step(f"give {host.name} an address", host.inside(*address))
    step(f"start {INTERFACE} of {host.name}", host.inside("ip", "link", "set", INTERFACE, "up"))


def shape(lab: Lab, rate: str, delay: str) -> None:
    """Limit what each host sends (at its eth0) and receives (at its port), and delay what it receives.

    Raises:
        LabError: the kernel cannot do it; a lab that was shaped before is so again.
    """
    try:
        limit_all(lab, rate, delay)
    except LabError:
        if (rate, delay) != (lab.rate, lab.delay):
            limit_all(lab, lab.rate, lab.delay)
        raise
    lab.rate, lab.delay = rate, delay


def limit_all(lab: Lab, rate: str, delay: str) -> None:
    for number, host in enumerate(lab.hosts, 1):
        limit(host, INTERFACE, rate, "none")
        limit(lab.switch, f"port{number}", rate, delay)


def limit(host: Host, device: str, rate: str, delay: str) -> None:
    """Queueing of what leaves by one end of a cable: netem for the delay, then a token bucket for the rate."""
    tc = ["tc", "qdisc", "add", "dev", device]
    place = ["root"]
    # There may be nothing to delete yet, which is as well.
    subprocess.run(host.inside("tc", "qdisc", "del", "dev", device, "root"), capture_output=True, check=False)
    if delay != "none":
        netem = ["handle", "1:", "netem", "delay", delay, "limit", str(NETEM_PACKETS)]
        step("set a delay (which needs a kernel with netem; leave out --delay)", host.inside(*tc, *place, *netem))
        place = ["parent", "1:"]
    if rate != "none":
        bytes_per_s = float(rate[:-4]) * UNITS[rate[-4:]] / 8
        burst_bytes = max(int(bytes_per_s * BURST_S), 2 * 1514)
        queue_bytes = max(int(bytes_per_s * QUEUE_S), LEAST_QUEUE_BYTES)
        bucket = ["handle", "2:", "tbf", "rate", rate, "burst", str(burst_bytes), "limit", str(queue_bytes)]
        step("set a rate (which needs a kernel with tbf; leave out --rate)", host.inside(*tc, *place, *bucket))


def remove(name: str) -> None:
    """End all processes of a lab, with which its namespaces and interfaces go, and delete its folder."""
    end(lambda: residents(name))
    shutil.rmtree(STATE / name, ignore_errors=True)
    if STATE.is_dir() and not any(STATE.iterdir()):
        STATE.rmdir()


def read_counters(lab: Lab) -> list[tuple[int, int]]:
    """Bytes sent and received by the interface of each host so far, as the kernel counts them."""
    return [read_interface(host) for host in lab.hosts]


def read_interface(host: Host) -> tuple[int, int]:
    lines = Path(f"/proc/{host.pids[0]}/net/dev").read_text().splitlines()
    counts = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return int(counts[8]), int(counts[0])
