"""A Program as one C99 source that needs nothing but a C compiler, each kernel in it once."""
