"""The system's C compiler: from the generated files to a shared library."""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dacnn.deploy.c.source import CSource
from dacnn.errors import DeployError

# no -march: the code chooses at run time what this processor can. -O2: what -O3 adds is half again as long to compile, a larger
# file, and gcc's portable loops at half the speed; the loops with intrinsics come out the same, instruction by instruction
FLAGS = ("-std=c99", "-O2", "-fPIC", "-shared", "-DDACNN_LIBRARY")
_COMPILERS = ("cc", "gcc", "clang")
# of a compiler's complaint
_LINES = 3


def compiler() -> tuple[str, ...]:
    """The words that call the C compiler.

    Returns:
        Those in the environment variable `CC`, or the first of cc, gcc and clang that is there.

    Raises:
        DeployError: There is none.
    """
    try:
        wanted = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise DeployError(f"CC is {os.environ['CC']!r}, which is no command: {error}: name the C compiler in it") from None
    for words in [wanted] if wanted else [[name] for name in _COMPILERS]:
        if shutil.which(words[0]):
            return tuple(words)
    raise DeployError(
        f"no C compiler: looked for {' '.join(wanted) if wanted else ', '.join(_COMPILERS)}: what is written in C is checked "
        "before it takes its place: install one (on Debian: apt-get install gcc), or name it in the environment variable CC"
    )


def write(source: CSource, folder: Path) -> Path:
    """Write source, header and example into a folder.

    Returns:
        Path of the source.
    """
    for name, text in ((f"{source.name}.h", source.header), (f"{source.name}_example.c", source.example)):
        (folder / name).write_text(text, encoding="ascii")
    path = folder / f"{source.name}.c"
    path.write_text(source.source, encoding="ascii")
    return path


def found(program: str, remedy: str) -> str:
    """Where a program is.

    Raises:
        DeployError: It is missing; the message ends with the remedy.
    """
    path = shutil.which(program)
    if path is None:
        raise DeployError(f"'{program}' is missing: {remedy}")
    return path


def compile_with(words: Sequence[str], folder: Path) -> None:
    """Call a compiler in a folder.

    Raises:
        DeployError: It refuses; the message has the first lines of its own.
    """
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = "; ".join(done.stderr.strip().splitlines()[:_LINES]) or f"exit status {done.returncode}"
        raise DeployError(f"the C compiler '{words[0]}' does not compile what was generated: {said}")


def build(source: CSource, library: Path, flags: Sequence[str] = FLAGS) -> None:
    """Compile to a shared library.

    Args:
        source: The files.
        library: Where it shall stand; an older one is overwritten.
        flags: Of the compiler.

    Raises:
        DeployError: There is no compiler, or it refuses.
    """
    words = compiler()
    with tempfile.TemporaryDirectory(prefix="dacnn-") as folder:
        path = write(source, Path(folder))
        compile_with([*words, *flags, "-o", str(library.resolve()), path.name, "-lm"], Path(folder))
