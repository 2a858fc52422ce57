"""Two images, in COCO's format or with label maps, to be spoilt; and trainings that meet them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CONFIGS = Path(__file__).parents[2] / 'configs'
NAMES = 'date', 'fig', 'hazelnut'
HEIGHT, WIDTH = 32, 48

#: One Runner for each case, until it stops.
SCRIPT = """
import json, os, sys
from mmengine.config import Config
from mmengine.runner import Runner

Config.pretty_text = 'laid out by yapf, which takes seconds'
config, variable, cases = sys.argv[1:]
for case, (root, options) in json.loads(cases).items():
    print('CASE', case, flush=True)
    os.environ[variable] = root
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    cfg.merge_from_dict({
        'work_dir': case,
        'experiment_name': case,
        'train_cfg.max_iters': 1,
        'default_hooks.logger.interval': 1,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
    })
    try:
        Runner.from_cfg(cfg).train()
    except Exception as error:
        print('STOPPED', type(error).__name__, error, flush=True)
"""


def instances():
    """What the annotation file holds."""
    images = [dict(id=i, file_name=f'{i}.jpg', height=HEIGHT, width=WIDTH) for i in (1, 2)]
    categories = [dict(id=i, name=name) for i, name in enumerate(NAMES, start=1)]
    annotations = [
        dict(
            id=number,
            image_id=1 + number % 2,
            category_id=1 + number % 3,
            bbox=[4, 6, 20, 16],
            area=320,
            segmentation=[[4, 6, 24, 6, 24, 22, 4, 22]],
            iscrowd=0,
        )
        for number in range(6)
    ]
    return dict(images=images, annotations=annotations, categories=categories)


def write_coco(root, content=None):
    """images/{1,2}.jpg and trainval.json, which holds ``content``, text or an object."""
    (root / 'images').mkdir(parents=True, exist_ok=True)
    for i in (1, 2):
        write_image(root / 'images' / f'{i}.jpg')
    content = instances() if content is None else content
    text = content if isinstance(content, str) else json.dumps(content)
    (root / 'trainval.json').write_text(text)
    return root


def write_label_maps(root, labels=(0, 1, 2, 255), splits=('train', 'val')):
    """images/SPLIT/{a,b}.jpg and annotations/SPLIT/{a,b}.png with columns of ``labels``."""
    for split in splits:
        for name in 'ab':
            write_image(root / 'images' / split / f'{name}.jpg')
            write_map(root / 'annotations' / split / f'{name}.png', columns(labels))
    return root


def columns(labels, dtype=np.uint8):
    columns = np.array(labels, dtype)[np.arange(WIDTH) * len(labels) // WIDTH]
    return np.tile(columns, (HEIGHT, 1))


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_map(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def processes(*command, cwd, **environment):
    """Both outputs of a fresh process, on one thread and without a GPU."""
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    fixed = dict(PATH=path, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **fixed, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    ).stdout


def trainings(config, variable, cases, cwd):
    """{case: output of its training}, all in one process.

    Args:
        config: Below configs/.
        variable: Of the environment; the data root is set through it.
        cases: {name: (data root, options of the config)}.
    """
    cases = {name: (str(root), settings) for name, (root, settings) in cases.items()}
    command = sys.executable, '-W', 'ignore', '-c', SCRIPT, CONFIGS / config, variable
    output = processes(*command, json.dumps(cases), cwd=cwd)
    parts = dict(part.split('\n', 1) for part in output.split('CASE ')[1:])
    assert list(parts) == list(cases), output[-4000:]
    return parts


def assert_stopped(output, *words):
    """Before the first iteration, with all ``words`` in the message."""
    assert 'Iter(train)' not in output, output[-4000:]
    message = output.partition('STOPPED')[2]
    assert [word for word in words if word not in message] == [], output[-4000:]
