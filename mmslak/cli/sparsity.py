"""Report on a sparse model: one HTML page with everything in it, to be opened in any browser.

Density of every layer, the patterns that large kernels have learnt, and churn and Rs over time from
the run's logs. Masks are those of the checkpoint; one without them (a published model) is read by
its zeros.

Examples:
    mmslak sparsity work_dirs/slak_t_imagenet
    mmslak sparsity checkpoints/slak_tiny_in1k.pth --out slak_tiny.html
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mmslak import sparsity
from mmslak.analysis.report import read_sparse_log, sparsity_report
from mmslak.checkpoints.files import read_checkpoint, read_state_dict
from mmslak.checkpoints.runs import newest_intact
from mmslak.cli.parser import check_output, command_parser, one_line_errors
from mmslak.errors import UserError


def find_checkpoint(source: Path) -> Path:
    """A file itself, or the newest checkpoint of a work folder.

    Raises:
        UserError: If there is none.
    """
    if not source.exists():
        raise UserError(f'{source}: no such checkpoint or work folder')
    if source.is_file():
        return source
    latest, _ = newest_intact(source)
    if latest is None:
        raise UserError(f'{source}: no checkpoint (.pth) in this folder')
    return latest


def read_masks(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Active weights by parameter name, and those that ever were where that is known.

    Raises:
        CheckpointError: If the file cannot be read.
        UserError: If its masks are damaged or it has no weights of two or four dimensions.
    """
    saved = read_checkpoint(path).get('sparse_training')
    if isinstance(saved, dict):
        try:
            masks = sparsity.Masks.dense(saved['masks']['shapes'])
            masks.load_state_dict(saved['masks'])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f'{path}: its masks cannot be read: {error}') from error
        return masks.active, masks.ever
    weights = {name: w for name, w in read_state_dict(path).items() if w.dim() in (2, 4)}
    if not weights:
        raise UserError(f'{path}: no weights of two or four dimensions in it')
    return sparsity.Masks.from_nonzeros(weights).active, None


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak sparsity`."""
    parser = command_parser('sparsity', __doc__)
    parser.add_argument(
        'source', type=Path, metavar='CHECKPOINT|WORK_DIR', help='what to report on'
    )
    parser.add_argument('--out', type=Path, help='page to write [sparsity.html beside it]')
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)

    path = find_checkpoint(args.source)
    out = args.out or path.parent / 'sparsity.html'
    check_output(out)
    masks, ever = read_masks(path)
    log = read_sparse_log(path.parent)
    active = sum(int(mask.count_nonzero()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    origin = 'its masks' if ever is not None else 'the zeros of its weights: it has no masks'
    notes = [f'From {path.name}, by {origin}. {len(log)} records of sparse training in its logs.']
    if active == total:
        notes.append('Nothing of it is zero: this is a dense model.')
    page = sparsity_report(f'Sparsity of {path.parent.name}/{path.name}', masks, ever, log, notes)
    out.write_text(page, encoding='utf-8')
    print(f'{len(masks)} tensors, {active:,} of {total:,} weights active ({active / total:.2%})')
    print(f'Report: {out}')
