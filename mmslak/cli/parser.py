"""What commands share: parsers, `--cfg-options`, checks of outputs, and errors in one line."""

import argparse
import functools
import gc
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from mmslak.errors import Interrupted, UserError
from mmslak.fileio.per_machine import is_first_of_machine

# Beginnings of the libraries' warnings of which a user learns nothing to do.
NOISE = (
    '`reduce_zero_label` will be deprecated',  # in mmseg's own base configs
    'faster_coco_eval is not installed',  # a metric that no config of ours names
    'Default ``avg_non_ignore`` is False',  # the setting of mmseg's own configs
    'The draw is False, it means that the hook',  # as it is until --show-dir is given
)


def one_line_errors(main: Callable) -> Callable:
    """Makes a command's `main` print an error that the user can correct as one line; status 2.

    A run that a signal has stopped says where, with the signal's exit status (143, 130). What
    `main` returns is the exit status otherwise.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        status = 0
        for message in NOISE:
            warnings.filterwarnings('ignore', message)
        try:
            status = main(argv) or 0
        except ValueError as error:
            text = str(error) if isinstance(error, UserError) else _of_dataset(error)
            if text is None:
                raise
            if is_first_of_machine() or getattr(error, 'of_one_process', False):
                print(f'error: {" ".join(text.split())}', file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print('interrupted; run the command again to go on', file=sys.stderr)
            return 130
        except Interrupted as stop:
            if is_first_of_machine():
                print(f'stopped: {stop}', file=sys.stderr)
            status = stop.status
        torch = sys.modules.get('torch')  # a command that has not loaded it has no group
        if torch is not None and torch.distributed.is_initialized():
            # Left to the end of the process, gloo's threads can abort it. What holds the group,
            # such as DDP, has to go first.
            gc.collect()
            torch.distributed.destroy_process_group()
        return status

    return wrapper


def _of_dataset(error: ValueError) -> str | None:
    """What to say of an error that a dataset has raised; None of another one."""
    from mmslak.cli.config_checks import empty_dataset

    return empty_dataset(error)


def command_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser of `mmslak COMMAND`, whose description keeps its line breaks."""
    return argparse.ArgumentParser(
        prog=f'mmslak {command}',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the config that a command is about."""
    parser.add_argument('config', metavar='CONFIG', help='config file, or mmslak::NAME for ours')


def add_cfg_options(
    parser: argparse.ArgumentParser, example: str = 'model.backbone.width_factor=1.0'
) -> None:
    """Adds `--cfg-options`, which overrides settings of configs."""
    from mmslak.cli.options_action import OptionsAction  # takes seconds, for MMEngine

    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        default={},
        metavar='KEY=VALUE',
        help=f'settings of the config to override, for example {example}; '
        'lists as KEY="[a,b]" or KEY=a,b, tuples as KEY="(a,b)", '
        'elements of lists as param_scheduler.0.end=10',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what training and testing have in common, beside their files."""
    parser.add_argument('--work-dir', help='folder of logs and checkpoints [work_dirs/CONFIG]')
    add_cfg_options(parser, 'train_dataloader.batch_size=2 data_root=/data/ade')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how several processes were started (see tools/dist_train.sh)',
    )
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='switch pin_memory of the data loaders off'
    )
    parser.add_argument(
        '--no-persistent-workers', action='store_true', help='end the data workers every epoch'
    )
    # torch.distributed.launch passes one or the other, depending on its version.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def model_pairs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The pairs of CONFIG and CHECKPOINT of `args.models`, as many as there are `args.names`.

    If a word is left over, or there are more or fewer names, the command ends with its usage.
    """
    if len(args.models) % 2:
        parser.error('expected pairs of CONFIG and CHECKPOINT (none for random weights)')
    pairs = list(zip(args.models[::2], args.models[1::2]))
    if args.names and len(args.names) != len(pairs):
        parser.error(f'--names: expected {len(pairs)}, got {len(args.names)}')
    return pairs


def model_names(
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str] | None,
    as_shown: Callable[[str], str] = str,
) -> list[str]:
    """The names of models: those that are given, or what their files are called.

    Args:
        pairs: Configs and checkpoints.
        names: Of the command line.
        as_shown: What is made of a name; if two are the same in it, all names get numbers.
    """
    names = names or [
        f'{Path(config).stem}, {"random" if checkpoint == "none" else Path(checkpoint).stem}'
        for config, checkpoint in pairs
    ]
    if len(set(map(as_shown, names))) < len(names):
        names = [f'{i}: {name}' for i, name in enumerate(names, 1)]
    return list(names)


def check_output(path: Path, folder: bool = False, option: str = 'out') -> None:
    """Checks that an output can be written before the work for it begins.

    Args:
        path: Of the option. What is there already stays as it is; folders are made.
        folder: Whether it is a folder of outputs, not a file.
        option: Name of the option.

    Raises:
        UserError: If it cannot be.
    """
    parent = path if folder else path.parent
    try:
        if path.exists() and path.is_dir() != folder:
            kinds = ('a folder', 'a file') if folder else ('a file', 'a folder')
            raise UserError(f'--{option} {path}: {kinds[0]} is expected, this is {kinds[1]}')
        parent.mkdir(parents=True, exist_ok=True)
        with path.open('a') if path.is_file() else tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f'--{option} {path} cannot be written: {error.strerror}') from error


def pictures(folder: str | Path, count: int) -> list[Path]:
    """The first pictures of `--images FOLDER` and its folders.

    Raises:
        UserError: If there are none.
    """
    from mmslak.datasets.samples import PICTURE_SUFFIXES

    if not Path(folder).is_dir():
        raise UserError(f'--images {folder}: no such folder')
    files = sorted(p for p in Path(folder).rglob('*') if p.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise UserError(f'--images {folder}: no picture in it ({", ".join(PICTURE_SUFFIXES)})')
    return files[:count]
