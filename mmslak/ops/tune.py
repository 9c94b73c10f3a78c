"""Measures convolutions before they are needed, or shows what was measured.

Without OpenMMLab's libraries, for kernels and the shape of their input:
    python -m mmslak.ops.tune --kernels 51x5 5x51 5x5 --shape 1 124 128 128
For the model of a config, which is `mmslak tune`:
    python -m mmslak.ops.tune configs/upernet_slak_t_ade20k.py --shape 16 3 512 512
What was measured on this machine, as a table for `mmslak/ops/tables`:
    python -m mmslak.ops.tune --export mmslak/ops/tables/MACHINE.json
"""

import argparse
import math
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mmslak.ops.choice import spent, tuning
from mmslak.ops.depthwise import depthwise_conv2d_branches
from mmslak.ops.plans import Plan, Store, cache_folder, facts, read_table, write_table


def show(folder: Path | None = None) -> str:
    """All choices that are kept, as text: the machine, then a line per case."""
    folder = folder or cache_folder()
    lines = []
    for path in sorted(folder.glob('*.json')):
        try:
            machine, plans = read_table(path)
        except (OSError, ValueError) as error:
            lines.append(f'{path} cannot be read: {error}')
            continue
        lines.append(f'{path}')
        lines += [f'  {name}: {value}' for name, value in machine.items()]
        lines += [f'    {key}: {_text(plan)}' for key, plan in sorted(plans.items())]
    return '\n'.join(lines) or f'nothing was measured yet: no choices in {folder}'


def _text(plan: Plan) -> str:
    if plan.plain:
        return "torch's convolution as it is"
    names = ('forward', 'input', 'weight')
    parts = [f'{name} {"+".join(part)}' for name, part in zip(names, plan[:3], strict=True) if part]
    return ', '.join(parts)


def summary() -> str:
    """What this process has measured, in a line."""
    cases, seconds = spent()
    return f'measured {cases} cases in {seconds:.0f} s; kept in {cache_folder()}'


def export(path: Path, device: torch.device) -> str:
    """Writes what was measured on this machine with this version; says what was written.

    Raises:
        ValueError: If there is nothing.
        OSError: If it cannot be written.
    """
    store = Store(facts(device, torch.get_num_threads()))
    if not store.plans:
        raise ValueError(f'nothing was measured on this machine with this version: no {store.path}')
    write_table(path, store.facts, store.plans)
    return f'{path}: {len(store.plans)} choices of {store.facts["device"]}'


def _kernel(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().replace('×', 'x').partition('x')
    size = int(rows), int(columns or rows)
    if min(size) < 1 or not (size[0] % 2 and size[1] % 2):
        raise ValueError(text)
    return size


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog='python -m mmslak.ops.tune',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', nargs='?', metavar='CONFIG', help='handed on to mmslak tune')
    parser.add_argument('--kernels', nargs='+', type=_kernel, metavar='HxW', help='odd sides')
    parser.add_argument('--shape', nargs=4, type=int, metavar=('N', 'C', 'H', 'W'))
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'])
    parser.add_argument('--nchw', action='store_true', help='in place of NHWC, which blocks have')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--show', action='store_true', help='print what was measured')
    parser.add_argument('--export', type=Path, metavar='FILE', help='write it as a table')
    args, _ = parser.parse_known_args(argv)
    if args.config:
        sys.argv[1:] = ['tune', *argv]
        runpy.run_module('mmslak', run_name='__main__', alter_sys=True)
    args = parser.parse_args(argv)
    if args.kernels and args.shape:
        dtype = getattr(torch, args.dtype)
        x = torch.zeros(args.shape, dtype=dtype, device=args.device)
        if not args.nchw:
            x = x.contiguous(memory_format=torch.channels_last)
        weights = [x.new_zeros(x.shape[1], 1, *kernel).requires_grad_() for kernel in args.kernels]
        with tuning('on', seconds=math.inf):
            depthwise_conv2d_branches(x.requires_grad_(), weights)
            with torch.no_grad():
                depthwise_conv2d_branches(x, weights)
        print(summary())
    elif not args.show and not args.export:
        parser.error('expected --kernels and --shape, a CONFIG, --show or --export')
    if args.export:
        try:
            print(export(args.export, torch.device(args.device)))
        except (OSError, ValueError) as error:
            parser.error(f'--export: {error}')
    if args.show:
        print(show())


if __name__ == '__main__':
    main()
