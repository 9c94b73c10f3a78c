"""The official checkpoint of the golden data, and models that load it."""

import re

import torch

from mmslak.models import SLaK
from tests.golden import GOLDEN, slak_options

OFFICIAL = GOLDEN / 'slak_decomposed.pth'


def slak(**options) -> SLaK:
    return SLaK(**{**slak_options('slak_decomposed'), **options})


def from_pretrained(path, **options) -> SLaK:
    model = slak(init_cfg=dict(type='Pretrained', checkpoint=str(path), **options))
    model.init_weights()
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not re.match(r'norm\d', k)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
