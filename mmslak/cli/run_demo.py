"""The whole pipeline on real input, on a laptop's CPU: data, pretraining, UperNet, scores, picture.

A small SLaK learns single handwritten digits with dynamic sparsity, 40 % of its weights at zero;
UperNet then learns to find digits in photographs, once from that backbone with its zeros held and
once from scratch in the same number of steps. Everything is done by `mmslak train` and
`mmslak test` on the configs of configs/demo. Exit status 1 says that a score missed its bar, 2 that
a step failed or that the zeros were not held exactly.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image
from rich.console import Console

import mmslak
from mmslak.analysis.contact_sheet import contact_sheet
from mmslak.checkpoints.files import read_state_dict
from mmslak.cli.demo_page import Part, write_page
from mmslak.cli.env import is_clone
from mmslak.cli.parser import command_parser, one_line_errors
from mmslak.datasets import SEG_CLASSES, SEG_PALETTE, make_digit_scenes
from mmslak.ops.isolation import command_of
from mmslak.sparsity import target_nonzeros

DIGITS = 'mmslak::demo/slak_digits.py'
SCENES = 'mmslak::demo/upernet_slak_digit_scenes.py'
BARS = dict(accuracy=90.0, mIoU=60.0)  # percent, on held-out digits and photographs
BACKBONE = 'mmslak.SLaK'  # of the configs
SPARSITY = 0.4  # of the backbone's 2-D and 4-D weights, as configs/demo/slak_digits.py says

# glibc gives large buffers back to the system at once; kept, training on CPU takes half the time.
KEEP_BUFFERS = dict(MALLOC_MMAP_THRESHOLD_='4000000000', MALLOC_TRIM_THRESHOLD_='20000000000')

# What MMEngine logs: the phase, the epoch where it counts them, the iteration and the time left.
LOGGED = re.compile(r'(?:Epoch|Iter)\((\w+)\) +(?:\[(\d+)\])?\[ *(\d+)/(\d+)\].* eta: (\S+)')
LOSS = re.compile(r' loss: (\S+)')
PHASES = dict(train='training', val='validation', test='test')
SECONDS_BETWEEN_LINES = 20  # of progress, where stdout is no terminal

# A few steps on a few images: shows that everything runs, teaches nothing.
QUICK_DATA = dict(train=8, test=4, train_digits=50, test_digits=20, size=80)
QUICK_DIGITS = [
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.interval=1',
    'custom_hooks.0.update_interval=1',
]
QUICK_SCENES = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.checkpoint.interval=2',
]


class DemoError(Exception):
    """A step failed; the message says which and where its log is."""


def digest(*parts: str | bytes) -> str:
    """SHA-256 over the parts."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return sha.hexdigest()


def sources() -> str:
    """Digest of the code that a score depends on."""
    files = sorted(Path(mmslak.__file__).parent.rglob('*.py'))
    return digest(*(path.read_bytes() for path in files))


def progress(line: str, epochs: int = 1) -> str | None:
    """How far a run is.

    Args:
        line: Of its log.
        epochs: How many it trains for, if its log counts iterations by the epoch.

    Returns:
        Iteration of total, loss and time left; None if the line does not tell.
    """
    logged, loss = LOGGED.search(line), LOSS.search(line)
    if logged is None:
        return None
    phase, epoch, step, steps = logged[1], logged[2], int(logged[3]), int(logged[4])
    if phase == 'train' and epoch:
        step, steps = step + (int(epoch) - 1) * steps, steps * epochs
    loss = f', loss {loss[1]}' if loss else ''
    return f'{PHASES[phase]}: iteration {step} of {steps}{loss}, {logged[5]} left'


