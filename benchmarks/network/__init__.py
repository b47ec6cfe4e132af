"""Exchanges and trainings on the hosts of an emulated network, ours and what one would take instead."""
