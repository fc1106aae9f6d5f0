"""What other systems and disks do, played by calls that answer as theirs do."""

import ctypes
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stackllm.cli import signals
from stackllm.errors import LockedError, StorageError, UsageError
from stackllm.members.lexical import LexicalParams
from stackllm.members.registry import Member, check_tables
from stackllm.store import atomic
from stackllm.store.atomic import windows_process_exists, write_bytes
from stackllm.store.lock import locked
from stackllm.store.units import make_unit, publish, state

UNIT = make_unit("stage/one", 1, "a")


def fill(folder):
    (folder / "text.txt").write_bytes(b"hello")


def refusing(call, number, only):
    """``call``, which fails on files for which ``only`` holds."""

    def played(file, *arguments, **named):
        if only(file):
            raise OSError(number, os.strerror(number), None if isinstance(file, int) else str(file))
        return call(file, *arguments, **named)

    return played


def is_folder(file):
    return stat.S_ISDIR(os.fstat(file).st_mode) if isinstance(file, int) else Path(file).is_dir()


def write_everything(folder):
    write_bytes(folder / "new" / "out.csv", b"whole")
    assert (folder / "new" / "out.csv").read_bytes() == b"whole"
    with locked(folder / "run"):
        publish(folder / "run", UNIT, fill)
    assert state(folder / "run", UNIT) == "done"
    assert not list(folder.rglob("*.tmp"))


CANNOT, MAY_NOT = sorted(atomic.UNSUPPORTED), [errno.EACCES, errno.EPERM]


@pytest.mark.parametrize(
    ("where", "call", "number", "only"),
    [
        *((os, "fsync", number, is_folder) for number in [*CANNOT, *MAY_NOT]),
        *((os, "open", number, is_folder) for number in [*CANNOT, *MAY_NOT]),
        *((Path, "chmod", number, Path.exists) for number in MAY_NOT),
        *((fcntl, "flock", number, bool) for number in [*CANNOT, errno.ENOLCK]),
    ],
)
def test_a_disk_that_can_do_no_more_than_write_is_written_to(
    tmp_path, monkeypatch, where, call, number, only
):
    """Folders of Windows, of shared and network disks: no sync, no permissions, no locks."""
    monkeypatch.setattr(where, call, refusing(getattr(where, call), number, only))
    write_everything(tmp_path)


def test_a_disk_without_locks_has_one_writer_a_run_still(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(fcntl.flock, errno.ENOLCK, lambda it: True))
    again = locked(tmp_path)
    with locked(tmp_path), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        again.__enter__()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_folder_that_is_not_synced_for_want_of_a_sound_disk_is_told(
    tmp_path, monkeypatch, number
):
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, number, is_folder))
    with pytest.raises(StorageError, match=f"writing failed: {os.strerror(number)}"):
        write_bytes(tmp_path / "out.csv", b"whole")


def test_a_file_that_a_program_has_open_on_windows_is_told_so(tmp_path, monkeypatch):
    target = tmp_path / "out.csv"
    target.write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", refusing(Path.replace, errno.EACCES, lambda it: True))
    with pytest.raises(StorageError, match=r"close any program that has it open\.$"):
        write_bytes(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_writer_that_is_slower_on_windows_tries_again(tmp_path, monkeypatch):
    """There a folder cannot be renamed onto another: that is called a lack of permission."""
    rename, faster = Path.replace, []

    def replace(self, target):
        if self.suffix == ".tmp" and not faster:
            faster.append(1)
            Path(target).mkdir()
            raise PermissionError(errno.EACCES, "Access is denied", str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    publish(tmp_path, UNIT, fill)
    assert faster
    assert state(tmp_path, UNIT) == "done"
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["one"]


class Kernel:
    """What Windows answers of processes: 7 runs, 8 has ended, 9 is somebody else's, others are not."""

    def __init__(self):
        self.open = []

    def OpenProcess(self, access, inherits, pid):
        assert access == 0x0010_0000
        if pid in (7, 8):
            self.open.append(pid)
        return pid if pid in (7, 8) else 0

    def WaitForSingleObject(self, handle, milliseconds):
        assert milliseconds == 0
        return 0x102 if handle == 7 else 0

    def CloseHandle(self, handle):
        self.open.remove(handle)


@pytest.mark.parametrize(("pid", "exists"), [(7, True), (8, False), (9, True), (10, False)])
def test_asking_for_a_process_of_windows_does_not_end_it(pid, exists):
    kernel = Kernel()
    assert windows_process_exists(pid, kernel, lambda: 5 if pid == 9 else 87) == exists
    assert not kernel.open


def test_asking_for_a_process_on_windows_sends_no_signal(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: Kernel(), raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: 87, raising=False)
    monkeypatch.setattr(os, "kill", None)
    assert atomic.process_exists(7)
    assert not atomic.process_exists(10)


def test_the_command_to_go_on_with_is_quoted_for_the_shell_that_is_there(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stackllm", "run", "--train", "my data/train.csv"])
    assert signals.farewell(signal.SIGINT).endswith("--train 'my data/train.csv'")
    monkeypatch.setattr(os, "name", "nt")
    assert signals.farewell(signal.SIGTERM).endswith('--train "my data/train.csv"')


def test_what_an_alphabet_of_windows_lacks_is_printed_all_the_same(tmp_path):
    """A pipe there takes 256 characters; a class or a path of others must not end in a traceback."""
    (tmp_path / "s.csv").write_text("id,g,→ a,b\n1,q,0.6,0.4\n2,q,0.7,0.3\n", encoding="utf-8")
    code = "import sys; sys.argv = sys.argv[1:]; from stackllm.cli import main; main()"
    command = [sys.executable, "-c", code, "stackllm", "optim", "s.csv", "--group", "g", "-o", "-"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}
    )
    assert done.returncode == 0, done.stderr
    assert "→ a".encode() in done.stdout


def test_members_whose_folders_would_be_one_where_case_is_nothing_are_refused():
    params = LexicalParams()
    with pytest.raises(UsageError, match='"Words" is the name of a member and of'):
        check_tables([Member("Words", "lexical", params), Member("words", "lexical", params)], [])
    check_tables([Member("Words", "lexical", params), Member("word", "lexical", params)], [])
