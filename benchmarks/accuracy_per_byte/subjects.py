"""What a report is about: its tasks, and what its reader must know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.accuracy_per_byte.tasks import Task


@dataclass(frozen=True)
class Subject:
    """Of a report.

    Attributes:
        introduction: the report's first words, in Markdown.
        has: whether a task belongs to it.
    """

    introduction: str
    has: Callable[[Task], bool]


METHOD = """Every method trains the same model on the same batches, over the library's own exchanges between simulated
ranks (`hvd_sketch.Simulation`). Bytes are those that the ledger counted in the run: what one rank sends per step in a
ring, and receives. The ratio is that of a dense ring allreduce to them, for the matrices alone, which are what is
compressed, and for the whole model; tensors of one dimension go dense. Low rank takes these, too, so that its ratio is
the whole model's, at fewer bytes than the others'. Each method has its own best learning rate, of a
grid of factors of 2 that grows until its best is inside; in some tables also of rates a factor of 1.41 beside the best.
The rate was chosen with seed 0 by the same test set; the table has the mean over the seeds at that rate, and the least
and the greatest.
In the figures methods of one ratio stand side by side, because their bytes are nearly the same.
PowerSGD of torch has one rank for all matrices, at least 1: its ratio is the one nearest to what was asked.
A row with fewer than three seeds, or with its rate at the edge of the grid, is not finished.
"""
IMAGES = Subject(
    f"""# Accuracy at equal wire bytes

Made by `python -m benchmarks.accuracy_per_byte --report` from `runs.jsonl`, which has every run. Language models have a
[report of their own](../language_model/README.md).

{METHOD}
Sketch and random go with plain SGD, nominated, low rank, PowerSGD and dense with Nesterov momentum of 0.9 after the
exchange, local top-k with a momentum of 0.9 before it (Deep Gradient Compression). True top-k exists in a simulation
only. With 500 times fewer bytes of the CNN's matrices the others send 266 times fewer in all, and low rank, whose
factors of rank 1 are too large for 500, has a table of its own at nearly 266.
""",
    lambda task: not task.adam,
)
TEXT = Subject(
    f"""# Language models at equal wire bytes

Made by `python -m benchmarks.language_model --report` from `../accuracy_per_byte/runs.jsonl`, which has every run. The
result is the test loss, in nats per character or byte.

{METHOD}
Adam steps after every exchange, or what the method says: LagAdamW; a sign step after a residual of which 0.95 stays;
SGD, with Nesterov momentum of 0.9 after dense, nominated and low rank; Muon for the matrices inside the blocks, with
AdamW for all else; Lion. AdamW decays the matrices by 0.1 where the title says AdamW.
On WikiText-2 its validation part (1.1 MB) trains and its test part judges: losses are not those of other reports.
"Ahead": gradients are those of parameters that `optimizer.ahead()` has moved by what a rank has not sent yet.
"Every 16 steps": each rank trains by itself, and what has become of the parameters is exchanged (`LocalSteps`).
DeMo has the same residual and sign step as ours (0.95), after a block cosine transform. DeMo and the SparseLoCo-like
exchange send as many coordinates per rank to all others with 16 and 64 ranks as with 4, as their authors do: their
ratio is met with 4 ranks, and their bytes grow with the ranks.
""",
    lambda task: task.adam,
)
