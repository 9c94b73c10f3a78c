"""What one process of a machine does for all processes on it."""

import os
import sys
from pathlib import Path

from mmslak.fileio.download import DownloadError, fetch


def is_first_of_machine() -> bool:
    """Whether this process is the first one of its machine.

    It may be called before the process group exists. Launchers give a process its number on the
    machine. Slurm's srun may start mpirun or torchrun, so that there are several numbers; the first
    process is the first by all of them. Without a launcher it is the first of the group.
    """
    names = 'LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'
    places = [os.environ[name] for name in names if name in os.environ]
    return all(place == '0' for place in places or [str(_rank())])


def _rank() -> int:
    """The number of this process in its group; 0 without one."""
    if 'torch' not in sys.modules:
        return 0  # and a process without torch is not made to load it
    from mmengine.dist import get_rank

    return get_rank()


def fetch_per_machine(url: str, target: Path) -> None:
    """Downloads a file once on every machine. All processes have to call this together.

    Raises:
        DownloadError: On all processes, if one of them cannot download it.
    """
    from mmengine.dist import all_gather_object

    # Machines that share a disk find what the first process has downloaded.
    for has_turn in (_rank() == 0, is_first_of_machine()):
        failed = None
        if has_turn:
            try:
                fetch(url, target)
            except (DownloadError, OSError) as error:
                failed = str(error)
        failures = [text for text in all_gather_object(failed) if text]
        if failures:
            raise DownloadError(failures[0])