def call(command: str, arguments: list[str], log: Path, epochs: int = 1) -> str:
    """Runs a command of mmslak, shows its progress and keeps its output in `log`.

    The progress is one line that is rewritten on a terminal, and a line now and then elsewhere.

    Raises:
        DemoError: If it fails; the end of its output is shown first.
    """
    console, shown = Console(), time.monotonic()
    with (
        log.open('w', buffering=1, encoding='utf-8') as file,
        console.status(f'{command}: starting') as status,
        subprocess.Popen(
            command_of('mmslak', command, *arguments),
            env={**KEEP_BUFFERS, **os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding='utf-8',
            errors='replace',
        ) as process,
    ):
        try:
            for line in process.stdout:
                file.write(line)
                text = progress(line, epochs)
                if text is None:
                    continue
                status.update(text)
                if not console.is_terminal and time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
                    print(f'  {text}', flush=True)
                    shown = time.monotonic()
        except BaseException:  # Ctrl-C above all
            process.kill()
            raise
    output = log.read_text(encoding='utf-8')
    if process.returncode:
        print(*output.splitlines()[-20:], sep='\n', file=sys.stderr)
        raise DemoError(f'mmslak {command} failed; its whole output is in {log}')
    return output


def train_and_test(
    config: str, folder: Path, options: list[str], metrics: Sequence[str], stamp: str
) -> tuple[Path, list[float]]:
    """Trains a config and tests the result, or takes both from an earlier, identical run.

    Args:
        config: Config file.
        folder: Where checkpoint, logs and predictions go.
        options: For `--cfg-options`.
        metrics: Names of scores that `mmslak test` prints.
        stamp: Digest of what the result depends on beside config and options.

    Returns:
        The checkpoint, and the scores as `mmslak test` prints them.
    """
    done = folder / 'done.json'
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(dict(option.split('=', 1) for option in options))
    stamp = digest(cfg.pretty_text, *metrics, stamp)
    if done.is_file():
        result = json.loads(done.read_text())
        if result['stamp'] == stamp and Path(result['checkpoint']).is_file():
            print(f'  done before: {described(metrics, result["scores"])} ({folder})')
            return Path(result['checkpoint']), result['scores']
        done.unlink()

    folder.mkdir(parents=True, exist_ok=True)
    print(f'  training; log: {folder / "train.log"}', flush=True)
    start = time.perf_counter()
    common = ['--work-dir', str(folder), '--cfg-options', *options]
    # What is tested afterwards needs no validation.
    call(
        'train',
        [config, '--no-validate', *common],
        folder / 'train.log',
        int(cfg.train_cfg.get('max_epochs', 1)),
    )
    checkpoint = Path((folder / 'last_checkpoint').read_text().strip())

    suffix = '' if 'mIoU' in metrics else '.pkl'  # label images of a segmentor go to a folder
    out = ['--out', str(folder / f'predictions{suffix}')]
    output = call('test', [config, str(checkpoint), *out, *common], folder / 'test.log')
    scores = [
        float(re.findall(rf'^{re.escape(metric)}: (\S+)$', output, re.MULTILINE)[-1])
        for metric in metrics
    ]
    seconds = time.perf_counter() - start
    print(f'  {described(metrics, scores)} after {seconds:.0f} s', flush=True)
    result = dict(stamp=stamp, checkpoint=str(checkpoint), scores=scores)
    done.write_text(json.dumps(result) + '\n')
    return checkpoint, scores


def described(metrics: Sequence[str], scores: Sequence[float]) -> str:
    """Scores with their names; 3 digits, for percents as well as for fractions of one."""
    return ', '.join(f'{metric} {score:.3g}' for metric, score in zip(metrics, scores, strict=True))


def check_zeros(checkpoint: Path) -> str:
    """Says how many of the backbone's weights are zero in a segmentor's or detector's checkpoint.

    Raises:
        DemoError: If it is not the pre-training's share to the weight.
    """
    weights = {
        name: tensor
        for name, tensor in read_state_dict(checkpoint).items()
        if name.startswith('backbone.') and tensor.dim() in (2, 4)
    }
    nonzero = sum(int(tensor.count_nonzero()) for tensor in weights.values())
    total = sum(tensor.numel() for tensor in weights.values())
    wanted = target_nonzeros({name: tensor.shape for name, tensor in weights.items()}, SPARSITY)
    if nonzero != wanted:
        raise DemoError(
            f'{checkpoint}: {nonzero:,} of {total:,} weights are not zero, not {wanted:,}'
        )
    return f'{total - nonzero:,} of {total:,} weights are zero, as after pre-training'


def draw(ade: Path, predictions: dict[str, Path], picture: Path, scenes: int = 4) -> None:
    """Draws test scenes, one per row: the image, the truth and each prediction.

    Args:
        ade: The ADE20K tree of the digit scenes.
        predictions: Folder of label images by title.
        picture: PNG file to write.
        scenes: Number of rows.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    palette = np.array(SEG_PALETTE, dtype=np.uint8)
    folders = dict(truth=ade / 'annotations/validation', **predictions)
    names = [path.stem for path in sorted((ade / 'images/validation').iterdir())[:scenes]]
    figure, axes = plt.subplots(
        len(names), 1 + len(folders), squeeze=False, figsize=(3 + 3 * len(folders), 3 * len(names))
    )
    for row, name in zip(axes, names, strict=True):
        row[0].imshow(Image.open(ade / f'images/validation/{name}.jpg'))
        for axis, folder in zip(row[1:], folders.values(), strict=True):
            # Label images count from 1; 0 is 'unlabelled', here as in ADE20K.
            axis.imshow(palette[np.asarray(Image.open(folder / f'{name}.png')).astype(int) - 1])
        for axis in row:
            axis.set_axis_off()
    for axis, title in zip(axes[0], ['image', *folders], strict=True):
        axis.set_title(title)
    patches = [
        Patch(color=np.array(color) / 255, label=label)
        for label, color in zip(SEG_CLASSES, SEG_PALETTE, strict=True)
    ]
    figure.legend(handles=patches, ncols=len(patches), loc='lower center')
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(picture, dpi=80)
    plt.close(figure)


def draw_digits(args: argparse.Namespace, checkpoint: Path) -> Path:
    """Draws held-out digits, three of each, under what the classifier takes them for.

    Returns:
        The picture.
    """
    picture, found = args.work_dir / 'digits.png', args.work_dir / 'digits'
    if is_newer(picture, checkpoint):
        return picture
    digits = sorted((args.data / 'cls/val').iterdir())
    files = [str(path) for digit in digits for path in sorted(digit.iterdir())[:3]]
    changes = ['--cfg-options', *options(args, 'cls', [])]
    call(
        'demo',
        [*files, DIGITS, str(checkpoint), '--out', str(found), *changes],
        args.work_dir / 'digits.log',
    )
    cells = [
        ('{name} ({score:.0%})'.format(**entry['classes'][0]), Path(entry['input']))
        for entry in json.loads((found / 'predictions.json').read_text())
    ]
    contact_sheet({'Held-out digits': cells}).save(picture)
    return picture


def look(
    args: argparse.Namespace, scenes: list[str], pretrained: Path, segmentor: Path
) -> tuple[Path, Path]:
    """Draws the trained backbone's receptive field beside the untrained one's; reports on zeros.

    Returns:
        The picture and the report.
    """
    erf, report = args.work_dir / 'erf', args.work_dir / 'sparsity.html'
    pair = [SCENES, str(segmentor), SCENES, 'none', '--names', 'trained', 'untrained']
    pictures = ['--images', str(args.data / 'ade/images/validation'), '--count', '16']
    size = ['--size', '80', '80'] if args.quick else ['--size', '160', '160']
    out = ['--out', str(erf), '--cfg-options', *scenes]
    if not is_newer(erf / 'erf.png', segmentor):
        call('erf', [*pair, *pictures, *size, *out], args.work_dir / 'erf.log')
    if not is_newer(report, pretrained):
        call('sparsity', [str(pretrained), '--out', str(report)], args.work_dir / 'sparsity.log')
    return erf / 'erf.png', report


def is_newer(file: Path, source: Path) -> bool:
    """Whether a file is there and was written after what it was made from."""
    return file.is_file() and file.stat().st_mtime >= source.stat().st_mtime


def options(args: argparse.Namespace, tree: str, quick: Sequence[str]) -> list[str]:
    """`--cfg-options` of every run: where its data are, the seed, and what a quick run shortens."""
    common = [f'data_root={args.data / tree}', f'randomness.seed={args.seed}']
    if args.backbone != BACKBONE:
        common.append(f'model.backbone.type={args.backbone}')
    return [*common, *(quick if args.quick else [])]


def go_on(args: argparse.Namespace, *words: str) -> list[str]:
    """A command about a model of the demo, for the page."""
    other = args.backbone != BACKBONE
    options = ['--cfg-options', f'model.backbone.type={args.backbone}'] if other else []
    return ['mmslak', *words, *options]


def pretrain(args: argparse.Namespace, steps: int) -> tuple[Path, float, str]:
    """Makes the data and trains the backbone that all demos start from: their steps 1 and 2.

    Args:
        args: Of the command line.
        steps: How many the demo has in all.

    Returns:
        The classifier's checkpoint, its accuracy in percent on held-out digits, and a digest of the
        code and the data.
    """
    print(f'Step 1 of {steps}: digit scenes in {args.data} (about 10 s)', flush=True)
    written = make_digit_scenes(args.data, seed=args.seed, **(QUICK_DATA if args.quick else {}))
    print('  written' if written else '  done before')
    stamp = digest(sources(), (args.data / 'digit_scenes.json').read_text())

    print(
        f'Step 2 of {steps}: a small {args.backbone} learns single digits, 40 % zeros '
        '(1.5 to 4.5 minutes)',
        flush=True,
    )
    checkpoint, (accuracy,) = train_and_test(
        DIGITS,
        args.work_dir / 'slak_digits',
        options(args, 'cls', QUICK_DIGITS),
        ['accuracy/top1'],
        stamp,
    )
    return checkpoint, accuracy, stamp


def run(args: argparse.Namespace) -> dict[str, float]:
    """Runs all steps and returns the scores in percent."""
    checkpoint, accuracy, stamp = pretrain(args, steps=5)
    digits = draw_digits(args, checkpoint)
    print(f'  first picture: {digits}')

    print('Step 3 of 5: UperNet on scenes, from that backbone (1.5 to 4.5 minutes)', flush=True)
    scenes = options(args, 'ade', QUICK_SCENES)
    with_pretraining = args.work_dir / 'upernet_pretrained'
    segmentor, (miou,) = train_and_test(
        SCENES,
        with_pretraining,
        [*scenes, f'checkpoint={checkpoint}'],
        ['mIoU'],
        digest(stamp, checkpoint.read_bytes()),
    )
    name, picture = args.backbone.rpartition('.')[2], args.work_dir / 'digit_scenes.png'
    predictions = {f'UperNet, sparse pretrained {name}': with_pretraining / 'predictions'}
    draw(args.data / 'ade', predictions, picture)
    print(f'  picture of the scenes: {picture}')

    print('Step 4 of 5: the same from scratch (1.5 to 4.5 minutes)', flush=True)
    from_scratch = args.work_dir / 'upernet_from_scratch'
    dense, (scratch,) = train_and_test(
        SCENES, from_scratch, [*scenes, 'model.backbone.init_cfg=None'], ['mIoU'], stamp
    )

    print('Step 5 of 5: zeros, pictures, receptive field and report (about 30 s)', flush=True)
    zeros = check_zeros(segmentor)
    predictions[f'UperNet, {name} from scratch'] = from_scratch / 'predictions'
    draw(args.data / 'ade', predictions, picture)
    fields, report = look(args, scenes, checkpoint, segmentor)

    model = [SCENES, str(segmentor)]
    inputs, overlays = args.data / 'ade/images/validation', args.work_dir / 'overlays'
    part = Part(
        title=f'Segmentation: UperNet with a small {name}',
        scores=[
            ('accuracy on held-out digits, %', accuracy, BARS['accuracy']),
            ('mIoU on held-out scenes, from that backbone, %', miou, BARS['mIoU']),
            ('mIoU from scratch in the same number of steps, %', scratch, None),
        ],
        notes=[f'Backbone: {zeros} ({SPARSITY:.0%}).'],
        pictures={
            'Held-out digits, and what the backbone takes them for': digits,
            'Held-out scenes: image, truth and predictions': picture,
            'Effective receptive field of the backbone, trained and untrained': fields,
        },
        files={
            'Report on the zeros': report,
            'Checkpoint of the pre-trained backbone': checkpoint,
            'Checkpoint of the segmentor': segmentor,
            'Checkpoint of the segmentor from scratch': dense,
        },
        commands=[
            go_on(args, 'demo', str(inputs), *model, '--out', str(overlays)),
            go_on(args, 'complexity', *model),
            go_on(args, 'export', *model, '--to', 'torchscript'),
            ['make', 'demo-detection'] if is_clone() else ['mmslak', 'run-demo-detection'],
        ],
        judged=not args.quick,
    )
    page = write_page(args.work_dir, 'segmentation', part)

    print(f'\nHeld-out digits: accuracy {accuracy:.1f} % (bar: {BARS["accuracy"]:.0f})')
    print(f'Held-out scenes: mIoU {miou:.1f} % with pretraining (bar: {BARS["mIoU"]:.0f}),')
    print(f'                 mIoU {scratch:.1f} % from scratch in the same number of steps')
    print(f'Backbone:        {zeros} ({SPARSITY:.0%})')
    print(f'Results:         {page}')
    return dict(accuracy=accuracy, mIoU=miou)


def demo_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The arguments of a demo."""
    parser = command_parser(command, description)
    parser.add_argument(
        '--data', type=Path, help='folder of the digit scenes (default: data/digit_scenes)'
    )
    parser.add_argument('--work-dir', type=Path, help='folder of results (default: work_dirs/demo)')
    parser.add_argument('--seed', type=int, default=0, help='of data and training')
    parser.add_argument(
        '--backbone',
        default=BACKBONE,
        help="type of the backbone; it takes SLaK's arguments (default: %(default)s)",
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='a few steps on a few images, to see that everything runs; scores are not judged',
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments' values, with folders that keep the variants of a demo apart."""
    args = parser.parse_args(argv)
    variant = '_quick' if args.quick else ''
    variant += f'_seed{args.seed}' if args.seed else ''
    args.data = (args.data or Path(f'data/digit_scenes{variant}')).resolve()
    if args.backbone != BACKBONE:
        variant += f'_{args.backbone.rpartition(".")[2].lower()}'
    args.work_dir = (args.work_dir or Path(f'work_dirs/demo{variant}')).resolve()
    return args


def judge(
    run: Callable[[argparse.Namespace], dict[str, float]],
    args: argparse.Namespace,
    bars: dict[str, float],
) -> int:
    """Runs a demo and says whether its scores reach their bars.

    Returns:
        Exit status: 0 for yes or a quick run, 1 for no, 2 if a step failed, 130 after Ctrl-C.
    """
    settings = ' '.join(f'{k}={v}' for k, v in KEEP_BUFFERS.items())
    print(f'For speed the processes of this demo run with {settings}')
    try:
        scores = run(args)
    except (DemoError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('stopped; run the command again, finished steps are kept', file=sys.stderr)
        return 130  # as a shell says of SIGINT
    missed = [name for name, bar in bars.items() if scores[name] < bar]
    if missed and not args.quick:
        print(f'error: below the bar: {", ".join(missed)}', file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mmslak run-demo`."""
    return demo_parser('run-demo', __doc__)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(build_parser(), argv)
    print(f'mmslak {mmslak.__version__} demo, 5 to 15 minutes on two CPU cores the first time.')
    return judge(run, args, BARS)
