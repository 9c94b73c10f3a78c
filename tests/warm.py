"""What the server of tests/forks.py does before it forks: imports, and conftest's shortcuts."""

import gc
import importlib

import cv2
import pytest

from tests import shortcuts

MODULES = ['mmslak', 'mmseg.apis', 'mmdet.apis', 'mmpretrain.apis', 'mmslak.models']  # in order
for module in [*MODULES, 'mmslak.engine', 'mmslak.cli.train', 'mmslak.cli.test']:
    importlib.import_module(module)
cv2.setNumThreads(0)
shortcuts.take(pytest.MonkeyPatch())
gc.freeze()  # as in conftest.py
