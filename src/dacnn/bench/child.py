"""The other end of a worker: starts it, asks it, waits no longer than it may take, and ends it with all that it started."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from dacnn.errors import ArtefactError

# how many threads the libraries of a process may start, wherever they look that up
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Child:
    """A worker in a fresh interpreter."""

    def __init__(self, threads: int, log: Path) -> None:
        """Start it.

        Args:
            threads: Threads that its libraries may take.
            log: Where its standard output and error go.
        """
        self.log = log
        ours, theirs = multiprocessing.Pipe()
        # torch.compile would start a pool of processes, which are not to be measured and not to be left behind
        environment = os.environ | dict.fromkeys(_THREADS, str(threads)) | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "dacnn.bench.worker", str(theirs.fileno())]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                # of its own, so that what it starts can be ended with it, and Ctrl-C reaches it through us alone
                start_new_session=True,
            )
        theirs.close()
        self.connection = ours

    def ask(self, call: str, timeout_seconds: float, **arguments: Any) -> dict[str, Any]:
        """Have something done.

        Args:
            call: Name of what to do.
            timeout_seconds: How long it may take.
            **arguments: What it is given.

        Returns:
            The answer.

        Raises:
            ArtefactError: It failed, took too long, or the process died; behind the last two the worker is gone.
        """
        try:
            self.connection.send_bytes(json.dumps({"call": call, **arguments}).encode())
            if not self.connection.poll(timeout_seconds):
                self.close()
                raise ArtefactError(f"took longer than {timeout_seconds:.0f} s to {call}")
            answer: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise ArtefactError(f"crashed: {self._last_words()}") from None
        if "error" in answer:
            raise ArtefactError(str(answer["error"]))
        return answer

    def _last_words(self) -> str:
        """How the process ended, and the last line that it printed."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        status = self.process.returncode
        ended = signal.Signals(-status).name if status is not None and status < 0 else f"exit status {status}"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{ended}: {lines[-1]}" if lines else ended

    def close(self) -> None:
        """End it, and what it started."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
