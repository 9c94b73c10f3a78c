"""MMEngine's ways to load weights, with `read_checkpoint` in the place of torch.load."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from .checkpoint import CheckpointError, read_checkpoint
from .download import DownloadError, fetch


def read_all_safely() -> None:
    """Makes everything that loads weights through MMEngine do it as `read_checkpoint` does.

    MMEngine reads files as programs: resuming, `load_from`, `init_cfg` and weights by address. What
    this cannot read (storage services of companies) is refused.
    """
    register = CheckpointLoader.register_scheme
    register('', lambda filename, map_location=None: read_checkpoint(filename), force=True)
    register(('http://', 'https://'), _read_from_net, force=True)
    register(('modelzoo://', 'torchvision://'), _named_in(get_torchvision_models), force=True)
    register(('open-mmlab://', 'openmmlab://'), _named_in(get_external_models), force=True)
    register('mmcls://', _named_in(get_mmcls_models), force=True)
    services = ('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://')
    register(services, _refuse, force=True)


def _read_from_net(filename: str, map_location: object = None) -> dict:
    """Downloads a file once, into torch's cache."""
    name = PurePosixPath(urlparse(filename).path).name
    target = Path(torch.hub.get_dir(), 'checkpoints', name)
    try:
        if get_dist_info()[0] == 0:
            fetch(filename, target)
        barrier()
    except DownloadError as error:
        raise CheckpointError(str(error)) from error
    return read_checkpoint(target)


def _named_in(models: Callable[[], dict[str, str]]) -> Callable[..., dict]:
    """Reads what a library has an address for."""

    def read(filename: str, map_location: object = None) -> dict:
        name = filename.partition('://')[2]
        address = models().get(name)
        if address is None:
            raise CheckpointError(f'{filename}: no weights of this name')
        return _read_from_net(address) if '://' in address else read_checkpoint(address)

    return read


def _refuse(filename: str, map_location: object = None) -> dict:
    raise CheckpointError(f'{filename}: weights are read from local files and http addresses only')
