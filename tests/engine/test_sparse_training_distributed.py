"""SparseTrainingHook in two processes, and under wrappers that it refuses."""

import json
import os
from pathlib import Path

import pytest
import torch
from mmengine.utils import digit_version
from torch import distributed

from tests import toy
from tests.forks import in_two_ranks
from tests.toy import KEPT, Data, Toy, assert_same, build_runner, hook_of, start, train

RUNS = [
    dict(sparse=dict(update_interval=2, prune_rate=0.3), iters=8),
    dict(sparse=dict(update_interval=2, prune_rate=0.3, grow='gradient'), iters=8, ema=True),
    dict(
        sparse=dict(update_interval=2, init=dict(type='snip', batches=2, mode='mask')),
        iters=15,
        wrapper=dict(accumulative_counts=2),
    ),
]
UNITS = dict(type='neuron', share=0.5, pairs={'mix': 'head'})
RUNS += [
    dict(sparse=dict(update_interval=2, structure=UNITS), iters=8, ema=True),
    dict(sparse=dict(update_interval=2, structure=dict(UNITS, moving=True)), iters=8),
]
# One sample on each rank, or both in one process: SNIP sees the same sum of gradients.
SNIP = dict(type='snip', mode='mask')
SPLIT = dict(sparse=dict(init=SNIP, update_interval=0), samples=2, batch_size=1, iters=1)


@pytest.fixture(scope='module')
def ranks(tmp_path_factory) -> list[list[list[dict]]]:
    """What two processes of different seeds recorded: [run][rank][iteration]."""
    folder = tmp_path_factory.mktemp('ranks')
    ended = in_two_ranks(toy.main, str(folder), json.dumps([*RUNS, SPLIT]))
    assert ended.statuses == [0, 0], ended.output[-4000:]
    return [
        [torch.load(folder / str(i) / f'rank{rank}.pth', weights_only=False) for rank in (0, 1)]
        for i in range(len(RUNS) + 1)
    ]


@pytest.mark.parametrize(
    'run', range(len(RUNS)), ids=['random', 'gradient', 'accumulation', 'units', 'moving']
)
def test_ranks_of_different_seeds_hold_the_same_masks_and_weights(ranks, run):
    first, second = ranks[run]
    accumulation = RUNS[run].get('wrapper', {}).get('accumulative_counts', 1)
    assert [r['step'] for r in first][-1] == 8
    changes = [
        i + 1
        for i in range(1, len(first))
        if not torch.equal(first[i]['masks']['stem.weight'], first[i - 1]['masks']['stem.weight'])
    ]
    assert changes == [2 * accumulation, 4 * accumulation, 6 * accumulation]
    for one, other in zip(first, second):
        for key in {'step', 'masks', 'weights', 'ema'} & set(one):
            if key == 'weights' or key == 'ema':
                # Batch norm's statistics are each rank's own; parameters are not.
                assert set(one[key]) == set(dict(Toy().named_parameters()))
            assert_same(one[key], other[key], key)
        assert sum(int(mask.sum()) for mask in one['masks'].values()) == KEPT
        for name, mask in one['masks'].items():
            assert one['weights'][name][~mask].count_nonzero() == 0


def test_snip_scores_are_those_of_all_ranks_together(ranks, tmp_path):
    masks = [rank[0]['masks'] for rank in ranks[-1]]
    assert_same(masks[0], masks[1])

    def alone(batches: int) -> dict:
        sparse = dict(init=dict(SNIP, batches=batches), update_interval=0)
        options = dict(data=Data(2), batch_size=1, iters=1)
        return start(train(tmp_path / str(batches), sparse, **options))['masks']

    def differences(one: dict, other: dict) -> int:
        return sum(int((one[name] != other[name]).sum()) for name in one)

    assert differences(alone(2), masks[0]) <= 2  # half the sum in another order: neighbours swap
    assert differences(alone(1), masks[0]) > 20


@pytest.fixture
def _one_process_group(tmp_path):
    store = distributed.FileStore(str(tmp_path / 'store'), 1)
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.3'), reason='FSDP of torch 2.1 needs a GPU'
)
@pytest.mark.usefixtures('_one_process_group')
def test_fsdp_is_refused(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = Toy()
    model.mix = FullyShardedDataParallel(model.mix, device_id=torch.device('cpu'))
    with pytest.raises(NotImplementedError, match='does not support FullyShardedDataParallel'):
        train(tmp_path, dict(update_interval=2), model=model)


FSDP2 = dict(update_interval=2, prune_rate=0.3, init='uniform')


def fully_sharded_toy() -> Toy:
    """The toy with its weights sharded over all ranks by FSDP2."""
    if digit_version(torch.__version__) < digit_version('2.6'):
        pytest.skip(f'torch {torch.__version__} has no fully_shard')
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.device_mesh.init_device_mesh('cpu', (distributed.get_world_size(),))
    torch.manual_seed(0)
    model = Toy()
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.usefixtures('_one_process_group')
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(init='snip'), "init='snip'"),
        (dict(grow='momentum'), "grow='momentum'"),
        (dict(grown_state='zero'), "grown_state='zero'"),
    ],
)
def test_what_fsdp2_does_not_support_is_refused(tmp_path, change, message):
    with pytest.raises(NotImplementedError, match=f'does not support {message} under fully_shard'):
        train(tmp_path, dict(FSDP2, **change), model=fully_sharded_toy())


@pytest.mark.parametrize('grow', ['random', 'gradient'])
def test_fsdp2_in_two_processes_holds_whole_masks(tmp_path, grow):
    """Both ranks keep the same masks, and the gathered weights are zero off them."""
    if digit_version(torch.__version__) < digit_version('2.6'):
        pytest.skip(f'torch {torch.__version__} has no fully_shard')
    ended = in_two_ranks(train_sharded, tmp_path, grow)
    assert ended.statuses == [0, 0], ended.output[-4000:]
    ranks = [torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in (0, 1)]
    assert_same(ranks[0]['masks'], ranks[1]['masks'])
    assert ranks[0]['updates'] == 3
    assert sum(int(mask.sum()) for mask in ranks[0]['masks'].values()) == ranks[0]['target']
    for name, mask in ranks[0]['masks'].items():
        for rank in ranks:
            weight = rank['weights'][name]
            assert not weight[~mask].any()
            assert torch.equal(weight != 0, mask)
    assert_same(ranks[0]['weights'], ranks[1]['weights'])


def train_sharded(folder: Path, grow: str) -> None:
    """What a rank does; it saves its masks and the gathered weights as rank0.pth or rank1.pth."""
    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    options = dict(model=fully_sharded_toy(), iters=8, default_hooks=dict(checkpoint=None))
    runner = build_runner(folder / f'run{rank}', dict(FSDP2, grow=grow), **options)
    runner._init_model_weights = lambda: None  # MMEngine broadcasts plain tensors only
    runner.train()
    hook = hook_of(runner)
    weights = {name: w.full_tensor().detach() for name, w in hook._weights.items()}
    target = round(0.6 * sum(weight.numel() for weight in weights.values()))
    saved = dict(
        masks=hook.masks.active, weights=weights, updates=hook.masks.updates, target=target
    )
    torch.save(saved, folder / f'rank{rank}.pth')
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # as in toy.py
