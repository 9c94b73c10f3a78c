"""What zeros, kernel sizes, widths and a teacher do: digits and digit scenes, five seeds each.

Examples, on a laptop's CPU:
    python benchmarks/claims.py --jobs 2 --half --settings --seeds 10 11 12 --out
    python benchmarks/claims.py --jobs 2 --half --variants zeros --out
    python benchmarks/claims.py --jobs 2 --half --resume --out   # the others; then all in one file

--out writes benchmarks/results/MACHINE/claims_cpu.json. A small SLaK learns single digits (accuracy
on held-out ones); UperNet then learns scenes from it (mIoU on held-out ones). The data are the same
for all seeds; a seed changes the initial weights, the order of the data and the masks. Variants are
compared in pairs of the same seed (QUESTIONS), and every seed that was begun is reported. What five
seeds on digits show need not hold elsewhere.

Settings, all written down before the first run:
- Data, steps, learning rates, losses and 40 % of zeros are for every variant those of configs/demo
  (`mmslak run-demo`), for 'single weights', so that a variant that would want other settings does
  not get them. When the demo was made, they were chosen by scores on the same held-out digits and
  photographs.
- Learning rates are those that --settings chooses, which never sees a held-out picture: it trains
  'single weights' on four of five training pictures with half, once and twice the demo's rates, and
  scores it on the fifth. The demo's rates stay unless others have a better mIoU by more than the
  standard error of the mean difference. Of several, the best counts. (This rule was written down
  before --settings ran for the first time. It has kept the demo's rates, 2e-3 in both trainings.)
- Kernels (decomposed: K×5 + 5×K + 5×5; square: K×K + 5×5): K in every stage, but at most twice the
  side of its map less one, beyond which a kernel reaches no position. SLaK's last stage is so: 13
  on maps of 7. In scenes of 160 pixels that is 79, 39, 19 and 9. Single digits have 64 pixels,
  where 31 and 51 reach the same. All other variants have the demo's kernels, 13, 9, 7 and 5, with
  3×3.
- Width: SLaK's factor, 1.3, which gives 41, 83, 166 and 332 channels in place of 32, 64, 128, 256.
- Receptive field: of the backbone of the trained UperNet, by `mmslak erf` on the first 10 held-out
  scenes at 512×512; area of the square that holds 20, 30, 50 and 99 % of it, in percent of the
  picture.
- Teacher: 'single weights' of the same seed teaches a UperNet with ConvNeXt's 7×7 kernels, from
  scratch (configs/demo/upernet_l2s_digit_scenes.py). The student without a teacher is the same with
  a weight of 0. --half leaves students their 400 steps, as they have no other training.

It can be stopped and called again: what is done is kept in the work folder, by variant and seed.
--resume takes also what an earlier state of the package has done with the same settings, and what
the file of --out holds of it; the result then names the states. A last call with all seeds puts
together what several calls have done.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeVar

from mmengine.config import Config
from seeds import compare, summary
from timing import RESULTS, environment, machine, save

from mmslak.checkpoints.files import count_parameters, read_state_dict
from mmslak.cli.run_demo import (
    DIGITS,
    KEEP_BUFFERS,
    QUICK_DATA,
    QUICK_DIGITS,
    QUICK_SCENES,
    SCENES,
    call,
    digest,
    sources,
    train_and_test,
)
from mmslak.cli.run_demo_compact import (
    NEURON_DIGITS,
    QUICK_NEURON_DIGITS,
    take_out,
    widths_option,
)
from mmslak.datasets import make_digit_scenes
from mmslak.fileio.atomic import write_atomically

HOOK = 'custom_hooks.0'
# Half the steps of the demos, with as many updates of the masks.
HALF_DIGITS = [
    'train_cfg.max_epochs=6',
    'param_scheduler.1.end=6',
    'default_hooks.checkpoint.interval=6',
    f'{HOOK}.update_interval=50',
]
HALF_SCENES = [
    'train_cfg.max_iters=200',
    'param_scheduler.1.end=200',
    'default_hooks.checkpoint.interval=200',
]
BASELINE = 'single weights'
L2S = 'mmslak::demo/upernet_l2s_digit_scenes.py'
DONE = 'scores.json'  # file of a variant and a seed in the work folder
LAST = 'scenes/last_checkpoint'  # file that names UperNet's
KERNELS = (7, 15, 31, 51)
REACH = (79, 39, 19, 9)  # twice the sides of the maps of a scene, less one
FORMS = ('decomposed', 'square')

T = TypeVar('T')


@dataclass(frozen=True)
class Variant:
    """One kind of model.

    Attributes:
        config: Of the classifier, or of the student.
        options: Changes of it.
        scenes: Whether UperNet is trained from the classifier.
        compact: Whether hidden units are taken out before.
        backbone: Options of the backbone, of classifier and UperNet.
        field: Whether the receptive field of UperNet's backbone is measured.
        teacher: Whose UperNet of the same seed teaches.
        segmentor: Options of UperNet alone.
    """

    config: str = DIGITS
    options: tuple[str, ...] = ()
    scenes: bool = False
    compact: bool = False
    backbone: tuple[str, ...] = ()
    field: bool = False
    teacher: str = ''
    segmentor: tuple[str, ...] = ()


def with_kernels(size: int, form: str) -> Variant:
    """The demo's model with other large kernels."""
    sizes = [min(size, reach) for reach in REACH]
    options = (
        f'model.backbone.kernel_sizes={sizes}'.replace(' ', ''),
        'model.backbone.small_kernel=5',
        f'model.backbone.decomposed={form == "decomposed"}',
    )
    return Variant(scenes=True, backbone=options, field=True)


