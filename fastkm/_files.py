"""Files that are written whole: whoever reads one finds the old file or the new one, never a part of one."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

AnyPath = str | bytes | os.PathLike  # of a file


@contextmanager
def replace_file(path: AnyPath) -> Iterator[str]:
    """Yield the path of a new file beside ``path``, which takes its place when the block ends without an error.

    The new file has a name of its own in every call, so that several processes may write one path: the last one wins.
    A symbolic link is followed. A file that is replaced keeps its permissions; a new one has those of ``open``.

    Raises:
        OSError: ``path`` cannot be written, or is no regular file.
    """
    target = os.path.realpath(os.fsdecode(path))
    partial, mode = _create_beside(target)
    try:
        yield partial
        _finish(partial, mode)
        os.replace(partial, target)
    finally:
        with suppress(FileNotFoundError):  # it is there after an error only
            os.unlink(partial)


def check_file(path: AnyPath) -> None:
    """Raise the ``OSError`` that :func:`replace_file` would raise for ``path``, and leave everything as it is."""
    os.unlink(_create_beside(os.path.realpath(os.fsdecode(path)))[0])


def write_text(path: AnyPath, text: str) -> None:
    """Write ``text`` in UTF-8, whatever the locale. A file name that is not UTF-8 appears in it with escapes."""
    with replace_file(path) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def _create_beside(target: str) -> tuple[str, int]:
    """A new empty file in the folder of ``target``, and the permissions it will need."""
    folder, name = os.path.split(target)
    partial = os.path.join(folder, f".{secrets.token_hex(4)}.{name}")
    try:
        mode = _existing_mode(target)
        descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from None  # the user knows no other name
    try:
        return partial, stat.S_IMODE(os.fstat(descriptor).st_mode) if mode is None else mode
    finally:
        os.close(descriptor)


def _existing_mode(target: str) -> int | None:
    """The permissions of a file that may be replaced; None where there is none yet."""
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):  # /dev/null, for one, must stay what it is
        raise OSError(errno.EINVAL, "not a regular file")
    if not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_IMODE(found.st_mode)


def _finish(path: str, mode: int) -> None:
    """Bring the file to the disk, with these permissions: a library that wrote it may have made a file of its own."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.chmod(path, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
