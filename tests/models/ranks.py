"""What each of two ranks does: `in_two_ranks(kind, folder)` calls `main` in both.

Nothing but MMEngine's Runner: no tool of ours.
"""

import os
from pathlib import Path

import torch
from mmengine.model import BaseModel
from torch import nn

from mmslak import models
from tests import forks, toy


def in_two_ranks(kind: str, folder: Path, *address: str) -> forks.Ended:
    """Three iterations of a backbone in each of two ranks; their exit statuses are not checked."""
    cache = str(folder / 'cache')
    return forks.in_two_ranks(main, kind, str(folder), *address, TORCH_HOME=cache)


class Classifier(BaseModel):
    """A backbone of four stages of which two are asked for, and a head."""

    def __init__(self, kind: str, *address: str) -> None:
        super().__init__()
        init_cfg = [dict(type='Pretrained', checkpoint=one, prefix='backbone') for one in address]
        self.backbone = getattr(models, kind)(
            dict(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8]),
            kernel_sizes=(7, 7, 7, 7),
            width_factor=1.0,
            layer_scale_init_value=1.0,
            out_indices=(0, 1),
            init_cfg=init_cfg,
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x, y, mode='tensor'):
        x = nn.functional.interpolate(x, (64, 64))  # for four stages
        features = torch.cat([o.mean((2, 3)) for o in self.backbone(x)], 1)
        return dict(loss=nn.functional.cross_entropy(self.head(features), y))


def main(kind: str, folder: str, *address: str) -> None:
    torch.distributed.init_process_group('gloo')
    model = Classifier(kind, *address)
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    cfg = dict(model_wrapper_cfg=wrapper)
    toy.train(folder, model=model, iters=3, launcher='pytorch', cfg=cfg)
    torch.save(model.state_dict(), Path(folder, f'rank{os.environ["RANK"]}.pth'))
    torch.distributed.barrier()
    os._exit(0)  # all is saved; how torch takes its threads down is not what is tested
