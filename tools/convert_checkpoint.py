"""Writes the clean form of a SLaK checkpoint: our names, tensors alone, nothing to run.

Examples:
    python tools/convert_checkpoint.py SLaK_tiny_official.pth checkpoints/slak_tiny_in1k.pth
    python tools/convert_checkpoint.py --publish work_dirs/run/iter_160000.pth upernet_slak_t.pth
"""

import argparse
import sys

from mmslak.checkpoint import (
    CheckpointError,
    convert,
    count_parameters,
    publish,
    save_state_dict,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', metavar='IN', help='official file, or a checkpoint of any run')
    parser.add_argument('target', metavar='OUT', help='file to write: .pth or .safetensors')
    parser.add_argument('--use-ema', action='store_true', help='take the averaged weights')
    parser.add_argument(
        '--publish',
        action='store_true',
        help="write a run's weights as they are, of any model, without optimizer and masks",
    )
    args = parser.parse_args(argv)
    try:
        state = (publish if args.publish else convert)(args.source, args.use_ema)
        save_state_dict(state, args.target)
    except (CheckpointError, ValueError, OSError) as error:
        print(f'convert_checkpoint.py: {error}', file=sys.stderr)
        return 2
    dense, nonzero = count_parameters(state)
    print(f'{args.target}: {len(state)} tensors, {dense:,} parameters, {nonzero:,} non-zero')
    return 0


if __name__ == '__main__':
    sys.exit(main())
