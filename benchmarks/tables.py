"""Draws the Markdown tables of benchmarks/results.

Examples:
    python benchmarks/tables.py                              # prints them
    python benchmarks/tables.py --write README.md docs/operator.md

In a page, a table stands between the lines `<!-- table NAME -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from backbones import BEST_TO_BEST, MEMORY, TO_DEFAULT
from depthwise import BEST, BOXES, DEFAULT, PERIPHERAL, ROOFLINE, SEVEN

RESULTS = Path(__file__).parent / 'results'
MISSING = 'Not measured yet.'


def read(name: str) -> dict | None:
    """A result by its file's name, None if it is not there."""
    path = RESULTS / f'{name}.json'
    return json.loads(path.read_text()) if path.is_file() else None


def beside(name: str) -> list[dict] | None:
    """A result and, if there is one, that of the default allocator; None without the first."""
    found = [read(name), read(f'{name}_default_allocator')]
    return [result for result in found if result] if found[0] else None


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = '') -> str:
    """A table and a line below it."""
    lines = [header, ['---'] * len(header), *rows]
    table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    return f'{table}\n\n{caption}' if caption else table


def circumstances(results: Sequence[dict]) -> str:
    """What the numbers of a table hold for."""
    facts = results[0]
    words = [facts['device'], facts['dtype'], f'torch {facts["torch"]}']
    if 'threads' in facts:
        words.insert(1, f'{facts["threads"]} threads')
    if 'allocator' in facts:
        words.append(facts['allocator'])
    if 'peak_tflops' in facts:
        words.append(
            f'roofline of {facts["peak_tflops"]:.0f} TFLOP/s and '
            f'{facts["bandwidth_tb_per_s"]:.1f} TB/s'
        )
    note = '; in brackets with the default allocator' if len(results) > 1 else ''
    return f'*{", ".join(words)}{note}.*'


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f'{value:.0f}' if value >= 99.5 else f'{value:.1f}' if value >= 9.95 else f'{value:.2f}'


def cell(values: Sequence[float | None]) -> str:
    """A number, that of the default allocator behind it in brackets."""
    if values[0] is None:
        return ''
    first, *others = (number(value) for value in values if value is not None)
    return ' '.join([first, *(f'({other})' for other in others)])


def targets(*names: str) -> str:
    """What was to be reached and is."""
    rows, facts = [], None
    for name in names:
        results = beside(name)
        if results is None:
            continue
        facts = facts or results
        values = [
            {(t['case'], t['operation'], t['target']): t for t in r['targets']} for r in results
        ]
        for key in values[0]:
            both = [by_key[key] for by_key in values if key in by_key]
            met, *others = ('yes' if one['met'] else 'no' for one in both)
            state = met + ''.join(f' ({other})' for other in others if other != met)
            rows.append([f'{key[0]}, {key[1]}', key[2], cell([t['value'] for t in both]), state])
    if not rows:
        return MISSING
    return markdown(['', 'target', 'measured', 'met'], rows, circumstances(facts))


def depthwise(name: str) -> str:
    """A row for each case, a column for each ratio."""
    columns = {
        'forward, default': ('forward', DEFAULT),
        'forward, best': ('forward', BEST),
        'training, default': ('training', DEFAULT),
        'training, best': ('training', BEST),
        'peripheral training, best': ('training', PERIPHERAL),
        'peripheral training, box sums': ('training', BOXES),
        'deployed, default': ('deployed', DEFAULT),
        'training in times of 7×7': ('training', SEVEN),
        'share of the roofline': ('training', ROOFLINE),
    }
    results = beside(name)
    if results is None:
        return MISSING
    by_case = [{case['name']: case for case in result['cases']} for result in results]

    def text(case: str, operation: str, ratio: str) -> str:
        found = (cases.get(case, {}).get('ratios', {}) for cases in by_case)
        return cell([ratios.get(ratio, {}).get(operation) for ratios in found])

    drawn = {
        title: texts
        for title, where in columns.items()
        if any((texts := {case: text(case, *where) for case in by_case[0]}).values())
    }
    rows = [
        [case, size(facts['shape']), ' + '.join(facts['kernels'])]
        + [texts[case] for texts in drawn.values()]
        for case, facts in by_case[0].items()
    ]
    return markdown(['case', 'input', 'kernels', *drawn], rows, circumstances(results))


def backbones(name: str) -> str:
    """A row for each backbone: forward, training step and peak memory beside the reference."""
    results = beside(name)
    if results is None:
        return MISSING
    columns = [
        (operation, ratio)
        for operation in ('forward', 'training')
        for ratio in (TO_DEFAULT, BEST_TO_BEST, MEMORY)
    ]
    titles = [
        f'{operation} {size(results[0]["shapes"][operation])}, {what}'
        for operation in ('forward', 'training')
        for what in ('default', 'best', 'memory')
    ]
    rows = [
        [backbone]
        + [
            cell([r['ratios'][operation].get(backbone, {}).get(ratio) for r in results])
            for operation, ratio in columns
        ]
        for backbone in results[0]['ratios']['forward']
    ]
    return markdown(['', *titles], rows, circumstances(results))


def size(shape: Sequence[int]) -> str:
    """1×3×512×512."""
    return '×'.join(map(str, shape))


TABLES = {
    'targets_cpu': lambda: targets('depthwise_cpu', 'backbones_cpu'),
    'targets_cuda': lambda: targets('depthwise_cuda'),
    'depthwise_cpu': lambda: depthwise('depthwise_cpu'),
    'depthwise_cuda': lambda: depthwise('depthwise_cuda'),
    'backbones_cpu': lambda: backbones('backbones_cpu'),
    'backbones_cuda': lambda: backbones('backbones_cuda'),
}


def draw_into(page: str) -> str:
    """The page with its tables drawn anew.

    Raises:
        KeyError: On a table that we do not have.
    """
    return re.sub(
        r'(<!-- table (\w+) -->\n).*?(<!-- end -->)',
        lambda match: f'{match[1]}{TABLES[match[2]]()}\n{match[3]}',
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
        for name, draw in TABLES.items():
            print(f'{name}\n\n{draw()}\n')
    for page in map(Path, args.write or []):
        page.write_text(draw_into(page.read_text()))


if __name__ == '__main__':
    main()
