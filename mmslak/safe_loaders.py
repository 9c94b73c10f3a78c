"""MMEngine's ways to load weights, with `read_checkpoint` in the place of torch.load."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from mmengine.dist import all_gather_object, get_rank
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from .checkpoint import CheckpointError, read_checkpoint
from .download import DownloadError, fetch
from .safe_load import drop_records


def read_all_safely() -> None:
    """Makes everything that loads weights through MMEngine do it as `read_checkpoint` does.

    MMEngine reads files as programs: resuming, `load_from`, `init_cfg` and weights by address. What
    this cannot read (storage services of companies) is refused.
    """
    register = CheckpointLoader.register_scheme
    register('', _read, force=True)
    register(('http://', 'https://'), _read_from_net, force=True)
    register(('modelzoo://', 'torchvision://'), _named_in(get_torchvision_models), force=True)
    register(('open-mmlab://', 'openmmlab://'), _named_in(get_external_models), force=True)
    register('mmcls://', _named_in(get_mmcls_models), force=True)
    services = ('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://')
    register(services, _refuse, force=True)


def _read(filename: str | Path, map_location: object = None) -> dict:
    """A checkpoint whose schedulers and optimizers can be resumed."""
    content = read_checkpoint(filename)
    drop_records([content.get(key) for key in ('param_schedulers', 'optimizer')])
    return content


def _read_from_net(filename: str, map_location: object = None) -> dict:
    """Downloads a file once per machine, into torch's cache; all ranks fail if one of them does."""
    name = PurePosixPath(urlparse(filename).path).name
    target = Path(torch.hub.get_dir(), 'checkpoints', name)
    # Machines that share a disk find what the first process has downloaded.
    for has_turn in (get_rank() == 0, is_first_of_machine()):
        failed = None
        if has_turn:
            try:
                fetch(filename, target)
            except (DownloadError, OSError) as error:
                failed = str(error)
        failures = [text for text in all_gather_object(failed) if text]
        if failures:
            raise CheckpointError(failures[0])
    return _read(target)


def is_first_of_machine() -> bool:
    """Whether this process speaks for all on its machine; it may not have joined them yet.

    Launchers give a process its place on the machine, one beside the other where Slurm's srun
    starts mpirun or torchrun; the first one is the first by all of them. Without a launcher that is
    the first of the group.
    """
    names = 'LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'
    places = [os.environ[name] for name in names if name in os.environ]
    return all(place == '0' for place in places or [str(get_rank())])


def _named_in(models: Callable[[], dict[str, str]]) -> Callable[..., dict]:
    """Reads what a library has an address for."""

    def read(filename: str, map_location: object = None) -> dict:
        name = filename.partition('://')[2]
        address = models().get(name)
        if address is None:
            raise CheckpointError(f'{filename}: no weights of this name')
        return _read_from_net(address) if '://' in address else _read(address)

    return read


def _refuse(filename: str, map_location: object = None) -> dict:
    raise CheckpointError(f'{filename}: weights are read from local files and http addresses only')
