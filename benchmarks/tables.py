"""Draws the Markdown tables of benchmarks/results, which has a folder for each machine.

Examples:
    python benchmarks/tables.py                              # prints them
    python benchmarks/tables.py --write README.md docs/operator.md

In a page, a table stands between the lines `<!-- table NAME MACHINE -->` and `<!-- end -->`. This
machine is shown in full, the most important columns of all others in a second table.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from backbones import BEST_TO_BEST, TO_NCHW
from backbones import MEMORY as TO_REFERENCE
from compact import MEMORY, TIME
from depthwise import BEST, BOXES, FALLBACK, PERIPHERAL, ROOFLINE, SEVEN
from timing import RESULTS

from mmslak.datasets.findings import of

MISSING = 'Not measured yet.'
SHOWN = 0.05  # p below which a difference is bold
# Texts of the cells by title of the column and labels of the row.
Columns = dict[str, dict[tuple[str, ...], str]]


@dataclass(frozen=True)
class Table:
    """What is drawn of which results.

    Args:
        files: Names of the files of a machine, without a suffix.
        labels: Header of what names a row.
        columns: Draws the columns from one of the files and, if there is one, that of the default
            allocator.
        brief: Beginnings of the titles of the columns that are shown of every machine.
        picture: What stands below the first table, in Markdown.
    """

    files: tuple[str, ...]
    labels: tuple[str, ...]
    columns: Callable[[list[dict]], Columns]
    brief: tuple[str, ...]
    picture: str = ''

    def draw(self, first: str | None = None) -> str:
        """The tables.

        Args:
            first: Machine to show in full; without it, or without its results, the first in the
                alphabet.
        """
        found = {machine: self.read(machine) for machine in machines()}
        found = {
            machine: results for machine, results in found.items() if self.all_columns(results)
        }
        if not found:
            return MISSING
        first = first if first in found else min(found)
        drawn = [self.markdown(self.all_columns(found[first]), [circumstances(found[first][0])])]
        drawn += [self.picture] if self.picture else []
        others = {machine: found[machine] for machine in found if machine != first}
        if others:
            columns = {
                f'{machine}: {title}': texts
                for machine, results in others.items()
                for title, texts in self.all_columns(results).items()
                if title.startswith(self.brief)
            }
            captions = [circumstances(results[0]) for results in others.values()]
            drawn.append(self.markdown(columns, captions))
        return '\n\n'.join(drawn)

    def read(self, machine: str) -> list[list[dict]]:
        """Results of a machine: for each of the files that and that of the default allocator."""
        found = []
        for name in self.files:
            paths = [RESULTS / machine / f'{name}{s}.json' for s in ('', '_default_allocator')]
            if paths[0].is_file():
                found.append([json.loads(path.read_text()) for path in paths if path.is_file()])
        return found

    def all_columns(self, results: list[list[dict]]) -> Columns:
        """Columns of all files, those of the same title below each other."""
        columns = {}
        for of_file in results:
            for title, texts in self.columns(of_file).items():
                columns[title] = columns.get(title, {}) | texts
        return {title: texts for title, texts in columns.items() if any(texts.values())}

    def markdown(self, columns: Columns, captions: Sequence[str]) -> str:
        """A table and the lines below it."""
        rows = list(dict.fromkeys(row for texts in columns.values() for row in texts))
        lines = [[*self.labels, *columns]]
        lines.append(['---'] * len(lines[0]))
        lines += [[*row, *(texts.get(row, '') for texts in columns.values())] for row in rows]
        table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
        return '\n\n'.join([table, *captions])


def machines() -> list[str]:
    """Names of the folders of results."""
    return sorted(path.name for path in RESULTS.iterdir() if path.is_dir())


def circumstances(results: Sequence[dict]) -> str:
    """What the numbers of a table hold for."""
    facts = results[0]
    words = [facts['device'], f'torch {facts["torch"]}']
    if 'dtype' in facts:
        words.insert(1, facts['dtype'])
    if 'threads' in facts:
        words.insert(1, of(facts['threads'], 'thread'))
    if 'cores' in facts:
        words.insert(1, of(facts['cores'], 'core'))
    if facts.get('instructions'):
        words.insert(1, facts['instructions'])
    if 'allocator' in facts:
        words.append(facts['allocator'])
    if facts.get('half'):
        words.append("half of the demo's steps")
    if facts.get('tuning') == 'off':
        words.append('choices by the fixed rule')
    if 'peak_tflops' in facts:
        words.append(
            f'roofline of {facts["peak_tflops"]:.0f} TFLOP/s and '
            f'{facts["bandwidth_tb_per_s"]:.1f} TB/s'
        )
    note = '; in brackets with the default allocator' if len(results) > 1 else ''
    return f'*{", ".join(words)}{note}.*'


def number(value: float) -> str:
    """Three digits, with an exponent for small errors alone."""
    if 0 < value < 0.005:
        return f'{value:.1e}'
    return f'{value:.0f}' if value >= 99.5 else f'{value:.1f}' if value >= 9.95 else f'{value:.2f}'


def cell(values: Sequence[float | str | None]) -> str:
    """A value, that of the default allocator behind it in brackets."""
    if values[0] is None:
        return ''
    first, *others = (
        number(value) if isinstance(value, float) else str(value)
        for value in values
        if value is not None
    )
    return ' '.join([first, *(f'({other})' for other in others)])


def targets(results: list[dict]) -> Columns:
    """What was to be reached and is."""
    by_key = [
        {(f'{t["case"]}, {t["operation"]}', t['target']): t for t in result['targets']}
        for result in results
    ]
    columns = {'measured': {}, 'met': {}}
    for key in by_key[0]:
        found = [reached[key] for reached in by_key if key in reached]
        columns['measured'][key] = cell([t['value'] for t in found])
        met, *others = ('yes' if t['met'] else 'no' for t in found)
        columns['met'][key] = met + ''.join(f' ({other})' for other in others if other != met)
    return columns


def depthwise(results: list[dict]) -> Columns:
    """A row for each case, a column for each ratio."""
    ratios = {
        'forward, fallback': ('forward', FALLBACK),
        'forward, best': ('forward', BEST),
        'training, fallback': ('training', FALLBACK),
        'training, best': ('training', BEST),
        'peripheral training, best': ('training', PERIPHERAL),
        'peripheral training, box sums': ('training', BOXES),
        'deployed, fallback': ('deployed', FALLBACK),
        'training in times of 7×7': ('training', SEVEN),
        'share of the roofline': ('training', ROOFLINE),
    }
    by_case = [{case['name']: case for case in result['cases']} for result in results]
    columns = {
        'input': {(name,): size(case['shape']) for name, case in by_case[0].items()},
        'kernels': {(name,): ' + '.join(case['kernels']) for name, case in by_case[0].items()},
    }
    for title, (operation, ratio) in ratios.items():
        columns[title] = {
            (name,): cell(
                [
                    cases.get(name, {}).get('ratios', {}).get(ratio, {}).get(operation)
                    for cases in by_case
                ]
            )
            for name in by_case[0]
        }
    return columns


def backbones(results: list[dict]) -> Columns:
    """A row for each backbone: forward, training step and peak memory beside the reference."""
    columns = {}
    for operation, shape in results[0]['shapes'].items():
        for what, ratio in (('NCHW', TO_NCHW), ('best', BEST_TO_BEST), ('memory', TO_REFERENCE)):
            columns[f'{operation} {size(shape)}, {what}'] = {
                (name,): cell([r['ratios'][operation].get(name, {}).get(ratio) for r in results])
                for name in results[0]['ratios']['forward']
            }
    return columns


def as_they_are(results: list[dict]) -> Columns:
    """Rows and columns of the results' own table."""
    rows = results[0]['table']
    titles = dict.fromkeys(title for row in rows.values() for title in row)
    return {
        title: {
            (name,): cell([result['table'].get(name, {}).get(title) for result in results])
            for name in rows
        }
        for title in titles
    }


