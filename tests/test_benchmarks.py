"""The scripts below benchmarks/: what they time is what they say, and they run end to end."""

import argparse
import copy
import dataclasses
import importlib
import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmslak import ops
from mmslak.apis.options import apply_options
from mmslak.checkpoints.files import read_state_dict
from mmslak.cli import run_demo
from mmslak.cli.options_action import OptionsAction
from mmslak.ops import DepthwiseConv2d
from tests import forks
from tests.tuning_state import begin_anew

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / 'benchmarks'
PAGES = [
    page
    for page in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
    if '<!-- table ' in page.read_text()
]


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def same_process(monkeypatch):
    """With this environment a script has no reason to start itself anew."""
    import timing

    for name, value in timing.KEEP_BUFFERS.items():
        monkeypatch.setenv(name, value)
    with ops.tuning('off'):  # scripts change it
        yield


def run(*arguments: str, env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT
    )


def namespace(**values) -> argparse.Namespace:
    defaults = dict(device=torch.device('cpu'), dtype=torch.float32, threads=None, tuning='off')
    return argparse.Namespace(**(defaults | values))


def test_calls_take_turns_and_the_median_counts(monkeypatch):
    import timing

    order = []
    monkeypatch.setattr(timing, '_seconds', lambda call: call())
    scripted = {'a': iter([9.0, 0.1, 0.3, 0.2]), 'b': iter([9.0, 5.0, 6.0, 7.0])}

    def call(name):
        order.append(name)
        return next(scripted[name])

    calls = {name: lambda name=name: call(name) for name in scripted}
    assert timing.medians(calls, rounds=3, budget=100.0) == {'a': 200.0, 'b': 6000.0}
    assert order == ['a', 'b'] * 4


def test_of_short_calls_the_second_run_of_a_turn_counts(monkeypatch):
    import timing

    monkeypatch.setattr(timing, '_seconds', lambda call: call())
    scripted = iter([0.001, 0.009, 0.002, 0.009, 0.004, 0.009, 0.003])
    assert timing.medians({'short': lambda: next(scripted)}, rounds=3) == {'short': 3.0}


def test_slow_calls_run_seldom(monkeypatch):
    import timing

    monkeypatch.setattr(timing, '_seconds', lambda call: call())
    runs = {'quick': 0, 'slow': 0, 'slowest': 0}
    seconds = {'quick': 0.1, 'slow': 0.9, 'slowest': 30.0}

    def call(name):
        runs[name] += 1
        return seconds[name]

    calls = {name: lambda name=name: call(name) for name in runs}
    medians = timing.medians(calls, rounds=9, budget=1.0, slow=1.0)
    assert medians == {name: pytest.approx(1e3 * value) for name, value in seconds.items()}
    assert runs == {'quick': 10, 'slow': 4, 'slowest': 1}


def test_a_script_can_have_the_default_allocator():
    import timing

    code = 'import timing; timing.use_allocator(False); print(timing.environment()["allocator"])'
    env = os.environ | timing.KEEP_BUFFERS | {'PYTHONPATH': str(FOLDER)}
    done = run('-c', code, env=env)
    assert done.stdout.strip() == 'default', done.stderr


@pytest.mark.parametrize('layout', ['NCHW', 'NHWC'])
@pytest.mark.parametrize('index', [0, 1])
def test_what_is_timed_is_right(index, layout):
    import depthwise

    torch.manual_seed(0)
    case = depthwise.QUICK[index]
    t = depthwise.Tensors(case, 2, layout, torch.device('cpu'), torch.float32)
    x = t.x.double().requires_grad_()
    weights = [weight.double().requires_grad_() for weight in t.weights]
    outputs = [F.conv2d(x, w, padding='same', groups=case.channels) for w in weights]
    gradients = [gradient.double() for gradient in t.gradients]
    dx, *dws = torch.autograd.grad(outputs, [x, *weights], gradients)

    def close(found, expected):
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()

    calls = depthwise.our_calls(case, {layout: t}, parts=True)
    assert {backend for backend, _, _ in calls} >= {'auto', 'native', 'fft'}
    for (_, _, operation), call in calls.items():
        expected = {
            'forward': outputs,
            'training': [dx, *dws],
            'input gradient': [dx],
            'weight gradient': dws,
            'both gradients': [dx, *dws],
            'deployed': sum(outputs, t.bias.view(-1, 1, 1))[None],
        }[operation]
        found = call()
        close(found[None] if operation == 'deployed' else found, expected)

    parts = [depthwise.stock_calls(t, i) for i in range(len(weights))]
    close([part['forward']()[0] for part in parts], outputs)
    close([sum(part['input gradient']()[0] for part in parts)], [dx])
    close([part['weight gradient']()[1] for part in parts], dws)
    close(
        [depthwise.stock_deployed(t.x, t.weights, t.bias)],
        [sum(outputs, t.bias.view(-1, 1, 1))],
    )


@pytest.mark.parametrize(
    ('kernel_size', 'center', 'height', 'width'), [(33, 5, 9, 14), (13, 7, 16, 16)]
)
def test_box_sums_are_the_peripheral_convolution(kernel_size, center, height, width):
    from box_sums import box_sums

    from mmslak.models import PeripheralConv2d

    module = PeripheralConv2d(3, kernel_size, center, conv_backend='native').double()
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    outputs = module(x), box_sums(x, module.weight, module.grid)
    torch.testing.assert_close(*outputs)
    gradient = torch.randn_like(x)
    both = (torch.autograd.grad(y, (x, module.weight), gradient) for y in outputs)
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected)


def test_stock_calls_compute_nothing_else():
    import depthwise

    t = depthwise.Tensors(depthwise.QUICK[0], 1, 'NCHW', torch.device('cpu'), torch.float32)
    calls = depthwise.stock_calls(t, 0)
    assert [g is None for g in calls['input gradient']()] == [False, True, True]
    assert [g is None for g in calls['weight gradient']()] == [True, False, True]


def test_roofline_is_the_larger_of_traffic_and_arithmetic():
    import depthwise

    case = depthwise.Case('', 10, 100, ((3, 5), (5, 3)))
    args = namespace(batch=2, dtype=torch.bfloat16, bandwidth=1e-3, peak_tflops=1e3)
    # 200000 values of 2 bytes: 3 maps in and out, 7 in training, at 1e9 bytes per second.
    assert depthwise.roofline(case, args) == pytest.approx(dict(forward=1.2, training=2.8))
    args = namespace(batch=2, dtype=torch.bfloat16, bandwidth=1e3, peak_tflops=1e-3)
    # 200000 outputs of 30 products, at 1e9 operations per second.
    assert depthwise.roofline(case, args) == pytest.approx(dict(forward=12.0, training=36.0))


