"""Writes the clean form of a SLaK checkpoint: our names, tensors alone, nothing to run.

Examples:
    mmslak convert-checkpoint SLaK_tiny_official.pth checkpoints/slak_tiny_in1k.pth
    mmslak convert-checkpoint --publish work_dirs/run/iter_160000.pth upernet_slak_t.pth
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmslak.checkpoints.files import count_parameters, publish, save_state_dict
from mmslak.checkpoints.names import convert
from mmslak.cli.parser import check_output, command_parser, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak convert-checkpoint`."""
    parser = command_parser('convert-checkpoint', __doc__)
    parser.add_argument('source', metavar='IN', help='official file, or a checkpoint of any run')
    parser.add_argument(
        'target', type=Path, metavar='OUT', help='file to write: .pth or .safetensors'
    )
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights')
    parser.add_argument(
        '--publish',
        action='store_true',
        help="write a run's weights as they are, of any model, without optimizer and masks",
    )
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_output(args.target)
    state = (publish if args.publish else convert)(args.source, args.use_ema)
    save_state_dict(state, args.target)
    dense, nonzero = count_parameters(state)
    print(f'{args.target}: {len(state)} tensors, {dense:,} parameters, {nonzero:,} non-zero')
