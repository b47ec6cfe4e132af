"""Benchmarks, run with ``python -m`` from the checkout's root.

quickstart.py trains one classifier dense and sketched; launch/quickstart.sh runs it. kernels/ times the sketch on one
machine, network/ exchanges and trainings over an emulated network. paper/ repeats the paper's experiments. methods/ are
the ways to average gradients that network/ compares. figures.py has what all figures and tables share, results/ what
was measured.
"""
