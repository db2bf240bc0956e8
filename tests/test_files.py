"""Files: whole or as they were, and one writer at a time."""

import os
import subprocess
import sys

import pytest

from gptcore import files


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    """Seen to fail when files were written in place."""
    resource = pytest.importorskip("resource", reason="no limits on file sizes here")
    (tmp_path / "file").write_bytes(b"before")
    code = "import sys; from gptcore import files; files.write_whole(sys.argv[1], bytes(6_000))"
    limited = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "file"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)),
        capture_output=True,
    )
    assert limited.returncode == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"before"}


def test_text_is_written_as_it_is(tmp_path):
    files.write_whole(tmp_path / "file", "Ünï\n")
    assert (tmp_path / "file").read_bytes() == "Ünï\n".encode()


def test_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    """fsync of the file, the rename, fsync of the folder: for a power cut."""
    seen, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("renamed"), replace(*names)))
    files.write_whole(tmp_path / "file", b"content")
    assert seen == [(tmp_path / "file").stat().st_ino, "renamed", tmp_path.stat().st_ino]


def test_a_dead_writers_lock_is_taken_over(tmp_path):
    code = "import sys, os; from gptcore import files\nwith files.only_writer(sys.argv[1]): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert (tmp_path / ".lock").exists()
    with files.only_writer(tmp_path, patience=0):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_of_before_a_reboot_holds_nobody_up(tmp_path):
    """Its writer's number is a living process's again. Seen to fail when the number decided."""
    (tmp_path / ".lock").write_text(str(os.getpid()))
    with files.only_writer(tmp_path, patience=0):
        pass
    (tmp_path / f".tmp-new-step-{os.getpid()}").mkdir()
    with files.whole_folder(tmp_path / "step") as folder:
        (folder / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["step", "file"]


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """Its last holder removes it between our opening and our locking. Seen to fail when that file's lock counted."""
    fcntl = pytest.importorskip("fcntl", reason="this system removes no open file")
    flock, removed = fcntl.flock, []

    def late(handle, how):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with files.only_writer(tmp_path):
        assert removed
        with pytest.raises(ValueError, match="only writer"), files.only_writer(tmp_path, patience=0):
            pass


def test_a_living_writer_is_waited_for(tmp_path):
    with (
        files.only_writer(tmp_path),
        pytest.raises(ValueError, match=r"^data: expected to be the only writer, got a living process's .*\.lock$"),
        files.only_writer(tmp_path, patience=0.1),
    ):
        pass
    assert not (tmp_path / ".lock").exists()
