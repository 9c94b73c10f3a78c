"""Which zeros cost accuracy: digits and digit scenes on a laptop's CPU, five seeds each.

Example:
    python benchmarks/claims.py --out     # benchmarks/results/MACHINE/claims_cpu.json; an hour
    python benchmarks/claims.py --jobs 2 --resume --out --seeds 3 4   # the fourth and fifth only

The models, the data and all settings are those of the demos (`mmslak run-demo`), which were chosen
before and for other reasons; nothing is tuned here, and every seed that was begun is reported. The
data are the same for all seeds; a seed changes the initial weights, the order of the data and the
masks. A small SLaK learns single digits (accuracy on held-out ones); UperNet then learns scenes
from it (mIoU on held-out ones). Differences are tested in pairs of the same seed. What five seeds
on digits show need not hold elsewhere.

It can be stopped and called again: what is done is kept in the work folder, by variant and seed.
--resume takes also what an earlier state of the package has done with the same settings; the result
then names the states. A last call with all seeds puts together what several calls have done.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path

from mmengine.config import Config
from scipy.stats import ttest_rel
from timing import RESULTS, environment, machine, save

from mmslak.cli.run_demo import (
    DIGITS,
    QUICK_DATA,
    QUICK_DIGITS,
    QUICK_SCENES,
    SCENES,
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


@dataclass(frozen=True)
class Variant:
    """One kind of zeros.

    Attributes:
        config: Of the classifier.
        options: Changes of it.
        scenes: Whether UperNet is trained from it.
        compact: Whether hidden units are taken out before.
    """

    config: str = DIGITS
    options: tuple[str, ...] = ()
    scenes: bool = False
    compact: bool = False


VARIANTS = {
    'dense': Variant(options=(f'{HOOK}.sparsity=0', f'{HOOK}.init=uniform'), scenes=True),
    BASELINE: Variant(scenes=True),
    'single weights, static': Variant(options=(f'{HOOK}.update_interval=0',)),
    'hidden units': Variant(NEURON_DIGITS, scenes=True, compact=True),
    'hidden units, moving': Variant(NEURON_DIGITS, (f'{HOOK}.structure.moving=True',)),
    '2:4': Variant(options=(f'{HOOK}.structure.type=n:m',)),
}


def train(
    name: str, seed: int, args: argparse.Namespace, data: str, texts: dict[str, str]
) -> tuple[dict, str]:
    """Trains a variant with a seed, or takes what was done before.

    Args:
        name: Of the variant.
        seed: Of weights, order and masks.
        args: Of the command line.
        data: Digest of the data.
        texts: Of the configs, by name.

    Returns:
        Scores in percent, and a digest of the state of the package that they were measured with.
    """
    variant = VARIANTS[name]
    folder = args.work_dir / f'{name.replace(", ", "_").replace(" ", "_").replace(":", "_")}_{seed}'
    own = repr((astuple(variant), seed, args.half, args.quick))
    settings = digest(texts[variant.config], texts[SCENES], own, data)
    code, done = sources(), folder / 'scores.json'
    if args.resume and done.is_file():
        before = json.loads(done.read_text())
        if before['settings'] == settings:
            return before['scores'], before['code']
    scores = _train(variant, seed, args, folder, digest(code, data))
    text = json.dumps(dict(scores=scores, settings=settings, code=code)) + '\n'
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(done, text.encode())
    return scores, code


def _train(
    variant: Variant, seed: int, args: argparse.Namespace, folder: Path, stamp: str
) -> dict[str, float]:
    common = [f'randomness.seed={seed}', f'{HOOK}.seed={seed}']
    digits, scenes = (HALF_DIGITS, HALF_SCENES) if args.half else ([], [])
    if args.quick:
        digits = QUICK_NEURON_DIGITS if variant.config == NEURON_DIGITS else QUICK_DIGITS
        scenes = QUICK_SCENES
    options = [f'data_root={args.data / "cls"}', *common, *digits, *variant.options]
    checkpoint, (accuracy,) = train_and_test(
        variant.config, folder / 'digits', options, ['accuracy/top1'], stamp
    )
    scores = {'accuracy': accuracy}
    if not variant.scenes:
        return scores
    options = [f'data_root={args.data / "ade"}', common[0], *scenes]
    if variant.compact:
        small = folder / 'compact.pth'
        options.append(widths_option(take_out(checkpoint, small, folder / 'compact.log')))
        checkpoint = small
    options.append(f'checkpoint={checkpoint}')
    stamp = digest(stamp, checkpoint.read_bytes())
    _, (scores['mIoU'],) = train_and_test(SCENES, folder / 'scenes', options, ['mIoU'], stamp)
    return scores


def summary(scores: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds, and what tells a variant from the baseline.

    Args:
        scores: By variant, seed and metric.

    Returns:
        By variant: 'METRIC mean' and 'METRIC deviation'; 'METRIC difference' from the baseline and
        'METRIC p' of a paired t-test, over the seeds that both have.
    """
    table: dict[str, dict[str, float]] = {}
    for name, by_seed in scores.items():
        row = table.setdefault(name, {'seeds': len(by_seed)})
        for metric in next(iter(by_seed.values()), {}):
            values = [one[metric] for one in by_seed.values()]
            row[f'{metric} mean'] = statistics.mean(values)
            row[f'{metric} deviation'] = statistics.stdev(values) if len(values) > 1 else 0.0
            base = scores.get(BASELINE, {})
            pairs = [
                (one[metric], base[seed][metric])
                for seed, one in by_seed.items()
                if metric in base.get(seed, {})
            ]
            differences = [one - other for one, other in pairs]
            if name != BASELINE and len(set(differences)) > 1:
                row[f'{metric} difference'] = statistics.mean(differences)
                row[f'{metric} p'] = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4], help='which [%(default)s]'
    )
    parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
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
    out = RESULTS / machine('cpu') / 'claims_cpu.json' if args.out == '' else args.out

    make_digit_scenes(args.data, seed=0, **(QUICK_DATA if args.quick else {}))
    data = digest((args.data / 'digit_scenes.json').read_text())
    # Read before there are threads, in which the first look for an installed package can fail.
    names = {SCENES, *(variant.config for variant in VARIANTS.values())}
    texts = {name: Config.fromfile(name).pretty_text for name in names}
    scores: dict[str, dict[int, dict[str, float]]] = {name: {} for name in args.variants}
    result, states = environment('cpu') | dict(jobs=args.jobs, half=args.half), set()
    if args.jobs > 1:  # of the runs, which read it when they start
        os.environ['OMP_NUM_THREADS'] = str(max(1, result['cores'] // args.jobs))
    with ThreadPoolExecutor(args.jobs) as pool:
        # Seed by seed, so that all variants have as many whenever it is stopped.
        runs = {
            pool.submit(train, name, seed, args, data, texts): (name, seed)
            for seed in args.seeds
            for name in args.variants
        }
        try:
            for run in as_completed(runs):
                name, seed = runs[run]
                found, state = run.result()
                scores[name] = dict(sorted((scores[name] | {seed: found}).items()))
                states.add(state)
                print(f'{name}, seed {seed}: {found}', flush=True)
                table = summary(scores)
                save(result | dict(package=sorted(states), scores=scores, table=table), out)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(json.dumps(summary(scores), indent=2))


if __name__ == '__main__':
    main()
