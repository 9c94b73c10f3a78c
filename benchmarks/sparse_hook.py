"""What SparseTrainingHook costs per ordinary optimizer step, as a share of a training step.

Example:
    python benchmarks/sparse_hook.py --out benchmarks/results/MACHINE/sparse_hook_cpu.json

Times the hook's own work (both optimizer callbacks) inside training steps of UperNet with SLaK-T on
random data, and one update of the masks for comparison. Medians of one run.
"""

import argparse
import json
import logging
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from timing import environment, save

from mmslak.engine import SparseTrainingHook

ROOT = Path(__file__).parents[1]


def batch(size: int, images: int) -> dict:
    """Random pictures with random labels, as mmseg's loader gives them."""
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(images):
        sample = SegDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, size, size)))
        samples.append(sample)
    pictures = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(images)]
    return dict(inputs=pictures, data_samples=samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default=str(ROOT / 'configs/upernet_slak_t_ade20k.py'))
    parser.add_argument('--size', type=int, default=512, help='side of the pictures')
    parser.add_argument('--images', type=int, default=2, help='pictures per step')
    parser.add_argument('--steps', type=int, default=5, help='steps to time, after two to warm up')
    parser.add_argument('--out', help='JSON file to write')
    args = parser.parse_args()

    torch.manual_seed(0)
    cfg = Config.fromfile(args.config)
    init_default_scope('mmseg')
    cfg.model.backbone.init_cfg = None
    cfg.model.data_preprocessor.size = (args.size, args.size)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    hook = SparseTrainingHook(init='uniform', update_interval=10**6)
    hook.before_train(
        SimpleNamespace(
            model=model,
            optim_wrapper=optim_wrapper,
            hooks=[],
            iter=0,
            max_iters=10**7,
            logger=logging.getLogger(__name__),
            visualizer=SimpleNamespace(add_scalars=lambda *_, **__: None),
        )
    )
    hook._remove_handles()
    optimizer, spent = optim_wrapper.optimizer, [0.0]

    def timed(callback):
        def call(*arguments):
            start = time.perf_counter()
            callback(*arguments)
            spent[0] += time.perf_counter() - start

        return call

    optimizer.register_step_pre_hook(timed(hook._before_step))
    optimizer.register_step_post_hook(timed(hook._after_step))

    steps, costs = [], []
    for _ in range(args.steps + 2):
        data, spent[0] = batch(args.size, args.images), 0.0
        start = time.perf_counter()
        model.train_step(data, optim_wrapper)
        steps.append(time.perf_counter() - start)
        costs.append(spent[0])
    steps, costs = steps[2:], costs[2:]
    start = time.perf_counter()
    hook._update_masks(optimizer)
    update = time.perf_counter() - start

    step, cost = statistics.median(steps), statistics.median(costs)
    result = dict(
        model='UperNet SLaK-T',
        shape=[args.images, 3, args.size, args.size],
        masked_tensors=len(hook.masks.active),
        masked_weights=sum(mask.numel() for mask in hook.masks.active.values()),
        hook_share_of_step=round((cost / step), 5),
        update_share_of_step=round(update / step, 3),
        timed_steps=args.steps,
        **environment(),
    )
    print(json.dumps(result, indent=2))
    save(result, args.out)


if __name__ == '__main__':
    main()
