"""Brings the metafiles and the tables of the READMEs in configs/ up to date; for maintainers.

In a metafile the configs, what was published for them (`Published`) and which official checkpoint
they evaluate (`Checkpoint`) are written by hand. This adds what follows from the configs, and
weights and accuracy of the checkpoints; then it writes the tables of the README beside it anew,
between `<!-- table: classifiers -->` or `<!-- table: dense -->` and `<!-- end of table -->`.

FLOPs are mmengine's, in which a multiplication with its addition is one, for one picture of the
training's size: of a classifier as a whole, of a detector or segmentor its backbone.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
import yaml
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from visionseq_mm.checkpoints import find_published

ROOT = Path(__file__).parents[1]
HEADER = """\
# By hand: Name, In Collection, Config, Checkpoint, Published, Results of our trainings. The rest
# is written by tools/update_zoo.py. An empty entry under Weights says that there are none:
# `mim download` then brings the config alone.
"""
TABLE = re.compile(r'(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)', re.S)


def build(cfg):
    """The model of ``cfg``, without memory for its weights."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        return MODELS.build(cfg.model)


def image_size(cfg):
    """(h, w) of a picture in training; of COCO at (1333, 800) what most of them are padded to."""
    if cfg.default_scope == 'mmpretrain':
        return (cfg.size, cfg.size)
    if cfg.default_scope == 'mmseg':
        return tuple(cfg.crop_size)
    width, height = cfg.scale
    return (800, 1344) if (width, height) == (1333, 800) else (height, width)


def count_flops(cfg, model):
    """Multiplications with additions; with zeros for weights, which are quick to make."""
    part = model if cfg.default_scope == 'mmpretrain' else model.backbone
    part.to_empty(device='cpu')
    part.eval()
    for tensor in (*part.parameters(), *part.buffers()):
        tensor.data.zero_()
    analyzer = FlopAnalyzer(part, torch.zeros(1, 3, *image_size(cfg)))
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        return int(analyzer.total())


def counts_once():
    """``count_flops``, which takes seconds, once for equal backbones and sizes."""
    counted = {}

    def count(cfg, model):
        backbone = dict(cfg.model.backbone)
        for key in ('init_cfg', 'with_cp', 'drop_path_rate', 'img_size', 'norm_eval'):
            backbone.pop(key, None)
        key = repr((cfg.default_scope == 'mmpretrain', backbone, image_size(cfg)))
        if key not in counted:
            counted[key] = count_flops(cfg, model)
        return counted[key]

    return count


def flops_of(model):
    """Those that its entry in a metafile has, or None."""
    found = model.get('Metadata', {})
    return found.get('FLOPs') or found.get('Backbone FLOPs')


def metadata(cfg, flops):
    """What follows from a config; ``flops`` is a number, or counts them from it and its model."""
    model = build(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    if callable(flops):
        flops = flops(cfg, model)
    epochs = cfg.train_cfg.get('max_epochs')
    return {
        'Parameters': parameters,
        'FLOPs' if cfg.default_scope == 'mmpretrain' else 'Backbone FLOPs': flops,
        'Image': '{}x{}'.format(*image_size(cfg)),
        'Batch Size': cfg.auto_scale_lr.base_batch_size,
        **({'Epochs': epochs} if epochs else {'Iterations': cfg.train_cfg.max_iters}),
    }


def update(model, flops):
    """An entry of a metafile with what is not written by hand; ``flops``: see ``metadata``."""
    by_hand = {key: model[key] for key in ('Name', 'In Collection', 'Config')}
    by_hand |= {key: model[key] for key in ('Checkpoint', 'Published') if key in model}
    cfg = Config.fromfile(ROOT / model['Config'])
    entry = {**by_hand, 'Metadata': metadata(cfg, flops)}
    if 'Checkpoint' not in model:
        results = {'Results': model['Results']} if 'Results' in model else {}
        return {**entry, **results, 'Weights': model.get('Weights') or ['']}
    published = find_published(model['Checkpoint'])
    return {
        **entry,
        'Results': [
            {
                'Task': 'Image Classification',
                'Dataset': 'ImageNet-1k',
                'Metrics': {'Top 1 Accuracy': published.top1},
            }
        ],
        'Weights': published.url or [''],
    }


def trained(model):
    """What a training of ours gave."""
    if 'Checkpoint' in model or 'Results' not in model:
        return '–'
    metrics = (result['Metrics'].items() for result in model['Results'])
    return ', '.join(f'{name} {value}' for each in metrics for name, value in each)


def with_published(ours, published):
    return f'{ours} ({published})' if published else ours


def row(model, folder):
    """Cells that both tables have: config, parameters, FLOPs."""
    path = Path(model['Config'])
    published, found = model.get('Published', {}), model['Metadata']
    flops = flops_of(model)
    parameters = f'{found["Parameters"] / 1e6:.1f} M'
    return (
        f'[{path.stem}]({path.relative_to(folder).as_posix()})',
        with_published(parameters, published.get('Parameters')),
        with_published(f'{flops / 1e9:.1f} G', published.get('FLOPs')),
    )


def classifiers(models, folder):
    lines = [
        '| config | official checkpoint | parameters | FLOPs | published top-1 | trained by us |',
        '|---|---|---|---|---|---|',
    ]
    for model in models:
        if 'FLOPs' in model['Metadata']:
            config, parameters, flops = row(model, folder)
            name = model.get('Checkpoint')
            top1 = find_published(name).top1 if name else '–'
            name = f'`{name}`' if name else '–'
            cells = config, name, parameters, flops, str(top1), trained(model)
            lines.append(f'| {" | ".join(cells)} |')
    return lines


def dense(models, folder):
    lines = [
        '| config | image | parameters | backbone FLOPs | published | trained by us |',
        '|---|---|---|---|---|---|',
    ]
    for model in models:
        if 'Backbone FLOPs' in model['Metadata']:
            config, parameters, flops = row(model, folder)
            image = model['Metadata']['Image'].replace('x', '×')
            metrics = model.get('Published', {}).get('Metrics', {})
            published = ', '.join(f'{name} {value}' for name, value in metrics.items()) or '–'
            cells = config, image, parameters, flops, published, trained(model)
            lines.append(f'| {" | ".join(cells)} |')
    return lines


def with_tables(readme, models, folder):
    """The text of a README with its tables written anew."""
    kinds = {'classifiers': classifiers, 'dense': dense}

    def table(match):
        start, kind, _, end = match.groups()
        return start + '\n'.join(kinds[kind](models, folder)) + '\n' + end

    return TABLE.sub(table, readme)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--keep-flops', action='store_true', help='count only those that are missing: quick'
    )
    args = parser.parse_args(arguments)
    count = counts_once()
    for path in sorted(ROOT.glob('configs/*/metafile.yml')):
        content = yaml.safe_load(path.read_text())
        content['Models'] = [
            update(model, (args.keep_flops and flops_of(model)) or count)
            for model in content['Models']
        ]
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=99)
        path.write_text(HEADER + text)
        readme, folder = path.with_name('README.md'), path.parent.relative_to(ROOT)
        readme.write_text(with_tables(readme.read_text(), content['Models'], folder))
        print(f'{folder}: {len(content["Models"])} models')


if __name__ == '__main__':
    main(sys.argv[1:])