def test_targets_compare_the_right_way_round():
    import depthwise

    def result(case, **ratios):
        return dict(name=case.name, ratios=ratios, milliseconds={})

    ratios = {depthwise.FALLBACK: dict(forward=11.0, training=8.9), depthwise.SEVEN: {}}
    ratios[depthwise.SEVEN]['training'] = 1.6
    found = depthwise.targets([result(depthwise.SLAK[0], **ratios)], torch.device('cpu'))
    assert [(t['operation'], t['value'], t['met']) for t in found] == [
        ('forward', 11.0, True),
        ('training', 8.9, False),
        ('training', 1.6, False),
    ]
    results = [
        dict(name=case.name, ratios={}, milliseconds=dict(peripheral=dict(training=ms)))
        for case, ms in zip(depthwise.SQUARES, (10.0, 15.0), strict=True)
    ]
    (found,) = depthwise.targets(results, torch.device('cpu'))
    assert (found['value'], found['met']) == (1.5, True)
    found = depthwise.targets([result(c, **ratios) for c in depthwise.SLAK], torch.device('cuda'))
    assert [t['met'] for t in found] == [False] * 8


def test_depthwise_end_to_end(tmp_path):
    out = tmp_path / 'new' / 'result.json'
    env = os.environ | {'MALLOC_MMAP_THRESHOLD_': '1000000'}
    command = ['benchmarks/depthwise.py', '--quick', '--threads', '1', '--out', str(out)]
    done = run(*command, env=env)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert (result['threads'], result['allocator']) == (1, 'large buffers kept')
    assert (result['dtype'], result['torch']) == ('float32', torch.__version__)
    strips, square = result['cases']
    assert strips['kernels'] == ['13×5', '5×13', '5×5']
    for case in (strips, square):
        assert f'{case["name"]}: ' in done.stdout
        ms = case['milliseconds']
        for name in ("authors' fallback", 'best layout'):
            stock, auto = ms[f'nn.Conv2d, {name}'], ms['auto']['NCHW']
            ratios = case['ratios'][f'× faster than nn.Conv2d, {name}']
            for operation, ratio in ratios.items():
                assert ratio == pytest.approx(stock[operation] / auto[operation], rel=2e-3)
        calls = ms['nn.Conv2d by call']
        assert list(calls) == case['kernels']
        best = sum(min(calls[k][lay]['forward'] for lay in ('NCHW', 'NHWC')) for k in calls)
        assert ms['nn.Conv2d, best layout']['forward'] == pytest.approx(best, rel=2e-3)
    for way in ('peripheral', 'box sums'):
        assert set(square['milliseconds'][way]) == {'forward', 'training'}


@pytest.mark.usefixtures('same_process')
def test_depthwise_table_names_the_fastest(tmp_path, capsys):
    import depthwise

    out = tmp_path / 'table.json'
    depthwise.main(['--quick', '--table', '--rounds', '1', '--cases', 'strips', '--out', str(out)])
    result = json.loads(out.read_text())
    assert [case['shape'][0] for case in result['cases']] == [1, 2]
    for case in result['cases']:
        for layout, fastest in case['fastest'].items():
            for operation, backend in fastest.items():
                ms = {b: m[layout][operation] for b, m in case['milliseconds'].items()}
                assert ms[backend] == min(ms.values())
    assert 'NHWC weight gradient' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [(['--cases', 'none'], 'no case has this'), (['--dtype', 'int8'], 'invalid choice')],
)
@pytest.mark.usefixtures('same_process')
def test_depthwise_wrong_arguments(capsys, arguments, message):
    import depthwise

    with pytest.raises(SystemExit) as stopped:
        depthwise.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('name', ['depthwise', 'backbones'])
@pytest.mark.usefixtures('same_process')
def test_a_missing_gpu_is_one_line(capsys, name):
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(['--device', 'cuda'])
    assert capsys.readouterr().err.splitlines()[-1].endswith('torch finds no GPU here')


@pytest.mark.usefixtures('same_process')
def test_backbones_end_to_end(tmp_path, monkeypatch):
    import backbones
    import options
    import tables
    import timing

    monkeypatch.setattr(options, 'RESULTS', tmp_path)
    backbones.main(['--quick', '--out'])
    path = tmp_path / timing.machine() / 'backbones_cpu.json'
    result = json.loads(path.read_text())
    assert list(result['ratios']['forward']) == list(backbones.QUICK)
    assert 'SLaK-T, deployed' not in result['ratios']['training']
    assert len(result['targets']) == 4
    for operation, rows in result['ratios'].items():
        times, memory = result['milliseconds'][operation], result['mebibytes'][operation]
        ours, reference = times['SLaK-T'], times['ConvNeXt-T']
        row = rows['SLaK-T']
        assert row[backbones.TO_NCHW] == pytest.approx(ours['NCHW'] / reference['NCHW'], rel=2e-3)
        assert row[backbones.BEST_TO_BEST] == pytest.approx(
            min(ours.values()) / min(reference.values()), rel=2e-3
        )
        assert all(0 < m['above_start'] < m['peak'] for m in memory.values())
    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    table = tables.TABLES['backbones_cpu'].draw()
    assert '| SLaK-T, deployed |' in table
    assert '2×3×64×64' in table


@pytest.mark.usefixtures('same_process')
def test_peak_memory_is_that_of_one_operation(monkeypatch):
    import backbones

    args = namespace(forward=(1, 64), training=(1, 64))
    tiny = {'SLaK-T': backbones.QUICK['SLaK-T']}
    small = backbones.peak_memories(tiny, False, args)['SLaK-T']
    args.forward = (16, 256)
    ballast = torch.ones(1 << 28)  # 1 GiB in this process, none in the measured one
    large = backbones.peak_memories(tiny, False, args)['SLaK-T']
    del ballast
    images = 16 * 3 * 256**2 * 4 / 2**20
    assert large['above_start'] > small['above_start'] + images / 2
    assert large['peak'] < small['peak'] + 900


