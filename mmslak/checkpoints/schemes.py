"""MMEngine's ways to load weights, with our reading of files in the place of torch.load."""

import hashlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from mmslak.checkpoints.files import take_checkpoint
from mmslak.errors import CheckpointError
from mmslak.fileio.download import DownloadError
from mmslak.fileio.per_machine import fetch_per_machine

# Where libraries keep the addresses of weights that have a name.
NAMED: dict[str, Callable[[], dict[str, str]]] = {
    'modelzoo': get_torchvision_models,
    'torchvision': get_torchvision_models,
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
    'mmcls': get_mmcls_models,
}


def load_without_code() -> None:
    """Makes everything that loads weights through MMEngine read files as `read_checkpoint` does.

    MMEngine runs the code in files: when it resumes, and at `load_from`, `init_cfg` and weights by
    address. Addresses that mmslak cannot read (storage services of companies) are refused.
    """
    named = [f'{scheme}://' for scheme in NAMED]
    services = ['pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://']
    schemes = ('', 'http://', 'https://', *named, *services)
    CheckpointLoader.register_scheme(schemes, _load, force=True)


def _load(filename: str | Path, map_location: object = None) -> dict:
    return take_checkpoint(local_file(filename))


def local_file(file: str | Path) -> Path:
    """Gives the path of a file on this machine. A file with an address is downloaded.

    Args:
        file: A path, an http or https address, or a name that MMEngine has an address for, such as
            'torchvision://resnet50'.

    Returns:
        The path. Downloaded files are in torch's cache. Every machine downloads a file once. All
        ranks have to call this together, and all fail if one of them fails.

    Raises:
        CheckpointError: If the file cannot be downloaded, or no weights have this name.
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
    try:
        fetch_per_machine(address, target)
    except DownloadError as error:
        raise CheckpointError(str(error)) from error
    return target
