"""Which plan a call gets: restored, on disk, shipped, measured, near, or by the rule."""

import ast
import contextlib
import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from mmslak.ops import (
    DepthwiseConv2d,
    choice,
    choices,
    depthwise,
    depthwise_conv2d,
    depthwise_conv2d_branches,
    depthwise_conv2d_sum,
    plans,
    restore_choices,
    spent,
    tuner,
    tuning,
    tuning_mode,
)
from mmslak.ops.choice import choose, tell_measured
from mmslak.ops.layouts import NCHW, NHWC
from mmslak.ops.methods import METHODS, Method
from mmslak.ops.plans import Case, Plan, Store
from mmslak.ops.rule import rule
from tests.tuning_state import begin_anew

FFT = Plan(('fft',), ('fft',), ('fft',))
MEASURE, CONV2D = tuner.measure, F.conv2d


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Measuring is on, with an empty cache and a made-up result; gives the cases that were."""
    begin_anew(monkeypatch, tmp_path)
    cases = []

    def measure(case, other, end):
        cases.append(case)
        return FFT

    monkeypatch.setattr(tuner, 'measure', measure)
    with tuning('on'):
        yield cases


def inputs(*sizes, n=1, channels=2, height=20, width=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, height, width, generator=generator).to(dtype)
    return x, [torch.randn(channels, 1, *s, generator=generator).to(dtype) for s in sizes]


def chosen(*sizes, **options):
    return choose('auto', *inputs(*sizes, **options), False)


def test_a_case_is_measured_once(measured, monkeypatch):
    assert chosen((5, 3)) == chosen((5, 3)) == FFT
    assert len(measured) == spent()[0] == 1
    begin_anew(monkeypatch)
    assert chosen((5, 3)) == FFT
    assert len(measured) == 1


@pytest.mark.parametrize(
    ('seconds', 'limit'),
    [(None, 'at most 60 s'), (0.5, 'at most 0.5 s'), (math.inf, 'without a limit')],
)
def test_the_message_says_what_measuring_may_take(measured, caplog, seconds, limit):
    with tuning('on', seconds):
        chosen((5, 3))
    said = f'fast here (once for each shape and number of threads, {limit}; to '
    assert said in caplog.text


def test_what_was_measured_is_told_once(measured, caplog):
    tell_measured()
    assert 'so far' not in caplog.text
    chosen((5, 3))
    tell_measured(), tell_measured()
    assert re.findall(r'measured (.*) in \d+\.\d s so far', caplog.text) == ['1 case']
    chosen((7, 3))
    assert 'measured 2' not in caplog.text
    tell_measured()
    assert 'measured 2 cases' in caplog.text


def test_what_was_measured_is_told_when_the_time_is_over(measured, caplog):
    with tuning('on', 1e-9):
        chosen((5, 3))
    assert 'measured 1 case in' in caplog.text


def test_cases_of_one_bucket_share_a_plan(measured):
    for size in (17, 20, 24):
        chosen((5, 3), height=size, width=24)
    assert len(measured) == 1
    for change in (
        dict(height=25),
        dict(width=16),
        dict(n=2),
        dict(channels=3),
        dict(dtype=torch.float64),
    ):
        chosen((5, 3), **change)
    chosen((3, 5))
    chosen((5, 3), (3, 5))
    assert len(measured) == 8
    chosen((5, 3), n=3)
    chosen((5, 3), n=4)
    assert len(measured) == 9


def test_what_is_wanted_is_part_of_the_case(measured):
    x, weights = inputs((5, 3))
    depthwise_conv2d(x, weights[0])
    depthwise_conv2d(x.requires_grad_(), weights[0])
    depthwise_conv2d(x, weights[0].requires_grad_())
    with torch.no_grad():
        depthwise_conv2d(x, weights[0])
    depthwise_conv2d(x.detach(), weights[0])
    parts = [case.part for case in measured]
    assert parts == ['forward', 'training-x', 'training-xw', 'training-w']


def test_explicit_backends_and_empty_batches_are_not_measured(measured):
    x, weights = inputs((5, 3))
    assert choose('native', x, weights, False) == Plan(('native',), ('native',), ('native',))
    assert choose('auto', x[:0], weights, False).plain
    assert not measured


def test_read_measures_nothing(measured, monkeypatch):
    chosen((5, 3))
    begin_anew(monkeypatch)
    with tuning('read'):
        assert chosen((5, 3)) == FFT
        assert chosen((5, 3), height=100) == FFT  # the nearest
        x, weights = inputs((3, 3))
        assert choose('auto', x, weights, False) == rule(Case.of(x, weights, False))
    assert len(measured) == 1


def test_what_could_not_be_measured_is_measured_once_it_may_be(measured):
    x, weights = inputs((13, 3))
    by_rule = rule(Case.of(x, weights, False))
    with tuning('read'):
        assert chosen((13, 3)) == by_rule != FFT
        saved = choices()
    with tuning('on', seconds=0):
        assert chosen((13, 3)) == by_rule
    assert choices() == saved
    assert not measured
    assert chosen((13, 3)) == chosen((13, 3), height=24) == FFT
    assert len(measured) == 1
    with tuning('read'):
        assert chosen((13, 3)) == FFT


def test_a_restored_plan_is_not_measured_after_a_mode_ends(measured):
    with tuning('read'):
        plan = chosen((13, 3))
        restore_choices(choices())
        chosen((13, 3))
    assert chosen((13, 3)) == plan
    assert not measured


def test_shapes_of_a_bucket_share_the_plan_that_is_measured_late(measured):
    try:
        torch.use_deterministic_algorithms(True)
        chosen((13, 3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert chosen((13, 3), height=24) == chosen((13, 3)) == FFT
    assert len(measured) == 1


def test_a_case_that_cannot_be_measured_is_tried_once(measured, monkeypatch):
    monkeypatch.setattr(tuner, 'measure', lambda case, *_: measured.append(case))
    x, weights = inputs((13, 3))
    assert chosen((13, 3)) == chosen((13, 3), height=24) == rule(Case.of(x, weights, False))
    assert len(measured) == 1


def test_off_is_the_rule(measured):
    chosen((5, 3))
    x, weights = inputs((5, 3))
    with tuning('off'):
        assert choose('auto', x, weights, False) == rule(Case.of(x, weights, False)) != FFT


def test_modes(monkeypatch):
    with tuning('read'):
        assert tuning_mode() == 'read'
        with tuning('on'):
            assert tuning_mode() == 'on'
        assert tuning_mode() == 'read'
    with pytest.raises(ValueError, match="tuning: expected one of on, read, off, got 'yes'"):
        tuning('yes')
    monkeypatch.setattr(choice, '_mode', None)
    monkeypatch.setenv('MMSLAK_TUNING', 'of')
    with pytest.raises(ValueError, match="MMSLAK_TUNING: expected one of on, read, off, got 'of'"):
        tuning_mode()
    monkeypatch.setenv('MMSLAK_TUNING', 'READ')
    assert tuning_mode() == 'read'
    monkeypatch.setattr(choice, '_mode', None)
    monkeypatch.delenv('MMSLAK_TUNING')
    assert tuning_mode() == 'on'


def test_beyond_the_budget_the_nearest_counts_and_then_the_rule(measured, monkeypatch):
    chosen((5, 3))
    monkeypatch.setattr(choice, '_spent', 60.0)
    assert chosen((5, 3), n=8, height=200) == FFT
    x, weights = inputs((13, 3))
    assert choose('auto', x, weights, False) == rule(Case.of(x, weights, False))
    assert len(measured) == 1
    with tuning('on', seconds=61.0):
        assert chosen((17, 3)) == FFT


def test_of_near_ones_the_nearest(measured, monkeypatch):
    near = Plan(('turned',), (), ())
    plans_of = dict(zip((12, 96), (near, FFT), strict=True))
    monkeypatch.setattr(tuner, 'measure', lambda case, *_: plans_of[case.bucket[1]])
    chosen((5, 3), height=12)
    chosen((5, 3), height=96)
    with tuning('read'):
        assert chosen((5, 3), height=16) == near
        assert chosen((5, 3), height=64) == FFT


def test_near_cases_are_no_model_for_one_that_never_ends(measured, monkeypatch):
    near = Plan(('conv',), ('conv',), ('conv',), plain=True)
    monkeypatch.setattr(tuner, 'measure', lambda *_: near)
    options = dict(dtype=torch.bfloat16, width=24)
    assert chosen((17, 17), height=24, **options) == near
    with tuning('read'):
        assert chosen((17, 17), height=12, **options) == near
        assert chosen((17, 17), height=25, **options) == FFT


def test_deterministic_runs_measure_nothing(measured):
    try:
        torch.use_deterministic_algorithms(True)
        chosen((5, 3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not measured


def test_nothing_is_measured_while_a_graph_is_captured(measured, monkeypatch):
    case = Case(
        torch.device('cuda'), torch.float32, torch.contiguous_format, (1, 2, 8, 8), ((5, 3),), False
    )
    monkeypatch.setattr(choice, 'facts', lambda device, threads: dict(device='a GPU'))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    plan, final = choice._find(case, 1)
    assert (plan.plain, final, measured) == (True, False, [])
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    assert choice._find(case, 1) == (FFT, True)


@pytest.mark.parametrize(
    'content', ['', '{"version": 1, "plans": {}}', '[]', '{"version": 9}', '\0']
)
def test_a_file_that_cannot_be_read_is_written_anew(measured, monkeypatch, content, caplog):
    chosen((5, 3))
    (store,) = choice._stores.values()
    store.path.write_text(content)
    begin_anew(monkeypatch)
    assert chosen((5, 3)) == FFT
    assert len(measured) == 2
    assert f'{store.path} cannot be read' in caplog.text
    assert len(json.loads(store.path.read_text())['plans']) == 1


def test_a_plan_of_unknown_methods_is_not_taken(measured, monkeypatch):
    chosen((5, 3))
    (store,) = choice._stores.values()
    store.path.write_text(store.path.read_text().replace('"fft"', '"of tomorrow"'))
    begin_anew(monkeypatch)
    assert chosen((5, 3)) == FFT
    assert len(measured) == 2


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_that_cannot_be_written(measured, tmp_path, caplog):
    tmp_path.chmod(0o500)
    assert chosen((5, 3)) == chosen((5, 3)) == FFT
    assert len(measured) == 1
    assert caplog.text.count('measured choices are not kept') == 1


def test_a_file_in_the_place_of_the_folder(measured, tmp_path, monkeypatch, caplog):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('MMSLAK_CACHE', str(tmp_path / 'file'))
    assert chosen((5, 3)) == chosen((5, 3), (3, 5)) == FFT
    assert len(measured) == 2
    assert caplog.text.count('measured choices are not kept') == 1


@pytest.mark.parametrize('name', ['torch', 'device', 'threads', 'source', 'allocator'])
def test_another_version_or_machine_measures_anew(measured, monkeypatch, name):
    chosen((5, 3))
    begin_anew(monkeypatch)
    values = plans.facts(torch.device('cpu'), torch.get_num_threads())
    monkeypatch.setattr(choice, 'facts', lambda *_: values | {name: 'another'})
    chosen((5, 3))
    assert len(measured) == 2


def test_shipped_tables(measured, monkeypatch, tmp_path):
    values = plans.facts(torch.device('cpu'), torch.get_num_threads())
    x, weights = inputs((5, 3))
    key = Case.of(x, weights, False).key
    tables = tmp_path / 'tables'
    tables.mkdir()
    monkeypatch.setattr(plans, 'TABLES', tables)
    plans.write_table(tables / 'here.json', values | dict(torch='older'), {key: FFT})
    plans.write_table(tables / 'there.json', values | dict(device='b'), {key: Plan(('rows',))})
    assert choose('auto', x, weights, False) == FFT
    assert not measured


def test_what_was_measured_here_counts_more_than_a_shipped_table(measured, monkeypatch, tmp_path):
    assert chosen((5, 3)) == FFT
    (store,) = choice._stores.values()
    (tmp_path / 'tables').mkdir()
    here = tmp_path / 'tables/here.json'
    plans.write_table(here, store.facts, dict.fromkeys(store.plans, Plan(('native',))))
    begin_anew(monkeypatch)
    monkeypatch.setattr(plans, 'TABLES', here.parent)
    assert chosen((5, 3)) == FFT
    assert Store(store.facts, tmp_path / 'empty').shipped.keys() == store.plans.keys()


@pytest.mark.parametrize('name', ['device', 'threads', 'allocator'])
def test_tables_of_other_machines_and_settings_are_not_taken(monkeypatch, tmp_path, name):
    monkeypatch.setattr(plans, 'TABLES', tmp_path)
    values = plans.facts(torch.device('cpu'), torch.get_num_threads())
    plans.write_table(tmp_path / 'a.json', values, {'key': FFT})
    assert Store(values, tmp_path / 'empty').shipped == {'key': FFT}
    assert not Store(values | {name: 'another'}, tmp_path / 'empty').shipped


WRONG = ['', '[]', '\0', '{"version": 9}', '{"version": 1, "facts": {}}']
WRONG += [f'{{"version": 1, "facts": {{}}, "plans": {{"a": {plan}}}}}' for plan in (
    '3', '[1]', '"fft!"', '[["fft"], [], []]', '[["fft"], [], [], 1]', '[[3], [], [], true]',
    '[[], [], [], false]', '[["fft"], [], [], [], true]', '[["fft"], "fft", [], true]',
)]  # fmt: skip


@pytest.mark.parametrize('content', WRONG)
def test_a_damaged_table_is_passed_over_with_one_warning(monkeypatch, tmp_path, caplog, content):
    monkeypatch.setattr(plans, 'TABLES', tmp_path)
    values = plans.facts(torch.device('cpu'), torch.get_num_threads())
    (tmp_path / 'a.json').write_text(content)
    plans.write_table(tmp_path / 'b.json', values, {'key': FFT})
    for _ in range(2):
        assert Store(values, tmp_path / 'empty').shipped == {'key': FFT}
    assert caplog.text.count(f'{tmp_path}/a.json is passed over: ') == 1


def test_every_shipped_table_can_be_used(tmp_path):
    example = tmp_path / 'example.json'
    plans.write_table(example, plans.facts(torch.device('cpu'), 1), {'key': FFT})
    for path in (example, *plans.TABLES.glob('*.json')):
        machine, found = plans.read_table(path)
        assert machine['device'], path
        assert found, path
        for plan in found.values():
            assert choice._known(plan) == plan, path


def test_processes_keep_what_the_others_have_found(tmp_path):
    first, second = (Store(dict(device='a'), tmp_path) for _ in range(2))
    first.add({'a': FFT})
    second.add({'b': FFT})
    assert Store(dict(device='a'), tmp_path).plans == {'a': FFT, 'b': FFT}
    assert not Store(dict(device='b'), tmp_path).plans


def test_two_processes_at_once_measure_once(tmp_path):
    code = (
        'import time, torch; from mmslak.ops import choice, depthwise_conv2d as f, spent, tuner\n'
        'measure = tuner.measure\n'
        'tuner.measure = lambda *arguments: (time.sleep(2.0), measure(*arguments))[1]\n'
        'f(torch.ones(1, 4, 20, 20), torch.ones(4, 1, 13, 3)); print(spent()[0])'
    )
    environment = {**os.environ, 'MMSLAK_CACHE': str(tmp_path), 'MMSLAK_TUNING': 'on'}
    command = [sys.executable, '-c', code]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert sorted(process.communicate()[0] for process in processes) == ['0\n', '1\n']


def test_choices_of_a_run_come_back(measured, monkeypatch, tmp_path):
    chosen((5, 3))
    saved = json.loads(json.dumps(choices()))
    begin_anew(monkeypatch)
    monkeypatch.setenv('MMSLAK_CACHE', str(tmp_path / 'empty'))
    monkeypatch.setattr(tuner, 'measure', lambda *_: Plan(('native',), ('native',), ('native',)))
    restore_choices(saved)
    assert chosen((5, 3)) == FFT
    assert chosen((5, 3), n=2).forward == ('native',)
    assert choices().keys() > saved.keys()
    with pytest.raises(ValueError, match='no plan: 5'):
        restore_choices({'key': 5})


def test_choices_of_a_run_count_more_than_what_is_on_disk(measured, monkeypatch):
    chosen((5, 3))
    saved = {key: Plan(('native',), ('native',), ('native',)).to_json() for key in choices()}
    restore_choices(saved)
    assert chosen((5, 3)).forward == ('native',)


def test_for_real_in_a_new_process(tmp_path):
    """The second start measures nothing, and computes the same."""
    code = (
        'import torch; from mmslak.ops import depthwise_conv2d_branches as f, choices, spent\n'
        'x = torch.ones(1, 4, 20, 20, requires_grad=True)\n'
        'w = [torch.ones(4, 1, 13, 3, requires_grad=True), torch.ones(4, 1, 3, 13)]\n'
        'f(x, w)[0].sum().backward(); print(spent()[0] > 0, choices())'
    )
    environment = {**os.environ, 'MMSLAK_CACHE': str(tmp_path), 'MMSLAK_TUNING': 'on'}

    def run():
        command = [sys.executable, '-c', code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split(' ', 1), done.stderr

    (measured, first), log = run()
    assert measured == 'True'
    assert log.count('measuring which convolutions are fast here') == 1
    (measured, again), log = run()
    assert (measured, log) == ('False', '')
    (key,) = ast.literal_eval(again)  # its parts are not looked up again
    assert ast.literal_eval(again)[key] == ast.literal_eval(first)[key]


whole_graphs = pytest.mark.skipif(
    not hasattr(torch.library, 'custom_op'), reason='torch 2.1 splits the graph'
)


@whole_graphs
def test_compiled_graphs_are_whole_and_measure_when_they_are_traced(measured):
    x, weights = inputs((13, 3), (3, 13))
    x.requires_grad_()

    @torch.compile(backend='aot_eager', fullgraph=True)
    def function(x):
        return sum(depthwise_conv2d_branches(x, weights))

    function(x).sum().backward()
    # The node computes the output alone, and its backward one the gradient.
    assert [case.part for case in measured] == ['training-x', 'forward']


@whole_graphs
def test_compiled_graphs_of_any_size_measure_when_they_run(measured):
    graphs, compiled = graphs_of(depthwise_conv2d, dynamic=True)
    for width in (24, 60):
        x, weights = inputs((13, 3), width=width)
        compiled(x, weights[0])
    assert [case.shape[3] for case in measured] == [24, 60]
    assert len(graphs) == 1
    assert 'depthwise_branches' in graphs[0]


def graphs_of(function, **how):
    """The function, compiled, and the graphs that the compiler gets to see of it."""
    graphs = []

    def compiler(graph, _):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler)
    return graphs, torch.compile(function, backend=backend, fullgraph=True, **how)


@whole_graphs
@pytest.mark.parametrize(
    ('method', 'plain', 'layout', 'size', 'images', 'node', 'copies'),
    [
        ('conv', True, NCHW, (13, 3), 1, 'aten.convolution', 0),
        ('conv', False, NCHW, (13, 3), 1, 'aten.convolution', 0),
        ('native', False, NCHW, (13, 3), 1, 'aten.convolution', 0),
        ('other', False, NCHW, (13, 3), 1, 'aten.convolution', 2),
        ('turned', False, NCHW, (13, 3), 1, 'aten.convolution', 2),  # in the other layout instead
        ('conv', False, NHWC, (13, 3), 1, 'aten.convolution', 0),
        ('conv', True, NHWC, (3, 21), 2, 'aten.convolution', 0),
        ('conv', True, NHWC, (3, 21), 1, 'mmslak.convolution', 0),
        ('turned', False, NHWC, (3, 21), 1, 'aten.convolution', 3),  # map, kernels and output
        ('turned', False, NHWC, (21, 3), 1, 'mmslak.convolution', 3),
        ('other', False, NHWC, (13, 3), 2, 'mmslak.convolution', 2),  # Inductor would undo it
        ('fft', False, NCHW, (13, 3), 1, 'mmslak.depthwise_branches', 0),
    ],
)
def test_torchs_own_convolutions_take_the_place_of_the_operator_in_graphs(
    measured, monkeypatch, method, plain, layout, size, images, node, copies
):
    monkeypatch.setattr(tuner, 'measure', lambda *_: Plan((method,), plain=plain))
    weight = inputs(size)[1][0]
    x = torch.randn(images, 2, 96, 96).contiguous(memory_format=layout)
    graphs, compiled = graphs_of(depthwise_conv2d)
    expected = F.conv2d(x, weight, padding=(size[0] // 2, size[1] // 2), groups=2)
    with torch.no_grad():
        got = compiled(x, weight)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.is_contiguous(memory_format=layout)
    (graph,) = graphs
    nodes = ('aten.convolution', 'mmslak.convolution', 'mmslak.depthwise_branches')
    assert [name for name in nodes if f'torch.ops.{name}.default' in graph] == [node]
    assert graph.count('aten.clone') == copies


@whole_graphs
def test_graphs_keep_the_operator_where_torch_may_not_come_back_in_the_other_layout(
    measured, monkeypatch
):
    monkeypatch.setattr(tuner, 'measure', lambda *_: Plan(('conv',), plain=True))
    monkeypatch.setattr(Case, 'never_ends', True)
    x, weights = inputs((13, 3))
    graphs, compiled = graphs_of(depthwise_conv2d)
    compiled(x, weights[0])
    assert 'mmslak.convolution' in graphs[0]
    weights[0].requires_grad_()
    compiled(x, weights[0])
    assert 'mmslak.depthwise_branches' in graphs[1]


@whole_graphs
def test_a_single_image_keeps_its_layout_in_a_network(measured, monkeypatch):
    """Inductor gives what a LayerNorm over channels makes of it a batch stride of zero."""
    monkeypatch.setattr(tuner, 'measure', lambda *_: Plan(('conv',), plain=True))
    norm = torch.nn.LayerNorm(24)
    weight = torch.randn(24, 1, 3, 21)

    def network(x):
        x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return depthwise_conv2d(x, weight)

    x = torch.randn(1, 24, 20, 20).contiguous(memory_format=NHWC)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-4)
        seen = []

        def conv2d(x, *arguments, **options):
            seen.append(x.stride())
            return CONV2D(x, *arguments, **options)

        monkeypatch.setattr(F, 'conv2d', conv2d)  # what the graph's node calls
        compiled(x)
    assert seen == [(9600, 1, 480, 24)]


def test_the_shipped_tables_can_be_read_and_name_methods_that_are_there():
    tables = sorted(plans.TABLES.glob('*.json'))
    assert tables
    for path in tables:
        facts, found = plans.read_table(path)
        assert {'device', 'threads', 'allocator'} <= facts.keys()
        assert found
        assert all(choice._known(plan) for plan in found.values())


@whole_graphs
@pytest.mark.parametrize('plain', [True, False])
def test_graphs_in_training_have_torchs_own_convolution_if_it_is_called_as_it_is(
    measured, monkeypatch, plain
):
    plan = Plan(('conv',), ('conv',), ('conv',), plain)
    monkeypatch.setattr(tuner, 'measure', lambda *_: plan)
    x, weights = inputs((13, 3))
    graphs, compiled = graphs_of(depthwise_conv2d)
    compiled(x, weights[0].requires_grad_()).sum().backward()
    assert ['mmslak' in graph for graph in graphs] == [not plain, not plain]  # forward, backward


@whole_graphs
def test_a_graph_is_made_anew_where_other_choices_hold(measured, monkeypatch):
    monkeypatch.setattr(tuner, 'measure', lambda *_: FFT)
    x, weights = inputs((13, 3))
    graphs, compiled = graphs_of(depthwise_conv2d)
    compiled(x, weights[0])
    for _ in range(2):
        with tuning('off'):
            compiled(x, weights[0])
        compiled(x, weights[0])
    assert ['mmslak' in graph for graph in graphs[:2]] == [True, False]
    assert len(graphs) == 2
    (key,) = choices()
    for _ in range(2):  # with the same choices, it is the same graph
        restore_choices({key: Plan(('conv',), plain=True).to_json()})
        compiled(x, weights[0])
    assert 'mmslak' not in graphs[2]
    assert len(graphs) == 3


@whole_graphs
def test_a_graph_is_made_anew_once_there_is_time_for_measuring(measured):
    x, weights = inputs((13, 3))
    graphs, compiled = graphs_of(depthwise_conv2d)
    with tuning('on', 0):
        compiled(x, weights[0])
        assert not measured
        with tuning('on', 100):
            compiled(x, weights[0])
    assert len(measured) == 1
    assert len(graphs) == 2


@whole_graphs
def test_a_graph_for_kernels_of_any_size(measured):
    x = torch.randn(1, 2, 20, 20)
    graphs, compiled = graphs_of(depthwise_conv2d)
    for rows in (13, 15, 17):
        weight = torch.randn(2, 1, rows, 3)
        expected = F.conv2d(x, weight, padding=(rows // 2, 1), groups=2)
        torch.testing.assert_close(compiled(x, weight), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2


@whole_graphs
@pytest.mark.parametrize('images', [1, 2])
def test_forward_mode_in_a_graph(measured, monkeypatch, images):
    monkeypatch.setattr(tuner, 'measure', lambda *_: Plan(('conv',), plain=True))
    weight = inputs((3, 21))[1][0]

    def derivative(x, tangent):
        return torch.func.jvp(lambda x: depthwise_conv2d(x, weight), (x,), (tangent,))[1]

    x, tangent = torch.randn(2, images, 2, 20, 20).contiguous()
    x, tangent = (t.contiguous(memory_format=NHWC) for t in (x, tangent))
    expected = F.conv2d(tangent, weight, padding=(1, 10), groups=2)
    torch._dynamo.reset()
    got = torch.compile(derivative, backend='aot_eager')(x, tangent)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@whole_graphs
def test_measuring_while_a_graph_is_traced(measured, monkeypatch):
    """For real, with tensors that have values, and with nothing between torch and its kernels."""
    monkeypatch.setattr(tuner, 'measure', MEASURE)
    seen = []
    unseen = tuner.unseen

    @contextlib.contextmanager
    def watched():
        with unseen():
            seen.append((type(torch.ones(1)), python_dispatcher_is_on()))
            yield

    monkeypatch.setattr(tuner, 'unseen', watched)
    x, weights = inputs((13, 3))
    _, compiled = graphs_of(depthwise_conv2d)
    with torch.no_grad():
        state = torch.get_rng_state()
        got = compiled(x, weights[0])
        assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got, F.conv2d(x, weights[0], padding=(6, 1), groups=2))
    assert seen
    assert set(seen) == {(torch.Tensor, False)}


def python_dispatcher_is_on() -> bool:
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher)


@whole_graphs
def test_results_are_right_where_a_compiled_graph_calls_them(measured, monkeypatch, caplog):
    """For real: there, lazy conjugates are lost."""
    calls = []

    def measure(case, other, end):
        calls.append(case)
        data = tuner._Data(case, *case.shape[:2])
        assert tuner.is_right(data, 'forward', ('conv',))
        assert tuner.is_right(data, 'both', (('conv',), ('conv',)))
        return FFT

    monkeypatch.setattr(tuner, 'measure', measure)
    x, weights = inputs((13, 3), (3, 13))
    _, compiled = graphs_of(depthwise_conv2d_branches, dynamic=True)
    compiled(x, weights)
    assert len(calls) == 1
    assert 'left out' not in caplog.text


@pytest.mark.parametrize('enabled', [True, False])
def test_autograd_is_gone_around_where_nothing_is_wanted(measured, monkeypatch, enabled):
    """Also with a bias that learns, as every layer has one, where gradients are off."""
    calls = []
    monkeypatch.setattr(depthwise, 'convolve_branches', lambda *_: calls.append(1) or [None])
    x, weights = inputs((13, 3))
    with torch.set_grad_enabled(enabled):
        depthwise_conv2d(x, weights[0], torch.zeros(2, requires_grad=True))
    assert calls == [1] * enabled


def test_plain_convolutions_are_called_with_nothing_around_them(measured, monkeypatch):
    stock = Plan(('conv',), ('conv',), ('conv',), plain=True)
    monkeypatch.setattr(tuner, 'measure', lambda *_: stock)
    x, weights = inputs((5, 3))
    output = depthwise_conv2d(x.requires_grad_(), weights[0])
    assert output.grad_fn.name() == 'ConvolutionBackward0'


@pytest.fixture
def plain(measured, monkeypatch):
    """Torch's own convolution wins; gives the calls that were checked and looked up."""
    stock = Plan(('conv',), ('conv',), ('conv',), plain=True)
    monkeypatch.setattr(tuner, 'measure', lambda case, *_: measured.append(case) or stock)
    calls = []

    def call(*arguments, **options):
        calls.append(arguments)
        return whole(*arguments, **options)

    whole = depthwise._call
    monkeypatch.setattr(depthwise, '_call', call)
    return calls


