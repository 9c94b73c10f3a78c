"""MMEngine's ways to load weights, with `read_checkpoint` in the place of torch.load."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from mmengine.dist import all_gather_object, get_rank
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from mmslak.checkpoints.files import read_checkpoint
from mmslak.checkpoints.unpickle import drop_records
from mmslak.errors import CheckpointError
from mmslak.fileio.download import DownloadError, fetch

# Where libraries keep the addresses of weights that they have names for.
NAMED: dict[str, Callable[[], dict[str, str]]] = {
    'modelzoo': get_torchvision_models,
    'torchvision': get_torchvision_models,
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
    'mmcls': get_mmcls_models,
}


def read_all_safely() -> None:
    """Makes everything that loads weights through MMEngine do it as `read_checkpoint` does.

    MMEngine reads files as programs: resuming, `load_from`, `init_cfg` and weights by address. What
    this cannot read (storage services of companies) is refused.
    """
    named = [f'{scheme}://' for scheme in NAMED]
    services = ['pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://']
    schemes = ('', 'http://', 'https://', *named, *services)
    CheckpointLoader.register_scheme(schemes, _read, force=True)


def _read(filename: str | Path, map_location: object = None) -> dict:
    """A checkpoint whose schedulers and optimizers can be resumed."""
    content = read_checkpoint(local_file(filename))
    drop_records([content.get(key) for key in ('param_schedulers', 'optimizer')])
    return content


def local_file(file: str | Path) -> Path:
    """Where a file is on this machine, downloaded if it is an address.

    Args:
        file: A path, an http or https address, or a name that MMEngine has an address for, such as
            'torchvision://resnet50'.

    Returns:
        The path; of what has an address, in torch's cache. Every machine downloads it once, and all
        ranks, which have to call this together, fail if one of them does.

    Raises:
        CheckpointError: If it cannot be downloaded, or there is nothing of this name.
    """
    scheme, separator, name = str(file).partition('://')
    if not separator:
        return Path(file)
    if scheme in NAMED:
        name = get_deprecated_model_names().get(name, name) if 'mmlab' in scheme else name
        address = NAMED[scheme]().get(name)
        if address is None:
            raise CheckpointError(f'{file}: no weights of this name')
        return local_file(address)
    if scheme not in ('http', 'https'):
        raise CheckpointError(f'{file}: weights are read from local files and http addresses only')
    return _downloaded(str(file))


def _downloaded(address: str) -> Path:
    name = PurePosixPath(urlparse(address).path).name
    if not PurePosixPath(name).suffix:  # …/download would be the name of many files
        name = f'{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}'
    target = Path(torch.hub.get_dir(), 'checkpoints', name)
    # Machines that share a disk find what the first process has downloaded.
    for has_turn in (get_rank() == 0, is_first_of_machine()):
        failed = None
        if has_turn:
            try:
                fetch(address, target)
            except (DownloadError, OSError) as error:
                failed = str(error)
        failures = [text for text in all_gather_object(failed) if text]
        if failures:
            raise CheckpointError(failures[0])
    return target


def is_first_of_machine() -> bool:
    """Whether this process speaks for all on its machine; it may not have joined them yet.

    Launchers give a process its place on the machine, one beside the other where Slurm's srun
    starts mpirun or torchrun; the first one is the first by all of them. Without a launcher that is
    the first of the group.
    """
    names = 'LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'
    places = [os.environ[name] for name in names if name in os.environ]
    return all(place == '0' for place in places or [str(get_rank())])
