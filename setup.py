import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGE = Path('visionseq_mm')

# The official stack. Extras only: mmcv-lite and a compiled mmcv write the same folder, and the
# onedl forks the folders of the official packages, so the choice is the user's.
MIM = [
    'mmcv-lite>=2.1.0,<2.2.0',  # mmdet 3.3.0 and mmsegmentation 1.2.2 refuse 2.2.0
    'mmdet>=3.3.0,<4',
    'mmsegmentation>=1.2.2,<2',
    'mmpretrain>=1.2.0,<2',
    'ftfy',  # imported by mmseg.models and mmpretrain.models, declared by neither
    'regex',
    'tensorboard',  # the configs log for it, too
    'setuptools>=70,<81',  # mmengine imports pkg_resources, which setuptools 82 dropped
]
CPU = ['numba']
CLI = [
    'openmim==0.3.9',
    'openxlab==0.0.11',  # later ones force setuptools 60, which Python 3.12 cannot import
    'setuptools>=70,<81',
]
TESTS = ['pytest', 'ruff', 'timm']


class BuildWithMim(build_py):
    """Also fills ``visionseq_mm/.mim``, where mim and mmengine look for configs and tools.

    A wheel gets copies, an editable install links into the checkout, so that edits count. The
    copies go straight to the build folder: a checkout's links never end up in a wheel.
    """

    def run(self):
        package = PACKAGE if self.editable_mode else self.build_lib / PACKAGE
        mim = package / '.mim'
        # pip builds in the checkout, whose build folder may hold modules that are long gone.
        shutil.rmtree(mim if self.editable_mode else package, ignore_errors=True)
        super().run()
        mim.mkdir(parents=True)
        for name in ('configs', 'tools', 'model-index.yml'):
            if self.editable_mode:
                (mim / name).symlink_to(os.path.relpath(name, mim))
            elif os.path.isdir(name):
                shutil.copytree(name, mim / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(name, mim)


setup(
    name='visionseq_mm',
    version=re.search(r"__version__ = '(.+)'", (PACKAGE / '__init__.py').read_text())[1],
    description='Vim, ViL and SecViT as backbones of mmdet, mmsegmentation and mmpretrain',
    license='Apache-2.0',
    # mim takes the first line of top_level.txt for the package's folder: one package, no tests.
    packages=find_packages(include=['visionseq_mm', 'visionseq_mm.*']),
    cmdclass={'build_py': BuildWithMim},
    python_requires='>=3.11',
    install_requires=[
        'torch>=2.6',
        'torchvision',
        'triton; platform_system == "Linux"',
        'numpy>=1.26,<2.4',  # Triton 3.6's interpreter breaks on 2.4
        'mmengine>=0.10.7,<1',
    ],
    extras_require={
        'mim': MIM,
        'cpu': CPU,
        'cli': CLI,
        'tests': TESTS,
        'all': MIM + CPU + CLI,
    },
    # torch calls this at the end of `import torch`. It serves mmcv's ops where mmcv has none,
    # before mmdet.apis or mmseg.apis ask for them. Moving it would break existing installs.
    entry_points={'torch.backends': ['visionseq_mm = visionseq_mm.compat.autoload:install']},
    zip_safe=False,
)
