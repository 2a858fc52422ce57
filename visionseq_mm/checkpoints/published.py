"""The published ImageNet-1k checkpoints, and ``visionseq://NAME`` to load one.

Nothing here was downloaded by this project: addresses, accuracies and which
weights they belong to are those of the official repositories' READMEs, code
and training logs, unless the note says otherwise.
"""

from dataclasses import dataclass, replace

from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader

from visionseq_mm.checkpoints.loading import convert

SCHEME = 'visionseq://'


@dataclass(frozen=True)
class Published:
    """One published file.

    Attributes:
        backbone: Arguments that build the backbone it belongs to.
        file: The file's name where it was published.
        url: Address of the file, or None where only a person can fetch it.
        page: Where a person finds it.
        source: The official repository, which describes it.
        weights: Key whose accuracy was published: 'model', 'model_ema' or
            'state_dict'; None where the sources do not say.
        top1: Published ImageNet top-1 accuracy in percent.
        licence: Licence of the repository; the files state none of their own.
        note: What could not be checked, or is odd.
    """

    backbone: dict
    file: str
    url: str | None
    page: str
    source: str
    weights: str | None
    top1: float
    licence: str
    note: str = ''


def _vim(arch, stride, repository, file, top1):
    page = f'https://huggingface.co/hustvl/{repository}'
    return Published(
        backbone=dict(type='visionseq_mm.Vim', arch=arch, stride=stride),
        file=file,
        url=f'{page}/resolve/main/{file}',
        page=page,
        source='https://github.com/hustvl/Vim',
        weights=None,
        top1=top1,
        licence='Apache-2.0',
        note='The README names the repository; the name of the file is from public code that '
        'loads it. The official evaluation runs model and model_ema and the README does not say '
        'whose accuracy it lists: model is taken.',
    )


def _vil(version, arch, file, top1, stride=16, note=''):
    page = 'https://ml.jku.at/research/vision_lstm/download/'
    return Published(
        backbone=dict(type='visionseq_mm.ViL', version=version, arch=arch, stride=stride),
        file=file,
        url=page + file,
        page=page,
        source='https://github.com/NX-AI/vision-lstm',
        weights='state_dict',
        top1=top1,
        licence='MIT, the model code Apache-2.0',
        note=note,
    )


def _secvit(arch, file, weights, top1, share):
    return Published(
        backbone=dict(type='visionseq_mm.SecViT', arch=arch),
        file=file,
        url=None,
        page=f'https://pan.baidu.com/s/{share}',
        source='https://github.com/qhfan/SecViT',
        weights=weights,
        top1=top1,
        licence='MIT',
        note=f"The best accuracy of the training log is that of {weights}; the file's name and "
        'what it holds were not checked.',
    )


PUBLISHED = {
    'vim-tiny': _vim('tiny', 16, 'Vim-tiny-midclstok', 'vim_t_midclstok_76p1acc.pth', 76.1),
    'vim-tiny-stride8': _vim(
        'tiny', 8, 'Vim-tiny-midclstok', 'vim_t_midclstok_ft_78p3acc.pth', 78.3
    ),
    'vim-small': _vim('small', 16, 'Vim-small-midclstok', 'vim_s_midclstok_80p5acc.pth', 80.5),
    'vim-small-stride8': _vim(
        'small', 8, 'Vim-small-midclstok', 'vim_s_midclstok_ft_81p6acc.pth', 81.6
    ),
    'vim-base': _vim('base', 16, 'Vim-base-midclstok', 'vim_b_midclstok_81p9acc.pth', 81.9),
    'vil2-tiny': _vil(2, 'tiny', 'vil2_tiny16_e800_in1k.th', 78.3),
    'vil2-tiny-e400': _vil(2, 'tiny', 'vil2_tiny16_e400_in1k.th', 77.2),
    'vil2-small': _vil(2, 'small', 'vil2_small16_e400_in1k.th', 81.5),
    'vil2-base': _vil(2, 'base', 'vil2_base16_e400_in1k.th', 82.4),
    'vil-tiny': _vil(1, 'tiny', 'vil_tiny16_e800_in1k.th', 77.3),
    'vil-tiny-e400': _vil(1, 'tiny', 'vil_tiny16_e400_in1k.th', 76.1),
    'vil-tinyplus': _vil(1, 'tinyplus', 'vil_tinyplus16_e800_in1k.th', 78.1),
    'vil-tinyplus-e400': _vil(1, 'tinyplus', 'vil_tinyplus16_e400_in1k.th', 77.2),
    'vil-tinyplus-stride8': replace(
        _vil(1, 'tinyplus', 'the stride-8 file of ViL-T+', 80.0, stride=8),
        url=None,
        note='Its address is not published: the official hub entry of this name points to the '
        'file of vil-tinyplus.',
    ),
    'vil-small': _vil(1, 'small', 'vil_small16_e400_in1k.th', 80.7),
    'vil-smallplus': _vil(1, 'smallplus', 'vil_smallplus16_e400_in1k.th', 80.9),
    'vil-smallplus-stride8': _vil(
        1, 'smallplus', 'vil_smallplus16_e400_in1k_stride8.th', 82.2, stride=8
    ),
    'vil-base': _vil(1, 'base', 'vil_base16_e400_in1k.th', 81.6),
    'vil-base-stride8': _vil(1, 'base', 'vil_base16_e400_in1k_stride8.th', 82.7, stride=8),
    'secvit-tiny': _secvit('tiny', 'SecViT-T', 'model', 82.6, '1DLAnq0Q_6v50vbs3w8cbrQ?pwd=56ez'),
    'secvit-small': _secvit(
        'small', 'SecViT-S', 'model_ema', 84.2, '1oMaCsXFjsawy3vllV7zmwg?pwd=ga8j'
    ),
    'secvit-base': _secvit(
        'base', 'SecViT-B', 'model_ema', 85.0, '19By5MEvs7ej_t4JlXrMhWQ?pwd=vgv9'
    ),
    'secvit-large': _secvit(
        'large', 'SecViT-L', 'model_ema', 85.6, '1J3cckabSXPD-XUd3XHR7Lw?pwd=558b'
    ),
}