def with_rate(rate: float) -> Variant:
    """The demo's model with another learning rate in both trainings."""
    options = (f'optim_wrapper.optimizer.lr={rate}',)
    return Variant(scenes=True, options=options, segmentor=options)


DENSE = (f'{HOOK}.sparsity=0', f'{HOOK}.init=uniform')
WIDE = ('model.backbone.width_factor=1.3', 'model.head.in_channels=332')
ZEROS = {
    'dense': Variant(options=DENSE, scenes=True),
    BASELINE: Variant(scenes=True),
    'single weights, static': Variant(options=(f'{HOOK}.update_interval=0',)),
    'hidden units': Variant(NEURON_DIGITS, scenes=True, compact=True),
    'hidden units, moving': Variant(NEURON_DIGITS, (f'{HOOK}.structure.moving=True',)),
    '2:4': Variant(options=(f'{HOOK}.structure.type=n:m',)),
}
WIDTHS = {
    'single weights, wide': Variant(options=WIDE),
    'dense, wide': Variant(options=(*DENSE, *WIDE)),
}
STUDENTS = {
    'student': Variant(L2S, ('model.loss.weight=0.0',), teacher=BASELINE),
    'distilled student': Variant(L2S, teacher=BASELINE),
}
SIZES = {f'{form} {size}': with_kernels(size, form) for size in KERNELS for form in FORMS}
DEMO = "the demo's rates"
RATES = {'half of them': with_rate(1e-3), DEMO: with_rate(2e-3), 'twice of them': with_rate(4e-3)}
# For --variants; a seed's variants are trained in this order.
GROUPS = dict(zeros=ZEROS, width=WIDTHS, distillation=STUDENTS, kernels=SIZES)
VARIANTS = {name: variant for group in GROUPS.values() for name, variant in group.items()}
KNOWN = VARIANTS | RATES
# The pairs that answer a question: a variant, and what it is compared with.
QUESTIONS = {
    'zeros': [(name, BASELINE) for name in ZEROS if name != BASELINE],
    'width': [('single weights, wide', other) for other in ('dense', 'dense, wide')],
    'distillation': [('distilled student', 'student')],
    'kernel size': [(f'{form} {size}', f'{form} 7') for form in FORMS for size in KERNELS[1:]],
    'kernel form': [(f'decomposed {size}', f'square {size}') for size in KERNELS],
}
OF_SETTINGS = {'settings': [(name, DEMO) for name in RATES if name != DEMO]}


