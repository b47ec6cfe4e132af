"""Which coordinates are worth an exact value: one file for each source."""