def layer(size=(5, 3), channels=2):
    torch.manual_seed(0)
    return DepthwiseConv2d(channels, size)


def test_a_plain_convolution_is_looked_up_once(plain):
    ours, x = layer(), torch.randn(1, 2, 20, 20)
    expected = F.conv2d(x, ours.weight, ours.bias, padding=(2, 1), groups=2)
    for _ in range(3):
        assert torch.equal(ours(x), expected)
    assert len(plain) == 1
    again = layer()
    assert again(x).grad_fn.name() == 'ConvolutionBackward0'
    assert len(plain) == 1  # it is one of the process, not of the layer


def test_another_method_is_not_taken_for_a_plain_convolution(measured):
    ours, x = layer(), torch.randn(1, 2, 20, 20)
    ours(x)
    assert ours(x).grad_fn.name() != 'ConvolutionBackward0'
    assert not choice.plain_calls


@pytest.mark.parametrize(
    'change',
    ['height', 'batch', 'layout', 'dtype', 'gradient', 'frozen', 'no_grad', 'autocast', 'kernel',
     'threads', 'mode', 'restored'],
)  # fmt: skip
def test_a_call_that_differs_is_looked_up(plain, change, monkeypatch):
    ours, x = layer(), torch.randn(2, 2, 20, 20)
    ours(x)
    with contextlib.ExitStack() as stack:
        if change == 'height':
            x = x[:, :, 1:].contiguous()
        elif change == 'batch':
            x = x[1:]
        elif change == 'layout':
            x = x.contiguous(memory_format=torch.channels_last)
        elif change == 'dtype':
            ours, x = ours.double(), x.double()
        elif change == 'gradient':
            x.requires_grad_()
        elif change == 'frozen':
            ours.requires_grad_(False)
        elif change == 'no_grad':
            stack.enter_context(torch.no_grad())
        elif change == 'autocast':
            stack.enter_context(torch.autocast('cpu', torch.bfloat16))
        elif change == 'kernel':
            ours = layer((3, 5))
        elif change == 'threads':
            monkeypatch.setattr(torch, 'get_num_threads', lambda: 77)
        elif change == 'mode':
            stack.enter_context(tuning('off'))
        elif change == 'restored':
            restore_choices({key: FFT.to_json() for key in choices()})
        output = ours(x)
        assert len(plain) == 2
        assert output.dtype == (torch.bfloat16 if change == 'autocast' else x.dtype)
        stock = output.grad_fn is None or output.grad_fn.name() == 'ConvolutionBackward0'
        assert stock == (change not in ('mode', 'restored'))


