"""The commands, each a function whose arguments are its words and flags."""
