"""What happens in a job when something goes wrong: every fault under every launcher, and what is promised of it.

``python -m tests.faults.table`` prints the table of docs/faults.md; test_table.py injects every fault of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from math import gcd

from hvd_sketch.transport.stall import ABORT_VARIABLE, STALL_VARIABLE
from tests.faults.job import OF_RANK_0, POINTS
from tests.support.harness import LAUNCHERS as SCRIPTS

# Without our launch scripts the transport alone must end the job.
PLAIN_MPIRUN = ["bash", "-c", 'source launch/env.sh && exec mpirun --oversubscribe "$@"', "mpirun"]
# Nobody ends the other ranks: called with -n N COMMAND.
BY_HAND = [
    "bash",
    "-c",
    """
    source launch/env.sh
    export WORLD_SIZE=$2 MASTER_ADDR=localhost RANK
    MASTER_PORT=$(python -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')
    export MASTER_PORT
    for ((RANK = 0; RANK < WORLD_SIZE; RANK++)); do "${@:3}" & pids+=($!) status+=(/proc/$!/status); done
    # A rank that is stopped goes on when all others have ended, as if somebody found it.
    while grep -qs '^State:.[RSD]' "${status[@]}"; do sleep 0.2; done
    kill -CONT "${pids[@]}" 2>/dev/null || true
    for pid in "${pids[@]}"; do wait $pid || ((failed += 1)); done
    ((failed == 0))
    """,
    "ranks",
]
# By name: what starts the ranks, and their transport.
LAUNCHERS: dict[str, tuple[list[str], str]] = {
    "torchrun.sh": (SCRIPTS["torch"], "torch"),
    "torch by hand": (BY_HAND, "torch"),
    "mpirun.sh": (SCRIPTS["mpi"], "mpi"),
    "mpirun": (PLAIN_MPIRUN, "mpi"),
    "horovodrun.sh": (SCRIPTS["horovod-gloo"], "horovod"),
    "horovodrun.sh --mpi": (SCRIPTS["horovod-mpi"], "horovod"),
}
EVERYWHERE = tuple(LAUNCHERS)
LAUNCH_SCRIPTS = ("torchrun.sh", "mpirun.sh", "horovodrun.sh", "horovodrun.sh --mpi")
ENDING = tuple(name for name in LAUNCHERS if name != "torch by hand")  # who also end a rank that hangs
STALL_S, ABORT_S = 3, 12  # the limits in rows of hangs; by default 30 and never
LATE_ABORT_S = 34  # where the first limit is the default


@dataclass(frozen=True)
class Row:
    """One kind of fault.

    Attributes:
        fault: in words.
        promise: what then happens, in words.
        within_s: seconds from the fault until then.
        whats: the faults that are injected, as arguments of job.py, or of without_us.py.
        launchers: under which.
        told: regular expressions that must be found in what the job says.
        ranks: how many.
        takes_s: a cell, about, on two cores.
        module: what the ranks run.
        hangs: with the limits STALL_S and ABORT_S; other rows have the defaults: 30 s, and never.
        hangs_long: with the default of 30 s, and LATE_ABORT_S.
    """

    fault: str
    promise: str
    within_s: int
    whats: tuple[str, ...]
    launchers: tuple[str, ...] = EVERYWHERE
    told: tuple[str, ...] = ()
    ranks: int = 2
    takes_s: int = 7
    module: str = "job"
    hangs: bool = False
    hangs_long: bool = False

    @property
    def limits_s(self) -> dict[str, int]:
        """The limits of waiting that are set, by variable."""
        if self.hangs_long:
            return {ABORT_VARIABLE: LATE_ABORT_S}
        return {STALL_VARIABLE: STALL_S, ABORT_VARIABLE: ABORT_S} if self.hangs else {}


@dataclass(frozen=True)
class Cell:
    """One fault under one launcher."""

    row: Row
    what: str
    launcher: str

    @property
    def name(self) -> str:
        return f"{self.launcher}: {self.what}" + " without us" * (self.row.module == "without_us")


NAMED = r"for rank 1, which has not come, in step 3, phase '{}'"
CONNECTED = tuple(point for point in POINTS if point != "start")
STARTED = tuple(name for name in LAUNCHERS if name != "torch by hand")  # by somebody who notices that a rank has ended
ENDED = f"{ABORT_VARIABLE} is {ABORT_S}"
ROWS = (
    Row(
        f"`kill -9` of a rank, at {len(CONNECTED)} points of a job",
        "the job ends",
        30,
        tuple(f"kill@{point}" for point in CONNECTED),
    ),
    Row(
        "`kill -9` of rank 0, whose process may keep the store",
        "the job ends",
        30,
        tuple(f"kill@{point}{OF_RANK_0}" for point in ("connected", "third", "save")),
    ),
    Row("`kill -9` or an exception before it is connected", "the job ends", 30, ("kill@start", "raise@start"), STARTED),
    Row("a crash (`SIGSEGV`)", "the job ends", 30, ("crash@fourth",)),
    Row(
        "an exception that nobody catches",
        "the job ends, and says which",
        30,
        ("raise@data", "raise@third", "raise@update"),
        told=("rank 1 fails on purpose",),
    ),
    Row("`sys.exit(3)`", "the job ends", 30, ("exit 3@data", "exit 3@third")),
    Row(
        "`sys.exit(0)` in a step",
        "the rank is named, and the job ends, not with status 0",
        30,
        ("exit 0@data", "exit 0@fourth", f"exit 0@data{OF_RANK_0}"),
        told=("the program of rank [01] is over",),
        ranks=3,
        takes_s=14,
    ),
    Row(
        "a loop that is one step shorter on a rank",
        "the rank is named, and the job ends, not with status 0",
        30,
        ("end early",),
        EVERYWHERE,
        ("the program of rank 1 is over",),
        ranks=3,
        takes_s=14,
    ),
    Row(
        "a rank makes one step more or less, then all save",
        "an error that names the rank, and the job ends",
        30,
        ("one step more", "one step less"),
        EVERYWHERE,
        ("come to 'save a checkpoint', but others wait elsewhere|'save a checkpoint': rank",),
        ranks=3,
        takes_s=9,
    ),
    Row(
        "a rank hangs before an exchange",
        "the rank and the phase are named, and where it hangs",
        35,
        ("hang@data",),
        ENDING,
        (
            "rank 0 of 3 has waited",
            "rank 2 of 3 has waited",
            NAMED.format("agree"),
            "ranks 0, 2 wait for it",
            "job.py",
            ENDED,
        ),
        ranks=3,
        takes_s=20,
        hangs=True,
    ),
    Row(
        "a rank hangs in the middle of an exchange",
        "the rank and the phase are named",
        35,
        ("hang@accumulate",),
        ENDING,
        (NAMED.format("sketch"),),
        ranks=3,
        takes_s=20,
        hangs=True,
    ),
    Row(
        "a rank hangs, and nobody has set `HVD_SKETCH_STALL_SECONDS`",
        "the rank and the phase are named",
        40,
        ("hang@backward",),
        ("torchrun.sh", "mpirun.sh", "horovodrun.sh"),
        (r"rank 0 of 2 has waited for 3[0-4] s for rank 1, which has not come, in step \d, phase 'agree'",),
        takes_s=30,
        hangs_long=True,
    ),
    Row(
        "a rank is stopped (`SIGSTOP`), also the one that keeps the store",
        "the rank and the phase are named, and that it is stopped",
        35,
        ("stop@accumulate", f"stop@data{OF_RANK_0}"),
        tuple(name for name in EVERYWHERE if name != "torchrun.sh"),
        ("(rank [01], which has not come|the other ranks), in step 3, phase .*Rank [01] is stopped, by a", ENDED),
        ranks=3,
        takes_s=25,
        hangs=True,
    ),
    Row(
        "other settings, optimizer, model or version on a rank",
        "an error on every rank that names what differs and where",
        0,
        ("survive",),
        told=("rank 0 passed 7 checks", "rank 1 passed 7 checks", "rank 2 passed 7 checks"),
        ranks=3,
        takes_s=15,
    ),
    Row("another kind of checkpoint, or an older one, on a rank", "the same", 0, ()),
    Row("NaN or infinity in a rank's gradient", "all ranks skip, and nothing changes", 0, ()),
    Row("sums that overflow", "they are sent within 50 steps: sent + kept = produced", 0, ()),
    Row("uneven data, with `optimizer.join()`", "training goes on", 0, ()),
    Row("damaged files of a checkpoint", "an error on every rank that names the file; nothing is loaded", 0, ()),
    Row("a full disk on a rank", "an error on every rank; the checkpoints before stay", 0, ()),
    Row("none: all ranks end normally", "nobody says a word, and the job ends within 30 s", 0, ()),
    Row(
        "`kill -9`, a crash, `sys.exit(3)` of a program without hvd_sketch",
        "the job ends",
        30,
        tuple(f"{act}@{point}" for point in ("before", "inside") for act in ("kill", "crash", "exit 3")),
        LAUNCH_SCRIPTS,
        ranks=3,
        takes_s=5,
        module="without_us",
    ),
    Row(
        "an exception in a program without hvd_sketch",
        "the job ends, and says which",
        30,
        ("raise@before", "raise@inside"),
        LAUNCH_SCRIPTS,
        ("rank 1 fails on purpose",),
        ranks=3,
        takes_s=5,
        module="without_us",
    ),
)
CELLS = [Cell(row, what, launcher) for row in ROWS for what in row.whats for launcher in row.launchers]


def sample(day: int, budget_s: float = 30.0) -> list[Cell]:
    """Some cells for a day, other ones every day, until all have had their turn."""
    stride, pace = (
        next(step for step in count(least) if gcd(step, len(CELLS)) == 1) for least in (5 * len(CELLS) // 8, 4)
    )
    at = pace * day  # in as many days every cell is the first of one: a day may have less than four
    chosen: list[Cell] = []
    while True:
        cell = CELLS[at * stride % len(CELLS)]
        if sum(each.row.takes_s for each in (*chosen, cell)) > budget_s:
            return chosen
        chosen.append(cell)
        at += 1


def markdown() -> str:
    """The table of docs/faults.md."""
    lines = [["fault", "promise", *LAUNCHERS]]
    for row in ROWS:
        within = f"{row.within_s} s" if row.within_s else "at once"
        lines.append([row.fault, row.promise, *(within if name in row.launchers else "–" for name in LAUNCHERS)])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown())