def find_published(name):
    """The entry ``name``, with or without 'visionseq://'.

    Raises:
        ValueError: For an unknown name; lists those there are.
    """
    name = name.removeprefix(SCHEME)
    if name not in PUBLISHED:
        raise ValueError(
            f'no published checkpoint is named {name!r}; there are {", ".join(PUBLISHED)}'
        )
    return PUBLISHED[name]


def load_from_visionseq(filename, map_location=None):
    """Load ``visionseq://NAME``, or ``visionseq://NAME/cls``: mmengine's loader of the scheme.

    The first is the file as it was published, for the ``init_cfg`` of a backbone; the second a
    checkpoint of mmpretrain's ImageClassifier, with the classifier, for ``load_from`` and
    ``--checkpoint``.

    Raises:
        ValueError: For an unknown name, and anything but 'cls' behind it.
        FileNotFoundError: For a file that cannot be downloaded by a program;
            says where it is and how to use it.
    """
    name, slash, task = filename.removeprefix(SCHEME).partition('/')
    entry = find_published(name)
    if slash and task != 'cls':
        raise ValueError(f"{filename}: only 'cls' can follow the name, as in {SCHEME}vim-tiny/cls")
    if entry.url is None:
        raise FileNotFoundError(
            f'{filename} cannot be downloaded by a program. Find {entry.file} of {entry.source} '
            f'on {entry.page} with a browser, download it, and give its path: '
            "init_cfg=dict(type='Pretrained', checkpoint='path/of/the/file'), or init_cfg=None to "
            f'start from random weights. ({entry.note})'
        )
    checkpoint = CheckpointLoader.load_checkpoint(entry.url, map_location)
    if not slash:
        return checkpoint
    backbone = MODELS.build(dict(entry.backbone, out_type='cls'))
    return dict(state_dict=convert(backbone, checkpoint))


def install():
    """Make ``visionseq://NAME`` known to mmengine; calling it again changes nothing."""
    CheckpointLoader.register_scheme(prefixes=SCHEME, loader=load_from_visionseq, force=True)


def published_table():
    """``PUBLISHED`` as Markdown: the table of docs/checkpoints.md and the notes below it."""
    lines = [
        '| `visionseq://` | file | backbone | top-1 | weights | licence |',
        '|---|---|---|---|---|---|',
    ]
    notes = {}
    for name, entry in PUBLISHED.items():
        settings = ', '.join(f'{k} {v}' for k, v in entry.backbone.items() if k != 'type')
        file = f'[{entry.file}]({entry.url or entry.page})' + ('' if entry.url else ', by hand')
        lines.append(
            f'| {name} | {file} | {entry.backbone["type"].split(".")[1]}: {settings} '
            f'| {entry.top1} | {entry.weights or "not said"} | {entry.licence} |'
        )
        if entry.note:
            notes.setdefault(entry.note, []).append(name)
    lines.append('')
    lines += [f'- {", ".join(names)}: {note}' for note, names in notes.items()]
    return '\n'.join(lines)