def compact(results: list[dict]) -> Columns:
    """A row for each two that compact.py compares; time and memory of forward and training."""
    operations = {
        f'{operation} {size((shape[0], 3, shape[1], shape[1]))}': operation
        for operation, shape in results[0]['shapes'].items()
    }
    return {
        f'{title}, {ratio.removeprefix("× the ")}': {
            (case,): cell([result['table'][operation][case][ratio] for result in results])
            for case in results[0]['table'][operation]
        }
        for title, operation in operations.items()
        for ratio in (TIME, MEMORY)
    }


def spread(row: dict, metric: str) -> str:
    """Mean and, of several seeds, standard deviation."""
    mean, deviation = f'{row[f"{metric} mean"]:.1f}', row.get(f'{metric} deviation')
    return mean if deviation is None else f'{mean} ± {deviation:.1f}'


def seeds(results: list[dict], question: str) -> Columns:
    """Means and standard deviations of the variants that answer a question."""
    named = [(r['variant'], r['against']) for r in results[0]['pairs'] if r['question'] == question]
    rows = {n: row for n, row in results[0]['table'].items() if any(n in pair for pair in named)}
    titles = dict.fromkeys(title for row in rows.values() for title in row)
    columns = {
        metric: {(name,): spread(row, metric) for name, row in rows.items() if title in row}
        for title in titles
        if (metric := title.removesuffix(' mean')) != title
    }
    counts = results[0]['nonzeros']
    columns['non-zeros'] = {
        (name,): ', '.join(f'{count:,}' for count in sorted(set(counts[name].values())))
        for name in rows
        if name in counts
    }
    return columns | {'seeds': {(name,): str(row['seeds']) for name, row in rows.items()}}


