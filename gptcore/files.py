"""Files that are whole or absent, and one writer at a time.

What you learn here: how a crash at any moment loses nothing. What is new is written under a name that nobody reads,
flushed to the disk and renamed, and a rename happens at once; the folder is flushed too, because it holds the name.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path


def write_whole(path, content) -> None:
    """Write a file, text as UTF-8 or bytes, at once: whoever reads it finds the old content or the new one.

    On an error, which is an OSError with the file's name, it is as it was before.
    """
    path = Path(path)
    new = unseen(path)
    try:
        with named(path):
            write(new, content)
            os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write(path, content) -> None:
    """Write a file, text as UTF-8 or bytes, that is on the disk for certain afterwards."""
    with named(path), open(path, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_folder(path):
    """A folder to fill; it becomes path, at once and for certain, when the block ends well, and goes otherwise."""
    folder = unseen(path)
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process that had our number
    folder.mkdir()
    try:
        yield folder
        sync_folder(folder)
        if path.exists():
            remove_folder(path)
        os.rename(folder, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def remove_folder(folder) -> None:
    """Remove a folder with all that is in it; it is never seen half-deleted."""
    gone = unseen(folder, "old")
    os.rename(folder, gone)
    shutil.rmtree(gone)


def unseen(path, word="new") -> Path:
    """Where path is made or unmade: no loader looks at a name that begins with .tmp-, and sweep removes it."""
    return path.with_name(f".tmp-{word}-{path.name}-{os.getpid()}")


def sweep(folder) -> None:
    """Remove what killed processes left in a folder. For the one process that writes there."""
    for left in Path(folder).glob(".tmp-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def named(path):
    """An OSError inside tells this file's name: a full disk is told without it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def sync(path) -> None:
    """Wait until the file's content is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path) -> None:
    """Wait until the names in the folder are on the disk."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_writer(folder, name="data", patience=600):
    """Wait until no other process writes into the folder, then be the one that does.

    The lock is the operating system's, on the file .lock, so it ends with its process, however that ends. Raises
    ValueError, which begins with name, after patience seconds, and OSError where the file system knows no locks.
    """
    lock, deadline = Path(folder) / ".lock", time.monotonic() + patience
    while (handle := _locked(lock)) is None:
        if time.monotonic() > deadline:
            raise ValueError(f"{name}: expected to be the only writer, got a living process's {lock}")
        time.sleep(0.05)
    try:
        yield
    finally:
        if os.name == "nt":  # Windows removes no open file, so the name goes last, unless the next one has it open
            os.close(handle)
            with contextlib.suppress(PermissionError):
                lock.unlink(missing_ok=True)
        else:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _locked(lock):
    """The open lock file, locked; None while somebody else has it."""
    with named(lock):
        try:
            handle = os.open(lock, os.O_CREAT | os.O_RDWR)
        except PermissionError:
            if os.name == "nt":  # its last holder is just removing it
                return None
            raise
        try:
            _lock(handle)
            if os.name == "nt" or os.path.samestat(os.fstat(handle), os.stat(lock)):
                return handle
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # locked by another, or the name of a file that its last holder has removed
        return None


def _lock(handle):
    """Lock an open file for this process, or raise BlockingIOError at once."""
    if os.name == "nt":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
