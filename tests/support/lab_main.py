"""What test_netlab.py runs on the hosts of a lab.

``exchange TRANSPORT FOLDER``: endless exchanges; every rank keeps its ledger in FOLDER/HOST.jsonl after each step.
``send HOST MIB``: sends so much to a host, and prints the Mbit/s that arrived there.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

PORT = 5000
RECEIVER = f"""
import socket
server = socket.create_server(("", {PORT}))
print("listening", flush=True)
connection, _ = server.accept()
while connection.recv(1 << 20):
    pass
"""


def exchange(name: str, folder: str) -> None:
    from hvd_sketch import SketchConfig, SketchedAllreduce
    from hvd_sketch.transport import resolve_transport
    from tests.support.targets import float_gradient

    transport = resolve_transport(name)
    sketched = SketchedAllreduce(SketchConfig.paper(cols=600, k=50), 5000, transport)
    report = Path(folder) / f"{socket.gethostname()}.jsonl"
    for step in count():
        sketched.step(float_gradient(5000, transport.rank, step))
        sketched.ledger.write_jsonl(report)


def send(host: str, mebibytes: str) -> None:
    receive = f"{sys.executable} -c {shlex.quote(RECEIVER)}"
    with subprocess.Popen(["ssh", host, receive], stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout is not None and receiver.stdout.readline() == b"listening\n"
        start_s = time.monotonic()
        with socket.create_connection((host, PORT)) as connection:
            for _ in range(int(mebibytes)):
                connection.sendall(bytes(1 << 20))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # the end of the other side, which has everything then
        elapsed_s = time.monotonic() - start_s
    print((int(mebibytes) << 20) * 8 / 1e6 / elapsed_s)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"exchange": exchange, "send": send}[command](*arguments)
