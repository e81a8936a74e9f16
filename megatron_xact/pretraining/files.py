"""Why a file could not be read or written, in words.

Imports the standard library only: the launchers, which must be ready before torch is, use it too.
"""

from __future__ import annotations

import errno
import os

_FULL = "there is no room for {}: make some, or choose another place"
_FORBIDDEN = "this user may not read or write {}: change its permissions, or choose another place"
_WORDS = {
    errno.ENOENT: "there is no {}: is the path right?",
    errno.ENOTDIR: "{} cannot be there, since a part of that path is a file: is the path right?",
    errno.EISDIR: "{} is a folder, where a file is needed: name a file",
    errno.EEXIST: "{} is there already: choose another name, or move it away",
    errno.ENOTEMPTY: "{} is a folder that is not empty: choose another name, or move it away",
    errno.EROFS: "{} lies where nothing can be written: choose another place",
    errno.EACCES: _FORBIDDEN, errno.EPERM: _FORBIDDEN, errno.ENOSPC: _FULL, errno.EDQUOT: _FULL,
}  # fmt: skip


def why_not(error: BaseException) -> str:
    """The error in one line; of a system's error, the file and the way out in words instead of "[Errno 2]"."""
    if not isinstance(error, OSError) or error.errno is None or not error.strerror:
        return " ".join(str(error).split()) or type(error).__name__
    file = None if error.filename is None or isinstance(error.filename, int) else os.fsdecode(error.filename)
    if error.errno in _WORDS:
        return _WORDS[error.errno].format(file or "a file")
    return f"{file}: {error.strerror}" if file else error.strerror
