"""Files that are at every moment the old one or the whole new one, locks, and what a refusal of the disk means."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

if sys.platform != "win32":
    import fcntl

from simclr.system import is_out_of_memory

PathLike = str | os.PathLike[str]

_ADVICE = {
    errno.EACCES: "this user may not; change the rights (chmod, chown) or take another place",
    errno.EPERM: "this user may not; change the rights (chmod, chown) or take another place",
    errno.ENOSPC: "the disk is full; free some space or take another place",
    errno.EDQUOT: "your quota is used up; free some space or take another place",
    errno.EFBIG: "files of this process or file system may not be larger (ulimit -f)",
    errno.EROFS: "the disk is read-only; take another place",
    errno.ENOTDIR: "a part of this path is a file; take another place",
    errno.EEXIST: "a file has this name; take another place",
    errno.ENAMETOOLONG: "the name is too long; take a shorter one",
}
_ADVICE_TO_WRITERS = _ADVICE | {
    errno.ENOENT: "its folder does not exist; make it or take another place",
    errno.EWOULDBLOCK: "another process is writing this file; wait for it or stop it",
}


class RefusedError(ValueError):
    """The operating system refuses a file or memory; the user can change that."""


@contextlib.contextmanager
def explain_refusals() -> Iterator[None]:
    """Turn the operating system's refusals of rights and space into errors that say what to do.

    Raises:
        RefusedError: In place of those errors; others pass.
    """
    try:
        yield
    except OSError as error:
        if (advice := _ADVICE.get(error.errno or 0)) is None:
            raise
        where = "writing" if error.filename is None else error.filename
        raise RefusedError(f"{where}: {error.strerror}: {advice}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = str(error).partition("\n")[0]
        raise RefusedError(f"out of memory: {told}. A smaller model, batch or image takes less") from error


def explain_write_error(error: OSError, path: PathLike) -> str:
    """Return what the operating system's refusal to write ``path`` means, and what to do about it."""
    advice = _ADVICE_TO_WRITERS.get(error.errno or 0)
    reason = f"{error.strerror}: {advice}" if advice else str(error)
    return f"cannot write {path}: {reason}. An existing file was left as it is"


@contextlib.contextmanager
def atomic_write(path: PathLike, *, durable: bool = True) -> Iterator[io.BufferedRandom]:
    """Open a new file that takes the name ``path`` at the end of the ``with`` block, unless that raises.

    Until then ``path`` stays as it was. What programs killed at the same work left behind is removed.

    Args:
        path: Where to. Its folder must exist.
        durable: Whether to wait until the disk has it, so that it survives a power cut, too.

    Raises:
        OSError: If it cannot be written.
    """
    path = Path(path)
    # A name of its own, so that two programs that write at once cannot mix their bytes.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        for left_behind in path.parent.glob(f".{path.name}.*.tmp"):
            left_behind.unlink(missing_ok=True)
        with temporary.open("x+b") as file:
            yield file
            if durable:
                sync(file)
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace(path: PathLike, content: bytes | str, *, durable: bool = False) -> None:
    """Give a file another content, by :func:`atomic_write`; text is written in UTF-8."""
    with atomic_write(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that ``path`` is at every moment either the old file or the whole new one. Paths become text.

    Raises:
        TypeError: If ``value`` holds anything else that JSON cannot.
        ValueError: If it holds a number that is not finite.
    """

    def path_as_text(entry: object) -> str:
        if isinstance(entry, Path):
            return str(entry)
        raise TypeError(f"a {type(entry).__name__} cannot be written as JSON: {entry!r}")

    replace(path, json.dumps(value, indent=2, default=path_as_text, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Make a new folder that takes the name ``path`` at the end of the ``with`` block, unless that raises.

    Until then what lies at ``path`` stays as it was; then it goes. What programs killed at the same work left behind is
    removed. The folder above must exist.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        for left_behind in path.parent.glob(f".{path.name}.*.tmp"):
            shutil.rmtree(left_behind)
        temporary.mkdir()
        yield temporary
        for name in temporary.iterdir():
            with name.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(file: IO[bytes] | IO[str]) -> None:
    """Return when all that was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def is_at(path: PathLike, file: IO[bytes] | IO[str]) -> bool:
    """Return whether an open file still is the one at ``path``, not deleted or replaced."""
    try:
        return os.path.samestat(Path(path).stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def sync_folder(folder: PathLike) -> None:
    """Return when a folder's new, changed and removed names are on the disk; at once where that cannot be asked for."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # what CIFS and FUSE say of folders
            raise
    finally:
        os.close(descriptor)


def lock(file: IO[bytes] | IO[str], *, shared: bool = False) -> bool:
    """Lock an open file (flock) until it is closed or the process ends, however it ends; ``shared``: beside others.

    Returns True, or False where there are no such locks: on Windows, and on some file systems. Raises BlockingIOError
    if another process holds it.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}:
            raise
        return False
    return True
