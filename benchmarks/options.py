"""The command line that the benchmarks share."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from timing import RESULTS, environment, machine, use_allocator

from mmslak.ops import tuning

DTYPES = ('float32', 'bfloat16', 'float16')
LAYOUTS = {'NCHW': torch.contiguous_format, 'NHWC': torch.channels_last}


def new_parser(
    description: str, rounds: int, budget: float, dtypes: Sequence[str] = DTYPES
) -> argparse.ArgumentParser:
    """A parser with the shared options, for `parse`.

    Args:
        description: The docstring of the script.
        rounds: Default of --rounds, as `timing.medians` takes it.
        budget: Default of --budget, as `timing.medians` takes it.
        dtypes: Choices of --dtype, the first is the default; with none there is no such option.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', type=torch.device, default='cpu', help='[%(default)s]')
    if dtypes:
        parser.add_argument('--dtype', choices=dtypes, default=dtypes[0], help='[%(default)s]')
    parser.add_argument('--threads', type=int, help="on the CPU [torch's own choice]")
    parser.add_argument('--rounds', type=int, default=rounds, help='timed runs [%(default)s]')
    parser.add_argument(
        '--budget',
        type=float,
        default=budget,
        help='seconds for the runs of one call [%(default)s]',
    )
    parser.add_argument(
        '--tuning',
        choices=('on', 'read', 'off'),
        default=os.environ.get('MMSLAK_TUNING', 'on'),
        help="how the operator's 'auto' chooses, see mmslak.ops.tuning [%(default)s]",
    )
    parser.add_argument('--quick', action='store_true', help='tiny cases, to try the script')
    parser.add_argument(
        '--default-allocator',
        action='store_true',
        help='let glibc hand large buffers back at every free',
    )
    parser.add_argument(
        '--out',
        nargs='?',
        const='',
        metavar='FILE',
        help='JSON file to write; without FILE that of this machine in benchmarks/results',
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line and prepares torch and the allocator as it says."""
    args = parser.parse_args(argv)
    use_allocator(not args.default_allocator)
    if args.device.type == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU here')
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    # Without a limit: a process of a user has one network, and not hundreds of layers.
    tuning(args.tuning, seconds=math.inf)
    if 'dtype' in args:
        args.dtype = getattr(torch, args.dtype)
    return args


def facts(args: argparse.Namespace) -> dict[str, str | int]:
    """The circumstances of a run, with which its results begin."""
    found = dict(environment(args.device), tuning=args.tuning)
    if 'dtype' in args:
        found['dtype'] = str(args.dtype).removeprefix('torch.')
    print(', '.join(f'{name} {value}' for name, value in found.items()))
    return found


def out_file(args: argparse.Namespace, name: str) -> Path | None:
    """Where the results of the benchmark of that name go; None if they are not kept."""
    if args.out != '':
        return args.out and Path(args.out)
    suffix = '_default_allocator' if args.default_allocator else ''
    return RESULTS / machine(args.device) / f'{name}_{args.device.type}{suffix}.json'
