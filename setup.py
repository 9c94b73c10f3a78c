"""Package definition. The two OpenMMLab stacks are extras: they overwrite each other."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '([^']+)'", (ROOT / 'mmslak/__init__.py').read_text()).group(1)

ONEDL_DEMO = [  # what runs without mmcv's operators
    'onedl-mmengine==0.10.12',
    'onedl-mmcv==2.3.6',
    'onedl-mmsegmentation==1.4.2',
    'onedl-mmpretrain==1.3.6',
]
ONEDL = [*ONEDL_DEMO, 'onedl-mmdetection==3.5.1']
STOCK = [
    'mmengine==0.10.7',
    'mmcv==2.1.0',
    'mmdet==3.3.0',
    'mmsegmentation==1.2.2',
    'mmpretrain==1.2.0',
    'numpy<2',
    'opencv-python<4.12',
    'ftfy',
    'regex',
]
DEMO = ['scikit-image>=0.22', 'scikit-learn>=1.3', 'pooch']
APP = ['gradio>=6.31,<7']
DOWNLOAD = ['gdown>=5']  # released weights on Google Drive
DOCS = [
    'mkdocs-material>=9.6,<10',
    'mkdocstrings[python]>=0.30',
    'pymdown-extensions<11',  # newer ones need a mkdocstrings that Python 3.10 does not get
]
EXPORT = ['onnx>=1.16', 'onnxruntime>=1.18']
# What mmdeploy imports. Itself it is installed by `pip install --no-deps mmdeploy==1.3.1`: it asks
# for the stock MMEngine, which would overwrite onedl's, and for a protobuf of 2022.
DEPLOY = [*EXPORT, 'aenum', 'grpcio', 'multiprocess']
DEV = [
    *DEMO,
    *APP,
    *DEPLOY,
    *DOCS,
    'hypothesis>=6.100',
    'playwright>=1.49',  # drives the system's Chromium
    'pytest>=8',
    'pytest-timeout>=2.3',
    'pytest-xdist>=3.7',
    'ruff==0.14.6',
]
MIM = [
    'model-index.yml',
    'configs/**/*.py',
    'configs/metafile.yml',
    'tools/*.py',
    'tools/dist_*.sh',
    'tools/slurm_train.sh',
]

setup(
    name='mmslak',
    version=VERSION,
    description='Sparse large-kernel backbones for dense prediction on OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    classifiers=[
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mmslak', 'mmslak.*']),
    # Configs, tools and the index of models, where MMEngine and mim look for them. The folder holds
    # links to those of this repository, whose files go into the wheel.
    # `ops/drop_in` is no package, but a folder for the module path of other repositories.
    package_data={
        'mmslak': [*(f'.mim/{files}' for files in MIM), 'ops/drop_in/*.py', 'ops/tables/*.json']
    },
    entry_points={'console_scripts': ['mmslak = mmslak.cli.main:main']},
    python_requires='>=3.10,<3.13',
    # No mm* package here: installing mmslak must never disturb an OpenMMLab environment.
    install_requires=[
        'torch>=2.1',
        *('matplotlib', 'msgspec', 'numpy', 'rich', 'safetensors>=0.4', 'shtab'),
    ],
    extras_require={
        'onedl': ONEDL,
        'onedl-demo': ONEDL_DEMO,
        'stock': STOCK,
        'demo': DEMO,
        'app': APP,
        'download': DOWNLOAD,
        'export': EXPORT,
        'deploy': DEPLOY,
        'docs': DOCS,
        'dev': DEV,
    },
    zip_safe=False,
)
