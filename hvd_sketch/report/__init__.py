"""The logs of runs as one page that needs nothing else: what ``hvd-sketch report`` writes."""