def pairs(results: list[dict], question: str) -> Columns:
    """Mean differences of the pairs that answer a question, with 95 % intervals and p."""
    columns: Columns = {}
    for row in results[0]['pairs']:
        if row['question'] != question:
            continue
        text = f'{row["difference"]:+.1f}'
        if 'p' in row:
            p = f'p = {row["p"]:.3f}' if row['p'] >= 0.001 else 'p < 0.001'
            text += f' ({row["low"]:+.1f} to {row["high"]:+.1f}), {p}'
            text = f'**{text}**' if row['p'] < SHOWN else text
        columns.setdefault(row['metric'], {})[row['variant'], row['against']] = text
    return columns


def of_question(question: str, picture: str = '', file: str = 'claims_cpu') -> dict[str, Table]:
    """The two tables of a question: of its variants, and of its pairs."""
    name, brief = question.replace(' ', '_'), ('accuracy', 'mIoU')
    means, differences = partial(seeds, question=question), partial(pairs, question=question)
    return {
        f'claims_{name}': Table((file,), ('',), means, brief, picture),
        f'claims_{name}_pairs': Table((file,), ('', 'compared with'), differences, brief),
    }


def size(shape: Sequence[int]) -> str:
    """1×3×512×512."""
    return '×'.join(map(str, shape))


RATIOS = ('forward', 'training')
TABLES = {
    'targets_cpu': Table(('depthwise_cpu', 'backbones_cpu'), ('', 'target'), targets, ('m',)),
    'targets_cuda': Table(('depthwise_cuda',), ('', 'target'), targets, ('m',)),
    'depthwise_cpu': Table(('depthwise_cpu',), ('case',), depthwise, RATIOS),
    'depthwise_cuda': Table(('depthwise_cuda',), ('case',), depthwise, RATIOS),
    'backbones_cpu': Table(('backbones_cpu',), ('',), backbones, RATIOS),
    'backbones_cuda': Table(('backbones_cuda',), ('',), backbones, RATIOS),
    'compact_cpu': Table(('compact_cpu',), ('',), compact, RATIOS),
    'grid_cpu': Table(('grid_cpu', 'grid_compile_cpu'), ('',), as_they_are, ('not', 'worst')),
    'networks_cpu': Table(('networks_cpu',), ('',), as_they_are, RATIOS),
    'first_run_cpu': Table(('first_run_cpu',), ('',), as_they_are, ('cases', 'seconds')),
    'deploy_cpu': Table(('deploy_cpu',), ('',), as_they_are, ('latency',)),
    'detectors_onnx_cpu': Table(('detectors_onnx_cpu',), ('',), as_they_are, ('box',)),
    **of_question('kernel size', '![Scores and receptive fields by kernel](images/kernels.svg)'),
    **of_question('kernel form'),
    **of_question('width'),
    **of_question('zeros'),
    **of_question('distillation'),
    **of_question('settings', file='claims_settings_cpu'),
}


def draw_into(page: str) -> str:
    """The page with its tables drawn anew.

    Raises:
        KeyError: On a table that we do not have.
    """
    return re.sub(
        r'(<!-- table (\w+)(?: (\S+))? -->\n).*?(<!-- end -->)',
        lambda match: f'{match[1]}{TABLES[match[2]].draw(match[3])}\n{match[4]}',
        page,
        flags=re.DOTALL,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--write', nargs='+', metavar='PAGE', help='Markdown files to draw into')
    args = parser.parse_args(argv)
    if not args.write:
        for name, table in TABLES.items():
            print(f'{name}\n\n{table.draw()}\n')
    for page in map(Path, args.write or []):
        page.write_text(draw_into(page.read_text()))


if __name__ == '__main__':
    main()
