"""Every back end and its peers in one table: each runs in a process of its own, all of them in turn."""
