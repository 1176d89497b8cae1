"""Flush the files of a checkpoint to disk (fsync) in a thread, while training continues."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from transformers import TrainingArguments

from .checkpoint_folders import agreeing, flush_folder


class DiskFlush:
    """Flushes a checkpoint to disk, in one process per machine. The checkpoint is complete, and has its name, already.

    Args:
        checkpoint (`Path`): The folder `checkpoint-<step>`.
        args (`TrainingArguments`): The run's arguments; they know the rank.
    """

    def __init__(self, checkpoint: Path, args: TrainingArguments) -> None:
        self.checkpoint, self._args = checkpoint, args
        threads = ThreadPoolExecutor(1)
        # On a machine with a disk of its own, or with its own cache of a shared one.
        flushes_here = args.local_process_index == 0
        self._flushes = [threads.submit(flush_folder, checkpoint)] if flushes_here else []
        threads.shutdown(wait=False)

    def finish(self) -> None:
        """Wait until the checkpoint is on the disk. Every rank must take part.

        Raises:
            RunError: On all ranks, if it failed on one of them.
        """
        with agreeing(self.checkpoint, self._args):
            for flush in self._flushes:
                flush.result()

    def wait(self) -> None:
        """Wait until the thread of this process ends, whether it failed or not."""
        wait(self._flushes)