def test_after_a_mode_ends_calls_are_looked_up(plain):
    ours, x = layer(), torch.randn(1, 2, 20, 20)
    ours(x)
    with tuning('read'):
        ours(x), ours(x)
        assert len(plain) == 2
    ours(x), ours(x)
    assert len(plain) == 3


def test_autocast_of_a_plain_convolution(plain):
    ours, x = layer(), torch.randn(1, 2, 20, 20)
    with torch.autocast('cpu', torch.bfloat16):
        first, second = ours(x), ours(x)
    assert second.dtype == torch.bfloat16
    assert torch.equal(first, second)
    assert ours(x).dtype == torch.float32
    assert len(plain) == 2


def test_layers_keep_nothing_of_their_calls(plain):
    """Copies and pickles are those of nn.Conv2d."""
    ours, x = layer(), torch.randn(1, 2, 20, 20)
    before = dict(vars(ours))
    ours(x), ours(x)
    assert vars(ours) == before
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(x), ours(x))


def test_what_does_not_fit_is_refused_after_a_call_that_did(plain):
    ours, x = layer(), torch.randn(1, 2, 20, 20)
    ours(x)
    for weight, bias in (
        (ours.weight.double(), ours.bias),
        (ours.weight, ours.bias.double()),
        (ours.weight, torch.zeros(1)),
        (ours.weight[:1], ours.bias),
        (ours.weight[..., :2], ours.bias),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            depthwise_conv2d(x, weight, bias)


def test_a_choice_made_while_a_graph_is_captured_is_not_kept(plain, monkeypatch):
    stock = Plan(('conv',), ('conv',), ('conv',), plain=True)
    monkeypatch.setattr(choice, '_find', lambda *_: (stock, False))
    ours, x = layer(), torch.randn(1, 2, 20, 20)
    ours(x), ours(x)
    assert len(plain) == 2


def test_modes_of_torch_see_the_operator_after_a_plain_call(plain):
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    ours, x = layer(), torch.randn(1, 2, 20, 20)
    with torch.no_grad():
        ours(x), ours(x)
        assert len(plain) == 1
        with Mode():
            ours(x)
    assert len(plain) == 2
    if hasattr(torch.library, 'custom_op'):
        assert seen[0].startswith('mmslak.depthwise_branches')


def test_transforms_of_plain_calls(plain):
    ours, x = layer(), torch.randn(3, 2, 20, 20)
    for _ in range(2):
        single = torch.stack([ours(one[None]) for one in x])
    assert torch.allclose(torch.func.vmap(ours)(x[:, None]), single, atol=1e-6)
    gradient = torch.func.grad(lambda x: ours(x).square().sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(ours(x).square().sum(), x)[0])


@whole_graphs
def test_graphs_after_a_plain_call(plain):
    """The graph asks the operator, whatever was called before it was made."""
    ours, x = layer((13, 3)), torch.randn(1, 2, 20, 20)
    expected = ours(x)
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
    assert 'mmslak' in graphs[0]
    with torch.no_grad():
        program = torch.export.export(ours, (x,))
    assert 'mmslak' not in str(program.graph)
    traced = torch.jit.trace(ours, x)
    assert torch.equal(traced(x), ours(x))
    assert torch.equal(traced(x[..., 2:]), ours(x[..., 2:]))


@pytest.mark.parametrize('merges', [False, True])
def test_a_plan_for_merged_kernels_of_a_method_that_merges_them_itself(
    measured, monkeypatch, merges
):
    seen = []

    def forward(x, weights, bias, summed):
        seen.append([tuple(weight.shape[2:]) for weight in weights])
        return METHODS['fft'].forward(x, weights, bias, summed)

    def backward(x, weights, *rest):
        seen.append([tuple(weight.shape[2:]) for weight in weights])
        return METHODS['fft'].backward(x, weights, *rest)

    monkeypatch.setitem(METHODS, 'fake', Method(forward, backward, merges=merges))
    monkeypatch.setattr(tuner, 'measure', lambda case, *_: measured.append(case) or plan)
    plan = Plan(('fake',), ('fake',), ('fake',))
    x, weights = inputs((3, 3), (1, 5), (7, 3), dtype=torch.float64)
    for weight in weights:
        weight.requires_grad_()
    parts = [F.conv2d(x, w, padding=(w.shape[2] // 2, w.shape[3] // 2), groups=2) for w in weights]
    total = depthwise_conv2d_sum(x, weights)
    torch.testing.assert_close(total, sum(parts))
    torch.testing.assert_close(
        torch.autograd.grad(total.square().sum(), weights),
        torch.autograd.grad(sum(parts).square().sum(), weights),
    )
    assert [case.kernels for case in measured] == [((7, 3), (1, 5))]
    assert seen == ([[(3, 3), (1, 5), (7, 3)]] * 2 if merges else [[(7, 3), (1, 5)]] * 2)
