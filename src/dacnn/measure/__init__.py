"""Parameters, multiply-adds and bytes of a network."""
