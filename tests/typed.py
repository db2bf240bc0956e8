"""What is typed, in a process of its own: `invoke ARGV` as a user gets it, without the seconds torch takes to load.

A server process has imported everything and forks for each command, so exit statuses, signals, limits and terminals
are real and a command costs a tenth of a second more than its work.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    SERVER.set_forkserver_preload(
        ["typed", "torch._dynamo", "invoke.main", "rich.live", "tools.planning", "tools.training", "tools.speaking"]
    )


def work(argv, folder, files, terminal, n_bytes, environment):
    """In the new process: take over the standard files, then do what the program `invoke` does."""
    os.chdir(folder)
    os.environ.update(environment)
    os.environ.pop("PYTEST_XDIST_WORKER", None)  # or invoke benchmark would think it has company
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if terminal:
        import fcntl
        import termios

        os.setsid()
        handle = os.open(terminal, os.O_RDWR)
        fcntl.ioctl(handle, termios.TIOCSCTTY, 0)
        handles = [handle] * 3
    else:
        handles = [os.open(files[0], os.O_RDONLY), os.open(files[1], flags), os.open(files[2], flags)]
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
    utf8 = {"encoding": "utf-8", "closefd": False}
    sys.stdin, sys.stdout, sys.stderr = open(0, **utf8), open(1, "w", **utf8), open(2, "w", **utf8)  # noqa: SIM115
    if n_bytes:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    from invoke.main import program

    program.run(["invoke", "-r", str(HOUSE), *argv])


class Command:
    """`invoke ARGV` at work in a folder; terminal is the path of a pseudo-terminal, n_bytes limits every file."""

    def __init__(self, *argv, cwd, stdin="", terminal=None, n_bytes=0, place=None, **environment):
        self.place = Path(place or cwd)
        self.files = [str(self.place / f".typed-{os.urandom(4).hex()}.{word}") for word in ("in", "out", "err")]
        Path(self.files[0]).write_text(stdin, encoding="utf-8")
        words = ([str(word) for word in argv], str(cwd), self.files, terminal, n_bytes, environment)
        self.process = SERVER.Process(target=work, args=words)
        self.process.start()

    def signal(self, number):
        """Send it a signal."""
        os.kill(self.process.pid, number)
        return self

    def wait_for(self, ready, seconds=60):
        """Wait until ready() is true; an error once the process has ended without that, or after so many seconds."""
        end = time.monotonic() + seconds
        while not ready():
            assert self.process.is_alive(), f"ended with {self.process.exitcode}: {self.stderr}"
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.002)
        return self

    def end(self, seconds=120):
        """Wait for its end; the exit status, of a killed one minus the signal."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.stdout[-2000:]}{self.stderr}")
        return self

    @property
    def status(self):
        return self.process.exitcode

    @property
    def stdout(self):
        return self._read(1)

    @property
    def stderr(self):
        return self._read(2)

    def _read(self, number):
        path = Path(self.files[number])
        return path.read_text(encoding="utf-8") if path.exists() else ""


def typed(*argv, cwd, **ways):
    """`invoke ARGV` from its start to its end."""
    return Command(*argv, cwd=cwd, **ways).end()


def snapshot(folder):
    """Every file below a folder with its bytes, but for those of the commands themselves."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not path.name.startswith(".typed-")
    }


SIGINT, SIGTERM, SIGKILL = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGKILL", None)
