"""The command line, ``hvd-sketch`` or ``python -m hvd_sketch``: one module for each command."""