def place(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Folder of a variant with a seed."""
    return args.work_dir / f'{name.replace(", ", "_").replace(" ", "_").replace(":", "_")}_{seed}'


def settings_of(
    name: str, seed: int, args: argparse.Namespace, data: str, texts: Mapping[str, str]
) -> str:
    """Digest of all that a run is told: configs, their changes, seed, length and data."""
    variant = KNOWN[name]
    first, added = astuple(variant)[:4], astuple(variant)[4:]
    # What came later counts where it is given: results of before stay valid.
    own = repr(((*first, *filter(None, added)), seed, args.half, args.quick))
    configs = [variant.config, SCENES]
    if variant.teacher:
        configs.append(KNOWN[variant.teacher].config)
    return digest(*(texts[config] for config in configs), own, data)


def train(name: str, seed: int, args: argparse.Namespace, data: str, settings: str) -> dict:
    """Trains a variant with a seed.

    Args:
        name: Of the variant.
        seed: Of weights, order and masks.
        args: Of the command line.
        data: Digest of the data.
        settings: Digest of the settings.

    Returns:
        scores in percent, settings, a digest of the state of the package that they were measured
        with (code), and how many seconds it took.
    """
    folder = place(args, name, seed)
    code = sources()
    start = time.perf_counter()
    scores = (_teach if KNOWN[name].teacher else _train)(name, seed, args, digest(code, data))
    seconds = time.perf_counter() - start
    result = dict(scores=scores, settings=settings, code=code, seconds=round(seconds))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / DONE, (json.dumps(result) + '\n').encode())
    return result


def _train(name: str, seed: int, args: argparse.Namespace, stamp: str) -> dict[str, float]:
    variant, folder = KNOWN[name], place(args, name, seed)
    common = [f'randomness.seed={seed}', f'{HOOK}.seed={seed}']
    digits, scenes = (HALF_DIGITS, HALF_SCENES) if args.half else ([], [])
    if args.quick:
        digits = QUICK_NEURON_DIGITS if variant.config == NEURON_DIGITS else QUICK_DIGITS
        scenes = QUICK_SCENES
    options = [f'data_root={args.data / "cls"}', *common, *digits]
    options += [*variant.backbone, *variant.options]
    checkpoint, (accuracy,) = train_and_test(
        variant.config, folder / 'digits', options, ['accuracy/top1'], stamp
    )
    scores = {'accuracy': accuracy}
    if not variant.scenes:
        return scores
    options = [f'data_root={args.data / "ade"}', common[0], *scenes, *variant.backbone]
    options += variant.segmentor
    if variant.compact:
        small = folder / 'compact.pth'
        options.append(widths_option(take_out(checkpoint, small, folder / 'compact.log')))
        checkpoint = small
    options.append(f'checkpoint={checkpoint}')
    stamp = digest(stamp, checkpoint.read_bytes())
    segmentor, (miou,) = train_and_test(SCENES, folder / 'scenes', options, ['mIoU'], stamp)
    scores['mIoU'] = miou
    if variant.field:
        scores |= areas(segmentor, variant, folder, args)
    return scores


def _teach(name: str, seed: int, args: argparse.Namespace, stamp: str) -> dict[str, float]:
    variant = KNOWN[name]
    teacher = Path((place(args, variant.teacher, seed) / LAST).read_text().strip())
    options = [f'data_root={args.data / "ade"}', f'randomness.seed={seed}']
    options += [f'teacher_checkpoint={teacher}', *variant.options]
    options += QUICK_SCENES if args.quick else []
    stamp = digest(stamp, teacher.read_bytes())
    folder = place(args, name, seed) / 'scenes'
    _, (miou,) = train_and_test(variant.config, folder, options, ['mIoU'], stamp)
    return {'mIoU': miou}


def areas(
    segmentor: Path, variant: Variant, folder: Path, args: argparse.Namespace
) -> dict[str, float]:
    """Areas that hold shares of the receptive field, in percent of the picture."""
    count, side = (1, 64) if args.quick else (10, 512)
    words = ['--images', args.data / 'ade/images/validation', '--count', count]
    words += ['--size', side, side, '--out', folder / 'erf', '--cfg-options', *variant.backbone]
    call('erf', [SCENES, str(segmentor), *map(str, words)], folder / 'erf.log')
    (found,) = json.loads((folder / 'erf/erf.json').read_text()).values()
    return {f'area {share}': 100 * ratio for share, ratio in found['area_ratios'].items()}


def make_development(data: Path, folder: Path) -> None:
    """Makes a tree of the training pictures alone: every fifth one is for scores.

    Args:
        data: Tree of `make_digit_scenes`.
        folder: Of the new tree.
    """
    groups = [
        (sorted(one.iterdir()), 'cls/{}/' + one.name, ('train', 'val'))
        for one in sorted((data / 'cls/train').iterdir())
    ]
    groups += [
        (sorted((data / kind / 'training').iterdir()), kind + '/{}', ('training', 'validation'))
        for kind in ('ade/images', 'ade/annotations')
    ]
    shutil.rmtree(folder, ignore_errors=True)
    for files, place_of, parts in groups:
        for i, file in enumerate(files):
            target = folder / place_of.format(parts[i % 5 == 4])
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)


def chosen_rates(scores: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Name of the learning rates that the rule at the top of this file chooses."""
    best, most = DEMO, 0.0
    for name, by_seed in scores.items():
        seeds = by_seed.keys() & scores[DEMO].keys()
        if name == DEMO or len(seeds) < 2:
            continue
        differences = [by_seed[seed]['mIoU'] - scores[DEMO][seed]['mIoU'] for seed in seeds]
        mean = statistics.mean(differences)
        if mean > statistics.stdev(differences) / len(seeds) ** 0.5 and mean > most:
            best, most = name, mean
    return best


def earlier(
    settings: Mapping[tuple[str, int], str], args: argparse.Namespace, out: Path | None
) -> dict[tuple[str, int], dict]:
    """Runs with these settings that the file of --out or the work folder holds.

    Args:
        settings: Digests by variant and seed.
        args: Of the command line.
        out: File of --out.

    Returns:
        By variant and seed what `train` returns, and nonzeros where the file has them.
    """
    result = json.loads(out.read_text()) if out is not None and out.is_file() else {}
    found = {}
    for (name, seed), wanted in settings.items():
        done, runs = place(args, name, seed) / DONE, []
        if done.is_file():
            runs.append(json.loads(done.read_text()))
        run, scores, count = (
            result.get(part, {}).get(name, {}).get(str(seed))
            for part in ('runs', 'scores', 'nonzeros')
        )
        if run:
            runs.append(run | dict(scores=scores, nonzeros=count))
        for run in runs:
            if run['settings'] == wanted:
                found[name, seed] = run
    return found


def nonzeros(folder: Path) -> int | None:
    """Non-zero parameters of a classifier's backbone; None if there is none any more."""
    last = folder / 'digits/last_checkpoint'
    if not last.is_file():
        return None
    state = read_state_dict(last.read_text().strip())
    return count_parameters({k: v for k, v in state.items() if k.startswith('backbone.')})[1]


def seconds_left(
    known: Mapping[str, Sequence[float]], waiting: Sequence[str], jobs: int
) -> float | None:
    """How long runs will take, if each takes as long as others of its variant, or of any.

    Args:
        known: Seconds of runs by variant.
        waiting: Variants of the runs that have not ended.
        jobs: How many run at once.
    """
    of_any = [one for several in known.values() for one in several]
    if not of_any:
        return None
    return sum(statistics.mean(known.get(name) or of_any) for name in waiting) / jobs


def results(
    names: Sequence[str],
    args: argparse.Namespace,
    data: str,
    settings: Mapping[tuple[str, int], str],
    known: Mapping[tuple[str, int], dict],
) -> Iterator[tuple[str, int, dict, list[str]]]:
    """Trains all variants with all seeds, `args.jobs` at once.

    Args:
        names: Of variants.
        args: Of the command line.
        data: Digest of the data.
        settings: Digests by variant and seed.
        known: Runs that need not be done.

    Yields:
        As each run ends its variant, its seed, what `train` returns, and the variants of the runs
        that have not ended.
    """
    for (name, seed), run in known.items():
        yield name, seed, run, []
    runs: dict[tuple[str, int], Future] = {}

    def run(name: str, seed: int) -> dict:
        teacher = KNOWN[name].teacher, seed
        if teacher in runs:  # was begun before
            runs[teacher].result()
        return train(name, seed, args, data, settings[name, seed])

    with ThreadPoolExecutor(args.jobs) as pool:
        # Seed by seed, so that all variants have as many whenever it is stopped.
        for key in ((name, seed) for seed in args.seeds for name in names):
            if key not in known:
                runs[key] = pool.submit(run, *key)
        waiting = {future: key for key, future in runs.items()}
        try:
            for future in as_completed(runs.values()):
                name, seed = waiting.pop(future)
                yield name, seed, future.result(), [name for name, _ in waiting.values()]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def ordered(by_variant: Mapping[str, Mapping[int, T]]) -> dict[str, dict[int, T]]:
    """The same in the order of KNOWN and of seeds."""
    names = [name for name in KNOWN if name in by_variant]
    return {name: dict(sorted(by_variant[name].items())) for name in names}


def chosen(names: Sequence[str]) -> list[str]:
    """Variants of names of variants and groups, in the order of VARIANTS."""
    groups = [GROUPS[name] for name in names if name in GROUPS]
    return [name for name in VARIANTS if name in names or any(name in group for group in groups)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4], help='which [%(default)s]'
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--variants',
        nargs='+',
        choices=[*GROUPS, *VARIANTS],
        default=list(GROUPS),
        metavar='NAME',
        help=f'of variants or groups: {", ".join(GROUPS)} [all]; variants: {", ".join(VARIANTS)}',
    )
    which.add_argument(
        '--settings', action='store_true', help='choose the learning rates, on training pictures'
    )
    parser.add_argument('--data', type=Path, default=Path('data/digit_scenes'))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/claims'))
    parser.add_argument('--half', action='store_true', help='half of the steps, for slow machines')
    parser.add_argument('--quick', action='store_true', help='a few steps, to try the script')
    parser.add_argument(
        '--jobs', type=int, default=1, help='runs at once, which share the cores [%(default)s]'
    )
    parser.add_argument(
        '--resume', action='store_true', help='take also what an earlier state of the package did'
    )
    parser.add_argument(
        '--out', nargs='?', const='', metavar='FILE', help='JSON file to write [of this machine]'
    )
    args = parser.parse_args(argv)
    args.data, args.work_dir = args.data.resolve(), args.work_dir.resolve()
    kind = 'claims_settings' if args.settings else 'claims'
    of_machine = RESULTS / machine('cpu') / f'{kind}_cpu.json'
    out = None if args.out is None else Path(args.out or of_machine)

    make_digit_scenes(args.data, seed=0, **(QUICK_DATA if args.quick else {}))
    data = digest((args.data / 'digit_scenes.json').read_text(), *['settings'] * args.settings)
    if args.settings:
        whole, args.data = args.data, args.data.with_name(f'{args.data.name}_development')
        make_development(whole, args.data)
    # Read before there are threads, in which the first look for an installed package can fail.
    names = {SCENES, *(variant.config for variant in VARIANTS.values())}
    texts = {name: Config.fromfile(name).pretty_text for name in names}
    names = list(RATES) if args.settings else chosen(args.variants)
    settings = {
        (name, seed): settings_of(name, seed, args, data, texts)
        for name in KNOWN
        for seed in args.seeds
    }
    known = earlier(settings, args, out) if args.resume else {}
    for name, seed in ((name, seed) for name in names for seed in args.seeds):
        teacher = KNOWN[name].teacher
        if not teacher or (name, seed) in known or (place(args, teacher, seed) / LAST).is_file():
            continue
        if teacher not in names or (teacher, seed) in known:
            parser.error(f'the teacher "{teacher}" of seed {seed} is to be trained before')
    scores: dict[str, dict[int, dict[str, float]]] = {}
    counts: dict[str, dict[int, int]] = {}
    runs: dict[str, dict[int, dict]] = {}
    result = environment('cpu') | dict(jobs=args.jobs, half=args.half)
    if args.jobs > 1:  # of the runs, which read it when they start
        os.environ['OMP_NUM_THREADS'] = str(max(1, result['cores'] // args.jobs))
        result['threads'] = int(os.environ['OMP_NUM_THREADS'])
    if all(os.environ.get(name, value) == value for name, value in KEEP_BUFFERS.items()):
        result['allocator'] = 'large buffers kept'  # `call` does so
    for name, seed, found, waiting in results(names, args, data, settings, known):
        scores.setdefault(name, {})[seed] = found['scores']
        runs.setdefault(name, {})[seed] = {
            key: found[key] for key in ('settings', 'code', 'seconds') if key in found
        }
        count = found['nonzeros'] if 'nonzeros' in found else nonzeros(place(args, name, seed))
        if count is not None:
            counts.setdefault(name, {})[seed] = count
        scores, counts, runs = map(ordered, (scores, counts, runs))
        print(f'{name}, seed {seed}: {found["scores"]}', flush=True)
        seconds = {
            name: [run['seconds'] for run in of.values() if 'seconds' in run]
            for name, of in runs.items()
        }
        left = seconds_left(seconds, waiting, args.jobs)
        if left is not None:
            print(f'  {len(waiting)} runs left, about {left / 60:.0f} minutes', flush=True)
        tables = dict(table=summary(scores), pairs=compare(scores, QUESTIONS | OF_SETTINGS))
        states = {run['code'] for of in runs.values() for run in of.values()}
        measured = dict(package=sorted(states), scores=scores, nonzeros=counts, runs=runs)
        if args.settings and DEMO in scores:
            measured['chosen'] = chosen_rates(scores)
        save(result | measured | tables, out)
    print(json.dumps(tables, indent=2))
    if args.settings:
        print(f'chosen: {measured["chosen"]}')


if __name__ == '__main__':
    main()
