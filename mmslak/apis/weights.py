"""The weights that the authors released: downloaded, checked, converted and kept."""

from pathlib import Path

import torch
from torch import Tensor

from mmslak.apis.convnext import convert_convnext
from mmslak.checkpoints.files import save_state_dict
from mmslak.checkpoints.names import convert
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.checkpoints.released import RELEASED, Released
from mmslak.errors import CheckpointError
from mmslak.fileio.download import DownloadError, fetch, fetch_google_drive
from mmslak.models import SLaK

# What the names of a head's weights begin with, and what it makes of a model.
KINDS = {
    'decode_head.': 'a segmentor',
    'roi_head.': 'a detector',
    '': 'a classifier or backbone alone',
}
KERNEL = 'stages.{}.0.large_kernel.vertical.conv.weight'


def get_released(
    name: str, folder: str | Path | None = None, file: str | Path | None = None
) -> Path:
    """Downloads released weights, checks them and writes them in their clean form, once.

    Args:
        name: A name of `mmslak.checkpoints.released.RELEASED`.
        folder: Where the clean file is, or will be; None is `checkpoints` in torch hub's folder
            (`torch.hub.get_dir()`), where torchvision and timm keep theirs.
        file: The released file, if it is here already. It is converted, and nothing is downloaded.

    Returns:
        The clean file.

    Raises:
        DownloadError: If it cannot be downloaded; the message says how to get it by hand.
        CheckpointError: If the released file is damaged or holds another model.
        UserError: If the clean file cannot be written.
    """
    entry = RELEASED[name]
    folder = Path(folder or Path(torch.hub.get_dir(), 'checkpoints'))
    target, download = folder / entry.file, folder / f'{name}.released.pth'
    if file is None and target.is_file():
        return target
    if file is None:
        _download(name, entry, download)
    source = Path(file or download)
    try:
        if entry.family == 'ConvNeXt':
            state = convert_convnext(source, **entry.backbone)
        else:
            state = convert(source)
            _check(entry, source, state)
    except CheckpointError:
        if file is None:  # so that the next call downloads it anew
            download.replace(download.with_suffix('.corrupt'))
        raise
    save_state_dict(state, target)
    if file is None:
        download.unlink()
    return target


def kernel_sizes(state: dict[str, Tensor]) -> list[int]:
    """Sides of the large kernels of the stages whose weights a file holds."""
    names = [f'backbone.{KERNEL.format(stage)}' for stage in range(4)]
    return [state[name].shape[2] for name in names if name in state]


def _download(name: str, entry: Released, target: Path) -> None:
    try:
        if entry.google_drive_id:
            fetch_google_drive(entry.google_drive_id, target)
        else:
            fetch(entry.link, target)
    except DownloadError as error:
        raise DownloadError(
            f'{error}; or get {entry.link} with a browser and run mmslak get-checkpoint {name} '
            f'--out {target.parent} --file FILE'
        ) from error


def _check(entry: Released, path: Path, state: dict[str, Tensor]) -> None:
    """Checks that a file holds the model of its entry.

    Raises:
        CheckpointError: If not.
    """
    sizes = kernel_sizes(state)
    if len(sizes) < 4 or sizes[0] != entry.kernel_size:
        raise CheckpointError(
            f'{path}: kernels of {sizes} in the stages, {entry.file} has {entry.kernel_size} in '
            'the first of four'
        )
    heads = [h for h in KINDS if h and any(name.startswith(h) for name in state)] or ['']
    if heads != [entry.head]:
        raise CheckpointError(
            f'{path}: {entry.file} is {KINDS[entry.head]}, this is {KINDS[heads[0]]}'
        )
    load_pretrained(SLaK(**entry.backbone, kernel_sizes=sizes), path)
