"""Fetches released SLaK weights and converts them to the clean form that the configs expect.

Examples:
    mmslak get-checkpoint slak_tiny
    mmslak get-checkpoint upernet_slak_tiny
    mmslak get-checkpoint slak_base --file ~/Downloads/SLaK_base.pth
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mmslak.checkpoints.files import count_parameters, save_state_dict
from mmslak.checkpoints.names import convert
from mmslak.checkpoints.pretrained import load_pretrained
from mmslak.checkpoints.released import FOLDER, RELEASED, Released
from mmslak.cli.parser import check_output, command_parser, one_line_errors
from mmslak.errors import CheckpointError, UserError
from mmslak.fileio.download import DownloadError, fetch, fetch_google_drive
from mmslak.models import SLaK

# What the names of a head's weights begin with, and what it makes of a model.
KINDS = {
    'decode_head.': 'a segmentor',
    'roi_head.': 'a detector',
    '': 'a classifier or backbone alone',
}
KERNEL = 'backbone.stages.{}.0.large_kernel.vertical.conv.weight'


def download(entry: Released, target: Path) -> None:
    """Gets the released file."""
    try:
        if entry.google_drive_id:
            fetch_google_drive(entry.google_drive_id, target)
        else:
            fetch(entry.link, target)
    except DownloadError as error:
        raise DownloadError(
            f'{error}; or get {entry.link} with a browser and add --file FILE'
        ) from error


def check(entry: Released, path: Path, state: dict[str, Tensor]) -> list[int]:
    """Checks that a file holds what its name says; gives the kernel size of each stage.

    Raises:
        CheckpointError: If not.
    """
    stages = [name for i in range(4) if (name := KERNEL.format(i)) in state]
    kernel_sizes = [state[name].shape[2] for name in stages]
    if len(stages) < 4 or kernel_sizes[0] != entry.kernel_size:
        raise CheckpointError(
            f'{path}: kernels of {kernel_sizes} in the stages, {entry.file} has '
            f'{entry.kernel_size} in the first of four'
        )
    heads = [h for h in KINDS if h and any(name.startswith(h) for name in state)] or ['']
    if heads != [entry.head]:
        raise CheckpointError(
            f'{path}: {entry.file} is {KINDS[entry.head]}, this is {KINDS[heads[0]]}'
        )
    load_pretrained(SLaK(**entry.backbone, kernel_sizes=kernel_sizes), path)
    return kernel_sizes


def save(state: dict[str, Tensor], target: Path) -> None:
    """Writes the clean file, which gets its name when it is whole."""
    part = target.with_name(f'{target.stem}.part.pth')
    save_state_dict(state, part)
    part.replace(target)


def say_how_to_use(entry: Released, target: Path, kernel_sizes: list[int]) -> None:
    """Prints what to set or run."""
    if entry.head:
        print(f'test it: mmslak test {entry.config} {shlex.quote(str(target))}')
        return
    print(f'set in a config: checkpoint = {str(target)!r}')
    options = shlex.quote(f'checkpoint={target}')
    if entry.kernel_size != 51:
        options += f' model.backbone.kernel_sizes={",".join(map(str, kernel_sizes))}'
    print(f'or: mmslak train {entry.config} --cfg-options {options}')


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak get-checkpoint`."""
    parser = command_parser('get-checkpoint', __doc__)
    parser.add_argument('name', choices=RELEASED, help='which weights')
    parser.add_argument('--out', default=FOLDER, help='folder to write to (default: %(default)s)')
    parser.add_argument('--file', help='released file that is here already: only convert it')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    entry = RELEASED[args.name]
    target = Path(args.out, entry.file)
    fetched = Path(args.out, f'{args.name}.released.pth')
    check_output(target)
    if args.file:
        source = Path(args.file)
    elif target.is_file():
        source = target
    else:
        source = fetched
        download(entry, fetched)
    try:
        state = convert(source)
        kernel_sizes = check(entry, source, state)
    except CheckpointError:
        if source == fetched:  # so that the next run fetches it anew
            fetched.replace(fetched.with_suffix('.corrupt'))
        raise
    try:
        if source != target:
            save(state, target)
        if source == fetched:
            fetched.unlink()
    except OSError as error:
        raise UserError(f'{target} cannot be written: {error.strerror}') from error
    dense, nonzero = count_parameters(state)
    print(f'{target}: {len(state)} tensors, {dense:,} parameters, {nonzero:,} non-zero')
    say_how_to_use(entry, target, kernel_sizes)
