"""Every way to average one gradient over the ranks: ours and what one would take instead."""
