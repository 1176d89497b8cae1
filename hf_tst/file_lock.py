"""File locks, which the system releases when the process ends."""

from __future__ import annotations

from typing import IO, Any


def lock_file(file: IO[Any], wait: bool = False) -> bool | None:
    """Lock an open file until it is closed, or this process ends.

    A lock of `flock`, as that of `filelock`, would also belong to the processes that this one forks, such as those of a loader or of
    `datasets`: they outlive it if it is killed.

    Args:
        file: The file, open for writing. This process must not open and close it again meanwhile, which would unlock it.
        wait (`bool`, *optional*, defaults to `False`): Wait for another process that holds it.

    Returns:
        `bool` or `None`: Whether this process holds it; `None` where the system cannot lock files.
    """
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):  # not a POSIX system, or a file system without locks
        return None
    return True
