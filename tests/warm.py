"""What the server of tests/forks.py does before it forks: imports, and conftest's shortcuts."""

import gc
import importlib

import cv2
import pytest
from mmengine.config import Config

from tests import shortcuts

MODULES = ['mmslak', 'mmseg.apis', 'mmdet.apis', 'mmpretrain.apis', 'mmslak.models']  # in order
for module in [*MODULES, 'mmslak.engine', 'mmslak.cli.train', 'mmslak.cli.test']:
    importlib.import_module(module)
cv2.setNumThreads(0)
shortcuts.take(pytest.MonkeyPatch())
for config in ('upernet_slak_t_ade20k', 'cascade_mask_rcnn_slak_t_coco', 'slak_t_imagenet'):
    Config.fromfile(f'mmslak::{config}')  # what is read once, for all forks
gc.freeze()  # as in conftest.py