def test_backbones_are_what_they_are_called():
    import backbones

    native = backbones.QUICK['SLaK-T, native'].build()
    assert native.stages[0][0].large_kernel.conv_backend == 'native'
    assert backbones.QUICK['SLaK-T, deployed'].build().stages[0][0].large_kernel.deployed
    plain = backbones.QUICK["SLaK-T, authors' fallback"].build()
    layouts = []
    for module in plain.modules():
        assert type(module) is not DepthwiseConv2d
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.register_forward_pre_hook(lambda _, x: layouts.append(x[0].is_contiguous()))
    ours = backbones.QUICK['SLaK-T'].build()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    for found, expected in zip(plain.eval()(x), ours.eval()(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert layouts == [True] * 12
    pelk = backbones.BACKBONES['PeLK-T-101']
    model = dataclasses.replace(pelk, changes=pelk.changes | backbones.TINY).build()
    sizes = [stage[0].large_kernel.peripheral.kernel_size for stage in model.stages]
    assert sizes == [101, 69, 67, 13]


@pytest.mark.usefixtures('same_process')
def test_compact_end_to_end(tmp_path, capsys):
    import compact

    out = tmp_path / 'result.json'
    compact.main(['--quick', '--out', str(out)])
    result = json.loads(out.read_text())
    whole, half = (result['parameters'][name] for name in (compact.WHOLE, compact.COMPACT))
    assert whole - half == 4 * 16 * 21  # 40 % of 40 hidden units: 10 weights in, 10 out, a bias
    for operation in ('forward', 'training'):
        row = result['table'][operation]['SLaK-T, compact to SLaK-T']
        times, memory = result['milliseconds'][operation], result['mebibytes'][operation]
        assert row[compact.TIME] == pytest.approx(
            times[compact.COMPACT]['NCHW'] / times[compact.WHOLE]['NCHW'], rel=2e-3
        )
        assert row[compact.MEMORY] == pytest.approx(
            memory[compact.COMPACT]['peak'] / memory[compact.WHOLE]['peak'], rel=2e-3
        )
    assert [t['operation'] for t in result['targets']] == [
        *('forward', 'training', 'training', 'forward')
    ]
    assert 'SLaK-T, compact to ConvNeXt-T' in capsys.readouterr().out


def test_tables_show_both_allocators_and_other_machines(tmp_path, monkeypatch):
    import depthwise
    import tables

    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    page = '<!-- table targets_cpu new-2c -->\n{}\n<!-- end -->\n'
    assert tables.draw_into(page.format('old')) == page.format(tables.MISSING)
    for machine, name, allocator, value in (
        ('new-2c', 'depthwise_cpu', 'large buffers kept', 12.34),
        ('new-2c', 'depthwise_cpu_default_allocator', 'default', 5.678),
        ('early-8c', 'depthwise_cpu', 'large buffers kept', 0.5),
    ):
        target = dict(case='stage 1', operation='forward', target='at least 11', met=value > 11)
        case = dict(
            name='stage 1',
            shape=[1, 8, 4, 4],
            kernels=['5×3', '3×5'],
            ratios={
                depthwise.FALLBACK: dict(forward=value, deployed=2.0),
                depthwise.BEST: dict(training=123.4),
            },
        )
        result = dict(device=machine, threads=2, dtype='float32', torch='2', allocator=allocator)
        result |= dict(cases=[case], targets=[target | dict(value=value)])
        (tmp_path / machine).mkdir(exist_ok=True)
        (tmp_path / machine / f'{name}.json').write_text(json.dumps(result))
    drawn = tables.draw_into(page.format('old'))
    assert '| stage 1, forward | at least 11 | 12.3 (5.68) | yes (no) |' in drawn
    lines = tables.TABLES['depthwise_cpu'].draw('new-2c').splitlines()
    first, second = lines[:5], lines[6:]
    assert first[0] == (
        '| case | input | kernels | forward, fallback | training, best | deployed, fallback |'
    )
    assert first[2] == '| stage 1 | 1×8×4×4 | 5×3 + 3×5 | 12.3 (5.68) | 123 (123) | 2.00 (2.00) |'
    assert first[-1].endswith('large buffers kept; in brackets with the default allocator.*')
    assert second[0] == '| case | early-8c: forward, fallback | early-8c: training, best |'
    assert second[2] == '| stage 1 | 0.50 | 123 |'
    assert second[-1] == '*early-8c, 2 threads, float32, torch 2, large buffers kept.*'


@pytest.mark.parametrize(
    ('device', 'instructions', 'cores', 'name'),
    [
        ('AMD EPYC (AVX512)', [], 2, 'epyc-avx512-2c'),
        ('AMD EPYC 9R14 96-Core Processor (AVX512)', ['avx512_bf16'], 8, 'epyc-9r14-avx512bf16-8c'),
        ('Intel(R) Xeon(R) Processor (AVX512)', ['avx512_bf16', 'amx_bf16'], 2, 'xeon-amx-2c'),
        ('Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz (AVX2)', [], 6, 'core-i7-8700k-avx2-6c'),
        ('NVIDIA H100 80GB HBM3', [], 0, 'h100-80gb-hbm3'),
    ],
)
def test_machines_have_short_names(device, instructions, cores, name):
    import timing

    assert timing.short_name(device, instructions, cores) == name


@pytest.fixture
def bare(tmp_path) -> dict:
    """Environment of a process that finds torch, but not OpenMMLab."""
    for name in ('mmcv', 'mmengine'):
        (tmp_path / f'{name}.py').write_text(f'raise ModuleNotFoundError("no {name}")')
    return os.environ | {'PYTHONPATH': f'{tmp_path}:{ROOT}', 'MMSLAK_CACHE': str(tmp_path)}


def test_operator_is_timed_without_openmmlab(bare):
    env = bare
    done = run('benchmarks/depthwise.py', '--quick', '--rounds', '1', '--cases', 'square', env=env)
    assert done.returncode == 0, done.stderr
    assert 'nn.Conv2d, best layout' in done.stdout
    assert 'PeripheralConv2d' not in done.stdout


def test_grid_has_every_kernel_and_map_in_every_way():
    import grid

    cases = grid.cases()
    assert len({case.name for case in cases}) == len(cases) >= 300
    for i, size in enumerate((51, 5)):
        assert size in {kernel[i] for kernel in grid.KERNELS if kernel[0] != kernel[1]}
    for case in cases:
        assert all(side % 2 for side in case.kernel)
        assert case.batch * case.channels * case.side**2 <= grid.MOST_VALUES
        assert case.channels > 16 or max(case.kernel) < 15
    ways = {(c.layout, c.dtype, c.operation) for c in cases}
    assert len(ways) == 8
    for kernel in grid.KERNELS:
        assert {(c.layout, c.dtype, c.operation) for c in cases if c.kernel == kernel} == ways
    assert {(c.batch, c.channels) for c in cases} == {
        (batch, channels) for batch in grid.BATCHES for channels in grid.CHANNELS
    }


@pytest.mark.parametrize(
    ('stock', 'ours', 'expected'),
    [(0.02, 0.05, 1.0), (0.02, 0.07, 0.5), (1.0, 2.03, 0.5), (2.0, 1.0, 2.0), (0.02, 0.01, 2.0)],
)
def test_grid_forgives_overhead_up_to_a_draw(stock, ours, expected):
    import grid

    assert grid.ratio(stock, ours) == pytest.approx(expected)


@pytest.mark.parametrize('operation', ['forward', 'training'])
def test_grid_compares_the_same_computation(operation):
    import grid

    case = grid.Case((3, 7), 6, 2, 4, 'NHWC', 'float32', operation)
    calls = grid.calls(case, torch.device('cpu'), compiled=False)
    stock, ours = calls['stock'](), calls['ours']()
    assert isinstance(stock, tuple) == (operation == 'training')
    torch.testing.assert_close(ours, stock)
    if operation == 'forward':
        assert stock.is_contiguous(memory_format=torch.channels_last)
    else:
        assert [g.shape for g in stock] == [(2, 4, 6, 6), (4, 1, 3, 7), (4,)]


def test_grid_end_to_end(bare, tmp_path):
    out, picture = tmp_path / 'grid_cpu.json', tmp_path / 'grid.png'
    command = ['benchmarks/grid.py', '--quick', '--threads', '1', '--tuning', 'on']
    command += ['--out', str(out)]
    done = run(*command, '--cases', '7×7 ', env=bare)
    assert done.returncode == 0, done.stderr
    first = json.loads(out.read_text())['cases']
    assert len(first) == 8
    done = run(*command, '--resume', '--picture', str(picture), env=bare)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result['cases'][:8] == first
    assert len(result['cases']) == 16
    total = result['table']['eager, all']
    ratios = [case['ratio'] for case in result['cases']]
    assert (total['cases'], total['worst']) == (16, min(ratios))
    assert total['not slower'] == pytest.approx(sum(r >= 0.95 for r in ratios) / 16, rel=1e-3)
    printed = re.search(r'eager, all: .* of 16 cases not slower; median (\S+);', done.stdout)[1]
    assert float(printed) == pytest.approx(total['median'], abs=0.011)  # both are rounded
    assert picture.read_bytes().startswith(b'\x89PNG')
    done = run(*command, '--resume', '--default-allocator', env=bare)
    assert done.stderr.strip().endswith('measured with other allocator')


@pytest.mark.usefixtures('same_process')
def test_networks_before_and_after(tmp_path):
    import networks

    out = tmp_path / 'result.json'
    networks.main(['--quick', '--networks', 'UniRepLKNet-like', '--out', str(out)])
    row = json.loads(out.read_text())['table']['UniRepLKNet-like']
    ratios = [
        f'{name}, {layout}' for name in ('forward', 'training') for layout in networks.LAYOUTS
    ]
    assert list(row) == ['convolutions', *ratios, 'largest error']
    assert row['convolutions'] == 4  # those with a dilation stay
    assert row['largest error'] < 1e-5


def test_sizes_of_a_first_run():
    import first_run

    # 64 × 64 to 64 × 128 are padded to 64, 96 and 128; the longer side ends at 1333.
    sizes = {(64, 64), (64, 96), (64, 128), (96, 64), (128, 64)}
    assert first_run.resized([64]) == sizes
    assert first_run.batches(sizes) - sizes == {(a, b) for a in (96, 128) for b in (96, 128)}
    assert min(first_run.resized([800])) == (672, 1344)
    assert max(map(max, first_run.resized([1333]))) == 1344
    # Maps at stride 32 of 2, 3 and 4 have buckets of their own; 5 and 6 share one.
    found = first_run.one_of_each_bucket([(64, 64), (96, 64), (160, 64), (192, 64), (128, 64)])
    assert found == [(64, 64), (96, 64), (128, 64), (192, 64)]


@pytest.mark.usefixtures('same_process')
def test_first_run_end_to_end(tmp_path, monkeypatch, capsys):
    import first_run

    begin_anew(monkeypatch, tmp_path / 'cache')
    out = tmp_path / 'result.json'
    arguments = ['--quick', '--recipes', 'UperNet', '--out', str(out)]
    first_run.main([*arguments, '--tuning', 'on'])
    result = json.loads(out.read_text())
    row = result['table']['UperNet']
    assert row['sizes'] == 2
    assert row['cases'] == ops.spent()[0] > 0
    assert not (tmp_path / 'cache').exists()  # the user's own
    assert f'UperNet: 2 sizes, {row["cases"]} cases, ' in capsys.readouterr().out
    assert result['commands']['UperNet'] == [
        'mmslak tune mmslak::upernet_slak_t_ade20k --shape 1 3 32 64',
        'mmslak tune mmslak::upernet_slak_t_ade20k --shape 1 3 64 32 --no-train',
    ]
    with pytest.raises(SystemExit):
        first_run.main([*arguments, '--tuning', 'off'])
    assert '--tuning off: nothing would be measured' in capsys.readouterr().err


def test_onnx_detector_pastes_masks_as_mmdet():
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    from onnx_detector import paste

    mask = torch.rand(28, 28, generator=torch.Generator().manual_seed(0))
    for box in ([3.2, 1.5, 17.9, 12.1], [-4.0, -2.5, 33.0, 9.0]):
        boxes = torch.tensor([box])
        expected, _ = _do_paste_mask(mask[None, None], boxes, 20, 30, skip_empty=False)
        found = torch.from_numpy(paste(mask.numpy(), box, 20, 30))
        torch.testing.assert_close(found.float(), expected[0], rtol=1e-4, atol=1e-4)


def test_onnx_detector_writes_run_lengths_as_coco_reads_them():
    from onnx_detector import run_lengths
    from pycocotools import mask as coco

    for rows in ([[0, 1], [1, 1], [0, 0]], [[1, 0], [0, 0], [0, 1]], [[0, 0]] * 3, [[1, 1]] * 3):
        pixels = torch.tensor(rows, dtype=torch.bool).numpy()
        counts = run_lengths(pixels)
        assert sum(counts) == 6
        encoded = coco.frPyObjects(dict(size=[3, 2], counts=counts), 3, 2)
        assert coco.decode(encoded).tolist() == rows


def test_detectors_by_onnxruntime_have_the_ap_of_pytorch():
    """Of every machine that has measured it."""
    from detectors_onnx import RESULTS, TOLERANCE

    files = list(RESULTS.glob('*/detectors_onnx_cpu.json'))
    assert files
    for file in files:
        table = json.loads(file.read_text())['table']
        assert {'Faster R-CNN', 'Cascade Mask R-CNN', 'RetinaNet'} <= table.keys()
        assert 'mask AP, PyTorch' in table['Cascade Mask R-CNN']
        for row in table.values():
            for name in ('box AP', 'mask AP'):
                if f'{name}, PyTorch' in row:
                    ours, theirs = (row[f'{name}, {by}'] for by in ('onnxruntime', 'PyTorch'))
                    assert abs(ours - theirs) <= TOLERANCE


@pytest.mark.usefixtures('same_process')
def test_deploy_end_to_end(tmp_path):
    import deploy

    pytest.importorskip('onnxruntime', reason='the extra `export` is not installed')
    out = tmp_path / 'result.json'
    ways = ['eager float32', 'eager bfloat16', 'onnxruntime']
    deploy.main(['--quick', '--ways', *ways, '--out', str(out)])
    rows = json.loads(out.read_text())['table']
    assert list(rows) == [
        *(f'eager {dtype}, {layout}' for dtype in deploy.DTYPES for layout in deploy.LAYOUTS),
        'onnxruntime float32',
    ]
    assert rows[deploy.REFERENCE]['latency at 64'] == 1
    for name, row in rows.items():
        low, high = (1e-3, 0.05) if 'bfloat16' in name else (1e-9, 1e-5)
        assert low < row['mean error at 64'] < high
        assert low < row['largest error at 64'] < high


def test_errors_are_those_of_the_worst_map():
    import deploy

    expected = [torch.tensor([1.0, -4.0]).double(), torch.tensor([2.0, 2.0]).double()]
    found = [torch.tensor([1.0, -3.0]), torch.tensor([2.0, 2.5])]
    assert deploy.errors(found, expected) == (0.25, 0.2)


def test_tables_of_results_that_have_their_own(tmp_path, monkeypatch):
    import tables

    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    facts = dict(device='CPU', torch='2', cores=2, instructions='amx_bf16', tuning='off')
    for name, row in (
        ('grid_cpu', {'cases': 3, 'not slower': 1.0, 'worst': 0.96, 'worst case': '3×3 on'}),
        ('deploy_cpu', {'latency at 64': 0.4, 'mean error at 64': 0.00123}),
    ):
        (tmp_path / 'here').mkdir(exist_ok=True)
        (tmp_path / 'here' / f'{name}.json').write_text(json.dumps(facts | {'table': {'a': row}}))
    assert tables.TABLES['grid_cpu'].draw().splitlines() == [
        '|  | cases | not slower | worst | worst case |',
        '| --- | --- | --- | --- | --- |',
        '| a | 3 | 1.00 | 0.96 | 3×3 on |',
        '',
        '*CPU, amx_bf16, 2 cores, torch 2, choices by the fixed rule.*',
    ]
    assert '| a | 0.40 | 1.2e-03 |' in tables.TABLES['deploy_cpu'].draw()


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_the_peak_of_memory_is_that_since_it_was_begun():
    import census

    def touch(size: int) -> None:
        with mmap.mmap(-1, size) as memory:  # fresh pages, not what was freed before
            for place in range(0, size, mmap.PAGESIZE):
                memory[place] = 1

    touch(2**28)  # of imports, or of the process that started this one
    before = census.begin_peak()
    touch(2**26)
    assert census.peak() - before == pytest.approx(1 / 16, abs=0.005)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_tables_of_the_docs_are_drawn_from_the_results(page):
    import tables

    text = page.read_text()
    assert tables.draw_into(text) == text, f'run: python benchmarks/tables.py --write {page}'


def test_means_over_seeds_and_differences_in_pairs_of_a_seed():
    seeds = importlib.import_module('seeds')
    scores = {
        'sparse': {0: {'accuracy': 90.0}, 1: {'accuracy': 94.0}, 2: {'accuracy': 92.0}},
        'dense': {
            0: {'accuracy': 91.0, 'mIoU': 50.0},
            1: {'accuracy': 95.5, 'mIoU': 50.0},
            2: {'accuracy': 92.5, 'mIoU': 53.0},
            3: {'accuracy': 10.0, 'mIoU': 10.0},
        },
        'same': {0: {'accuracy': 90.1}, 1: {'accuracy': 94.1}, 2: {'accuracy': 92.1}},
        'one': {1: {'accuracy': 93.0}},
        'none': {},
    }
    table = seeds.summary(scores)
    assert table['sparse'] == {'seeds': 3, 'accuracy mean': 92.0, 'accuracy deviation': 2.0}
    assert table['one'] == {'seeds': 1, 'accuracy mean': 93.0}
    assert table['none'] == {'seeds': 0}
    questions = {
        'zeros': [('dense', 'sparse'), ('one', 'sparse'), ('same', 'sparse')],
        'nothing': [('none', 'sparse'), ('sparse', 'unknown')],
    }
    first, one, same = seeds.compare(scores, questions)
    # Differences of 1, 1.5 and 0.5: t = 1 / (0.5 / √3) = 3.46 with 2 degrees of freedom, of which
    # 4.303 holds 95 %.
    assert first['p'] == pytest.approx(0.0742, abs=1e-4)
    half = 4.303 * 0.5 / 3**0.5
    assert (first['low'], first['high']) == pytest.approx((1 - half, 1 + half), abs=1e-3)
    names = ('question', 'variant', 'against', 'metric', 'seeds', 'difference')
    assert [first[n] for n in names] == ['zeros', 'dense', 'sparse', 'accuracy', 3, 1.0]
    assert [one[name] for name in names[1:]] == ['one', 'sparse', 'accuracy', 1, -1.0]
    # 90.1 - 90 and 94.1 - 94 differ by rounding alone, of which a test would make a certainty.
    assert [same[name] for name in names[4:]] == [3, 0.1]
    assert 'p' not in one
    assert 'p' not in same


@pytest.fixture
def claims(monkeypatch, tmp_path):
    """The script with runs that only count: the first one scores 1, and so on."""
    script = importlib.import_module('claims')
    script.seen, script.fields = [], []

    weights = {'backbone.a.weight': torch.tensor([0.0, 1.0, 2.0]), 'head.weight': torch.ones(4)}
    torch.save(dict(state_dict=weights), tmp_path / 'one.pth')

    def train_and_test(config, folder, options, metrics, stamp):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'last_checkpoint').write_text(str(tmp_path / 'one.pth'))
        script.seen.append((folder.parent.name, metrics[0], options))
        return tmp_path / 'one.pth', [float(len(script.seen))]

    def measure(command, arguments, log):
        script.fields.append(arguments)
        out = Path(arguments[arguments.index('--out') + 1])
        out.mkdir()
        report = {'model': dict(area_ratios={'20%': 0.125, '99%': 1.0}, pictures=10)}
        (out / 'erf.json').write_text(json.dumps(report))

    def call(command, arguments, log):
        Path(arguments[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments[1]).write_bytes(b'')
        text = 'model = dict(backbone=dict(hidden_channels=[[1, 2], [3]]))'
        Path(arguments[1]).with_suffix('.py').write_text(text)
        return 'hidden units: 5, 3 left'

    def main(*words: str) -> dict:
        folders = ['--data', str(tmp_path), '--work-dir', str(tmp_path / 'work')]
        script.main([*folders, *words, '--out', str(tmp_path / 'out.json')])
        return json.loads((tmp_path / 'out.json').read_text())

    monkeypatch.setattr(script, 'train_and_test', train_and_test)
    monkeypatch.setattr('mmslak.cli.run_demo_compact.call', call)
    monkeypatch.setattr(script, 'call', measure)
    monkeypatch.setattr(script, 'make_digit_scenes', lambda *args, **kwargs: True)
    monkeypatch.setattr(script, 'sources', lambda: 'first')
    monkeypatch.setenv('OMP_NUM_THREADS', '7')  # so that it is as before afterwards
    (tmp_path / 'digit_scenes.json').write_text('{}')
    return argparse.Namespace(main=main, seen=script.seen, script=script, work=tmp_path / 'work')


def test_claims_train_every_variant_in_turn(claims):
    result = claims.main('--seeds', '0', '1', '--variants', 'zeros')
    one_seed = [
        *(('dense', 'accuracy/top1'), ('dense', 'mIoU')),
        *(('single_weights', 'accuracy/top1'), ('single_weights', 'mIoU')),
        ('single_weights_static', 'accuracy/top1'),
        *(('hidden_units', 'accuracy/top1'), ('hidden_units', 'mIoU')),
        *(('hidden_units_moving', 'accuracy/top1'), ('2_4', 'accuracy/top1')),
    ]
    assert [(name, metric) for name, metric, _ in claims.seen] == [
        (f'{name}_{seed}', metric) for seed in (0, 1) for name, metric in one_seed
    ]
    (options,) = (o for name, m, o in claims.seen if (name, m) == ('hidden_units_1', 'mIoU'))
    assert 'model.backbone.hidden_channels=[[1,2],[3]]' in options
    assert result['scores']['dense'] == {
        '0': {'accuracy': 1, 'mIoU': 2},
        '1': {'accuracy': 10, 'mIoU': 11},
    }
    assert result['nonzeros']['2:4'] == {'0': 2, '1': 2}
    assert os.environ['OMP_NUM_THREADS'] == '7'


def test_claims_go_on_where_they_were_stopped(claims, monkeypatch):
    variants = ['--variants', 'dense', '2:4']
    first = claims.main(*variants, '--seeds', '1')
    assert first['scores'] == {
        'dense': {'1': {'accuracy': 1, 'mIoU': 2}},
        '2:4': {'1': {'accuracy': 3}},
    }
    monkeypatch.setattr(claims.script, 'sources', lambda: 'second')
    both = claims.main(*variants, '--seeds', '1', '0', '--resume', '--jobs', '2')
    assert {name for name, _, _ in claims.seen[3:]} == {'dense_0', '2_4_0'}
    assert both['scores']['dense']['1'] == first['scores']['dense']['1']
    assert list(both['scores']['dense']) == ['0', '1']
    assert both['package'] == ['first', 'second']
    assert int(os.environ['OMP_NUM_THREADS']) < 7
    # Without --resume, what another state of the package did is done again; so are other settings.
    claims.main('--variants', '2:4', '--seeds', '1')
    claims.main('--variants', '2:4', '--seeds', '1', '--resume', '--quick')
    assert [name for name, _, _ in claims.seen[6:]] == ['2_4_1', '2_4_1']


def test_claims_go_on_from_their_result_on_another_machine(claims, capsys):
    """The file of --out is in the repository; the work folder is not."""
    names = ['dense', 'single weights', 'student']
    first = claims.main('--seeds', '0', '1', '--variants', *names)
    claims.work.rename(claims.work.with_name('elsewhere'))
    done = len(claims.seen)
    both = claims.main('--seeds', '0', '1', '--variants', 'dense', '2:4', '--resume')
    assert [name for name, _, _ in claims.seen[done:]] == ['2_4_0', '2_4_1']
    assert list(both['scores']) == ['dense', 'single weights', '2:4', 'student']
    for part in ('scores', 'runs', 'nonzeros'):
        assert {name: both[part][name] for name in first[part]} == first[part]
    # A teacher's weights are in the work folder alone: only its own students need them.
    claims.main('--seeds', '0', '1', '--variants', *names, '--resume')
    assert len(claims.seen) == done + 2
    with pytest.raises(SystemExit):
        claims.main('--seeds', '0', '--variants', 'zeros', 'distilled student', '--resume')
    assert 'the teacher "single weights" of seed 0 is to be' in capsys.readouterr().err
    # Settings that differ are not the same run.
    last = claims.main('--seeds', '0', '--variants', 'dense', '--half', '--resume')
    assert list(last['scores']) == ['dense']


def test_claims_of_half_the_steps_train_the_same_otherwise(claims):
    """The options reach what they are to halve; an arm's own settings win over them."""
    claims.main('--seeds', '0', '--half', '--variants', 'zeros')
    for config, name, metric, after in (
        ('slak_digits', 'dense_0', 'accuracy/top1', (6, 50)),
        ('slak_digits', 'single_weights_static_0', 'accuracy/top1', (6, 0)),
        ('upernet_slak_digit_scenes', 'dense_0', 'mIoU', (200, 0)),
    ):
        (options,) = (o for n, m, o in claims.seen if (n, m) == (name, metric))
        cfg = Config.fromfile(ROOT / f'configs/demo/{config}.py')
        key = 'max_epochs' if metric == 'accuracy/top1' else 'max_iters'
        whole = cfg.train_cfg[key]
        pairs = (option.split('=', 1) for option in options)
        cfg.merge_from_dict({k: int(v) if v.isdigit() else v for k, v in pairs})
        assert cfg.train_cfg[key] * 2 == whole
        ends = cfg.param_scheduler[1].end, cfg.default_hooks.checkpoint.interval
        assert (cfg.train_cfg[key], *ends) == (after[0],) * 3
        hook = cfg.custom_hooks[0]
        assert hook.get('update_interval', 0) == after[1]


def test_claims_of_earlier_variants_stay_valid(claims):
    """What is added to a variant changes nothing for those that do without it."""
    claims.main('--seeds', '3', '--half', '--variants', 'dense')
    config, scenes = 'mmslak::demo/slak_digits.py', 'mmslak::demo/upernet_slak_digit_scenes.py'
    zeros = ('custom_hooks.0.sparsity=0', 'custom_hooks.0.init=uniform')
    texts = [Config.fromfile(name).pretty_text for name in (config, scenes)]
    before = repr(((config, zeros, True, False), 3, True, False))
    scores = json.loads((claims.work / 'dense_3/scores.json').read_text())
    digest = claims.script.digest
    assert scores['settings'] == digest(*texts, before, digest('{}'))


def test_claims_answer_each_question_from_runs_of_the_same_seeds(claims, capsys):
    script = claims.script
    for pairs in script.QUESTIONS.values():
        assert {name for pair in pairs for name in pair} <= script.VARIANTS.keys()
    result = claims.main('--seeds', '0', '1', '--half')
    assert list(result['scores']) == list(script.VARIANTS)
    assert {row['question'] for row in result['pairs']} == script.QUESTIONS.keys()
    assert {row['seeds'] for row in result['pairs']} == {2}
    found = result['scores']['square 31']['1']
    assert (found['area 20%'], found['area 99%']) == (12.5, 100)
    fields = [words for words in claims.script.fields if 'square_31_1' in str(words)]
    assert 'model.backbone.kernel_sizes=[31,31,19,9]' in fields[0]
    # The teacher is the run of the same seed; a student has all steps.
    names = [name for name, _, _ in claims.seen]
    assert names.index('single_weights_1') < names.index('student_1')
    for name, *weight in (('student_1', 'model.loss.weight=0.0'), ('distilled_student_1',)):
        ((metric, options),) = ((m, o) for n, m, o in claims.seen if n == name)
        assert metric == 'mIoU'
        assert [option for option in options if 'loss' in option] == weight
        assert not [option for option in options if 'max_iters' in option]
    assert capsys.readouterr().out.count(' runs left, about 0 minutes') == 2 * len(script.VARIANTS)


def test_claims_of_students_need_their_teacher(claims, capsys):
    with pytest.raises(SystemExit):
        claims.main('--seeds', '0', '--variants', 'student')
    assert 'the teacher "single weights" of seed 0 is to be trained' in capsys.readouterr().err
    claims.main('--seeds', '0', '--variants', 'single weights')
    assert 'mIoU' in claims.main('--seeds', '0', '--variants', 'student')['scores']['student']['0']
    # With two jobs it waits for its teacher.
    both = claims.main('--seeds', '1', '--jobs', '2', '--variants', 'distillation', 'zeros')
    assert list(both['scores'])[-2:] == ['student', 'distilled student']


def test_claims_choose_settings_on_training_pictures(claims, capsys, tmp_path):
    for kind in (
        'cls/train/0',
        'cls/val/0',
        *(f'ade/{k}/training' for k in ('images', 'annotations')),
    ):
        (tmp_path / kind).mkdir(parents=True)
        for i in range(11):
            (tmp_path / kind / f'{kind[:3]}_{i:02}.png').write_bytes(kind.encode())
    data = tmp_path.with_name(f'{tmp_path.name}_development')
    result = claims.main('--settings', '--seeds', '10', '11', '--half')
    of = {(str(one.parent.relative_to(data)), one.stem) for one in data.rglob('*.png')}
    for kind, parts in (('cls', ('train/0', 'val/0')), ('ade', ('training', 'validation'))):
        for folder in ('cls/',) if kind == 'cls' else ('ade/images/', 'ade/annotations/'):
            for part, held_out in zip(parts, (False, True), strict=True):
                found = {name for where, name in of if where == folder + part}
                assert found == {f'{kind}_{i:02}' for i in range(11) if (i % 5 == 4) == held_out}
    assert b'val' not in {one.read_bytes()[4:7] for one in data.rglob('*.png')}
    # Scores grow from run to run: here the second of three has more than the first, and so on.
    rates = claims.script.RATES
    assert list(result['scores']) == list(rates)
    for name, metric, options in claims.seen:
        rate = {'half': '0.001', 'the_': '0.002', 'twic': '0.004'}[name[:4]]
        assert f'optim_wrapper.optimizer.lr={rate}' in options
        assert f'data_root={data / ("ade" if metric == "mIoU" else "cls")}' in options
    assert result['chosen'] == 'twice of them'
    assert 'chosen: twice of them' in capsys.readouterr().out
    assert {row['question'] for row in result['pairs']} == {'settings'}


@pytest.mark.parametrize(
    ('half', 'twice', 'expected'),
    [
        ((1, 2, 3), (0, 0, 0), 'half of them'),
        ((1, 2, 3), (2, 3, 4), 'twice of them'),
        ((-1, -2, -3), (-1, 0, 2), "the demo's rates"),  # 0.33 ± 0.88
        ((-1, -2, -3), (0, 0, 0), "the demo's rates"),
        ((1, 1, 1), (0, 0, 0), 'half of them'),
    ],
)
def test_claims_leave_the_demos_rates_unless_others_are_clearly_better(half, twice, expected):
    claims = importlib.import_module('claims')
    scores = {
        name: {seed: {'mIoU': 50.0 + value} for seed, value in enumerate(values)}
        for name, values in zip(claims.RATES, (half, (0, 0, 0), twice), strict=True)
    }
    assert claims.chosen_rates(scores) == expected


def test_claims_tell_the_time_left():
    claims = importlib.import_module('claims')
    known = {'a': [10, 20], 'b': [60]}
    assert claims.seconds_left({}, ['a'], 1) is None
    # Of c nothing is known: it takes as long as the mean of the three.
    assert claims.seconds_left(known, ['a', 'a', 'b', 'c'], 2) == (15 + 15 + 60 + 30) / 2


@pytest.mark.parametrize('config', ['slak_digits', 'upernet_slak_digit_scenes'])
def test_claims_build_the_kernels_that_they_name(config):
    claims = importlib.import_module('claims')
    cfg = Config.fromfile(ROOT / f'configs/demo/{config}.py')
    for name, sizes in (
        ('decomposed 7', {(7, 5), (5, 7), (5, 5)}),
        ('square 15', {(15, 15), (9, 9), (5, 5)}),
        ('decomposed 51', {(s, 5) for s in (51, 39, 19, 9, 5)} | {(5, s) for s in (51, 39, 19, 9)}),
    ):
        backbone = _built(cfg, claims.VARIANTS[name].backbone).backbone
        kernels = [m.kernel_size for m in backbone.modules() if isinstance(m, DepthwiseConv2d)]
        assert set(kernels) == sizes


@pytest.mark.parametrize('name', ['single weights, wide', 'dense, wide'])
def test_claims_of_wide_models_fit_together(name):
    claims = importlib.import_module('claims')
    cfg = Config.fromfile(ROOT / 'configs/demo/slak_digits.py')
    model = _built(cfg, claims.VARIANTS[name].options).eval()
    assert list(model.backbone.channels) == [41, 83, 166, 332]
    assert model(torch.zeros(1, 3, 64, 64), mode='tensor').shape == (1, 10)


def _built(cfg: Config, options: tuple[str, ...]) -> nn.Module:
    """The model of a config with what `--cfg-options` would change."""
    cfg = copy.deepcopy(cfg)
    values = (option.split('=', 1) for option in options)
    cfg.merge_from_dict({key: OptionsAction._parse_iterable(text) for key, text in values})
    if 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize(('name', 'weight'), [('student', 0.0), ('distilled student', 3.0)])
def test_claims_of_students_reach_teacher_and_loss(claims, name, weight):
    claims.main('--seeds', '0', '--quick', '--variants', 'single weights', name)
    (options,) = (options for of, _, options in claims.seen if of.startswith(name.split()[0]))
    cfg = Config.fromfile(ROOT / 'configs/demo/upernet_l2s_digit_scenes.py')
    values = (option.split('=', 1) for option in options)
    apply_options(cfg, {key: OptionsAction._parse_iterable(text) for key, text in values})
    model = _built(cfg, ())
    assert model.teacher.checkpoint == str(claims.work.parent / 'one.pth')
    assert model.distillation_loss.weight == weight
    assert cfg.train_cfg.max_iters == 2


def test_claims_end_to_end(tmp_path, monkeypatch, capsys):
    """A few real steps with other kernels, and the receptive field that they have then."""
    claims = importlib.import_module('claims')
    monkeypatch.setattr(run_demo, 'subprocess', forks.SUBPROCESS)
    out = tmp_path / 'result.json'
    folders = ['--data', str(tmp_path / 'data'), '--work-dir', str(tmp_path / 'work')]
    variants = ['--variants', 'square 51', '--seeds', '0']
    claims.main(['--quick', *variants, *folders, '--out', str(out)])
    assert ' 0 runs left' in capsys.readouterr().out
    result = json.loads(out.read_text())
    found = result['scores']['square 51']['0']
    shares = ('20%', '30%', '50%', '99%')
    assert list(found) == ['accuracy', 'mIoU', *(f'area {share}' for share in shares)]
    areas = [found[f'area {share}'] for share in shares]
    assert areas == sorted(areas)
    assert 0 < areas[0] < areas[-1] <= 100
    state = read_state_dict(tmp_path / 'work/square_51_0/digits/epoch_1.pth')
    assert state['backbone.stages.0.0.large_kernel.square.conv.weight'].shape[2:] == (51, 51)
    state = {k: v for k, v in state.items() if k.startswith('backbone.')}
    weights = [v for k, v in state.items() if not k.endswith(('mean', 'var', 'tracked'))]
    count = sum(int((weight != 0).sum()) for weight in weights)
    assert result['nonzeros'] == {'square 51': {'0': count}}


@pytest.fixture
def evidence() -> dict:
    """A result of claims.py in which two kernels of one form are done, and half of a pair."""
    row = {'accuracy mean': 91.25, 'accuracy deviation': 0.5, 'seeds': 2}
    single = {'accuracy mean': 95.0, 'seeds': 1}
    pair = dict(question='kernel size', variant='square 15', against='square 7', seeds=2)
    return dict(
        **dict(device='CPU', torch='2', cores=2, half=True),
        table={'square 7': row, 'square 15': single, 'dense': row},
        nonzeros={'square 7': {'0': 1234, '1': 1234}},
        pairs=[
            pair | dict(metric='accuracy', difference=3.75, low=-1.0, high=8.5, p=0.0612),
            pair | dict(metric='mIoU', difference=2.0, low=1.0, high=3.0, p=0.012),
            pair | dict(metric='area 20%', difference=-1.0),
        ],
    )


def test_tables_of_evidence(tmp_path, monkeypatch, evidence):
    import tables

    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    (tmp_path / 'here').mkdir()
    (tmp_path / 'here/claims_cpu.json').write_text(json.dumps(evidence))
    assert tables.TABLES['claims_kernel_size'].draw().splitlines() == [
        '|  | accuracy | non-zeros | seeds |',
        '| --- | --- | --- | --- |',
        '| square 7 | 91.2 ± 0.5 | 1,234 | 2 |',
        '| square 15 | 95.0 |  | 1 |',
        '',
        "*CPU, 2 cores, torch 2, half of the demo's steps.*",
        '',
        '![Scores and receptive fields by kernel](images/kernels.svg)',
    ]
    lines = tables.TABLES['claims_kernel_size_pairs'].draw().splitlines()
    assert lines[0] == '|  | compared with | accuracy | mIoU | area 20% |'
    assert lines[2] == (
        '| square 15 | square 7 | +3.8 (-1.0 to +8.5), p = 0.061 '
        '| **+2.0 (+1.0 to +3.0), p = 0.012** | -1.0 |'
    )
    # Nothing is known of the others: neither a table nor a picture.
    for name in ('claims_kernel_form', 'claims_width', 'claims_zeros_pairs'):
        assert tables.TABLES[name].draw() == 'Not measured yet.'


def test_picture_of_evidence(tmp_path, evidence):
    pictures = importlib.import_module('claims_pictures')
    result, out = tmp_path / 'claims_cpu.json', tmp_path / 'kernels.svg'
    result.write_text(json.dumps(evidence))
    pictures.main(['--result', str(result), '--out', str(out)])
    first = out.read_bytes()
    for text in (b'mIoU, %', b'decomposed, 99%', b'kernel size'):
        assert text in first
    assert len(first) < 100_000
    pictures.main(['--result', str(result), '--out', str(out)])
    assert out.read_bytes() == first
    assert b'<dc:description>accuracy of square 7: 91.250; accuracy of square 15: 95.000<' in first


def test_the_picture_shows_what_is_committed():
    pictures = importlib.import_module('claims_pictures')
    shown = pictures.OUT.read_text()
    results = [json.loads(file.read_text()) for file in pictures.RESULTS.glob('*/claims_cpu.json')]
    assert any(f'<dc:description>{pictures.description(r["table"])}<' in shown for r in results)
