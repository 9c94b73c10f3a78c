"""Fetches released weights and converts them to the clean form that the configs expect.

They are SLaK's, and those of ConvNeXt that learnt from SLaK.

Examples:
    mmslak get-checkpoint slak_tiny
    mmslak get-checkpoint upernet_slak_tiny
    mmslak get-checkpoint slak_base --file ~/Downloads/SLaK_base.pth
"""

import argparse
import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from mmslak.apis.weights import get_released, kernel_sizes
from mmslak.checkpoints.files import count_parameters, read_state_dict
from mmslak.checkpoints.released import FOLDER, RELEASED, Released
from mmslak.cli.parser import check_output, command_parser, one_line_errors


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
    folder = Path(args.out)
    was_there = folder.exists()
    check_output(folder / entry.file)
    try:
        target = get_released(args.name, folder, args.file)
    finally:
        if not was_there:
            with contextlib.suppress(OSError):  # what is in it is to stay
                folder.rmdir()
    state = read_state_dict(target)
    dense, nonzero = count_parameters(state)
    print(f'{target}: {len(state)} tensors, {dense:,} parameters, {nonzero:,} non-zero')
    print_next_step(entry, target, kernel_sizes(state))


def print_next_step(entry: Released, target: Path, sizes: list[int]) -> None:
    """Prints what to set or run."""
    config = f'mmslak::{Path(entry.config).stem}'
    if entry.head or entry.family == 'ConvNeXt':
        print(f'test it: mmslak test {config} {shlex.quote(str(target))}')
        return
    print(f'set in a config: checkpoint = {str(target)!r}')
    options = shlex.quote(f'checkpoint={target}')
    if entry.kernel_size != 51:
        options += f' model.backbone.kernel_sizes={",".join(map(str, sizes))}'
    print(f'or: mmslak train {config} --cfg-options {options}')
