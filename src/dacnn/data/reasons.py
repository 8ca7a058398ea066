"""What a foreign library says about a file, in one line of an error message."""


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__
