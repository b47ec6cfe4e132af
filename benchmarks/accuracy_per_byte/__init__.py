"""Accuracy at equal wire bytes: every exchange trains the same small models, each at its own best learning rate.

::

    python -m benchmarks.accuracy_per_byte --data-dir DATA --plan targets --minutes 60
    python -m benchmarks.accuracy_per_byte --report

The ranks are real exchanges of :class:`hvd_sketch.Simulation`; bytes are those that its ledger counted.

- ``models.py``, ``data.py``, ``tasks.py``: what is trained.
- ``methods.py``, ``settings.py``: the exchanges, and what they need to meet a wire ratio.
- ``training.py``, ``steps.py``, ``rounds.py``, ``inner.py``: one run. ``records.py``: the file of all runs.
- ``search.py``, ``plans.py``, ``schedule.py``: which runs come next, and their processes.
- ``report.py``, ``by_ranks.py``, ``subjects.py``: the tables and the figures.
"""
