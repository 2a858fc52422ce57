"""Official and own checkpoints in every form, and the errors for those that do not fit."""

import itertools

import goldens
import official_files
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.runner import Runner, load_checkpoint

from visionseq_mm.checkpoints import CheckpointMismatchError, select_weights
from visionseq_mm.compat.safe_load import CheckpointError
from visionseq_mm.registry import MODELS

pytestmark = pytest.mark.usefixtures('one_thread')

FAMILIES = ['vim', 'vil', 'vil2', 'secvit']


def build(config, **settings):
    return MODELS.build({**config, **settings})


def on_meta(config, **settings):
    """A full-size backbone that takes no memory and no time."""
    with torch.device('meta'):
        return build(config, **settings)


def config_of(variant):
    """Config of the backbone whose official shapes ``official_files`` knows as ``variant``."""
    case = goldens.load(official_files.VARIANTS[variant])
    settings = dict(case.settings)
    settings.pop('img_size', None)
    return dict(type=f'visionseq_mm.{case.family}', **settings)


def assert_same(model, other):
    expected, actual = other.state_dict(), model.state_dict()
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def loaded_from(config, weights, **settings):
    """A backbone whose tensors are all from ``weights``, strictly."""
    model = on_meta(config, **settings)
    model.load_state_dict(weights, assign=True)
    return model


@pytest.fixture(scope='module', params=FAMILIES)
def small(request):
    """(family, official weights, config, a 'cls' backbone with these weights)."""
    weights, config = official_files.small(request.param)
    return request.param, weights, config, loaded_from(config, weights, out_type='cls')


@pytest.fixture
def log(monkeypatch):
    """What is logged."""
    lines = []
    logger = MMLogger.get_current_instance()

    def handle(record):
        if 'registry' not in record.getMessage():
            lines.append(record.getMessage())

    monkeypatch.setattr(logger, 'handle', handle)
    return lines


class Wrapper(BaseModel):
    """Stands for a detector, segmentor or classifier."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.neck = torch.nn.Linear(2, 2)

    def forward(self, *images, mode):
        outputs = self.backbone(torch.stack(images))
        return dict(loss=sum(x.square().mean() for x in outputs) + self.neck.weight.sum())


# --- forms that load -------------------------------------------------------------------------


FORMS = {
    'bare': lambda w: w,
    'model': lambda w: dict(model=w, epoch=3),
    'model_ema': lambda w: dict(model_ema=w, args=None),
    'state_dict': lambda w: dict(state_dict=w, meta=dict(epoch=3)),
    'ddp': lambda w: dict(model={f'module.{k}': v for k, v in w.items()}),
    'with_others': lambda w: {**w, 'epoch': 3, 'name': 'x'},
    'no_head': lambda w: {k: v for k, v in w.items() if not k.startswith('head.')},
}


def test_forms(small):
    _, weights, config, loaded = small
    for form in FORMS.values():
        assert_same(loaded_from(config, form(weights), out_type='cls'), loaded)


@pytest.mark.parametrize('form', ['model', 'state_dict'])
def test_files(small, form, tmp_path):
    """By mmengine's loader, and by its ``init_cfg``."""
    _, weights, config, loaded = small
    file = str(tmp_path / 'file.pth')
    torch.save(FORMS[form](weights), file)
    model = build(config, out_type='cls')
    load_checkpoint(model, file, strict=True)
    assert_same(model, loaded)
    model = build(config, out_type='cls', init_cfg=dict(type='Pretrained', checkpoint=file))
    model.init_weights()
    assert_same(model, loaded)


def test_weights_arrive_where_they_belong(small):
    """Spot checks by hand; the goldens check all."""
    family, weights, _, loaded = small
    pairs = {
        'vim': ('layers.3.mixer.A_b_log', 'blocks.3.mixer.A_b_log'),
        'vil': ('legacy_norm.weight', 'final_norm.weight'),
        'vil2': ('legacy_norm.weight', 'pool_norm.weight'),
        'secvit': ('layers.2.blocks.0.norm1.norm.weight', 'stages.2.blocks.0.norm1.weight'),
    }
    theirs, ours = pairs[family]
    assert torch.equal(loaded.state_dict()[ours], weights[theirs])


@pytest.mark.parametrize('version', [1, 2])
def test_vil_training_names(version):
    """The downloadable files' names; their final norms are crossed between the versions."""
    weights, config = official_files.small('vil' if version == 1 else 'vil2')
    tensors = official_files.raw(version, weights)
    assert not set(tensors) & {k for k in weights if 'norm' in k or '.layer.' in k}
    tensors['xlstm.blocks.0.xlstm.mlstm_cell.causal_mask'] = torch.ones(3, 3)
    file = dict(state_dict=tensors, ctor_kwargs=dict(dim=192), ckpt=dict(epoch=400))
    assert_same(
        loaded_from(config, file, out_type='cls'), loaded_from(config, weights, out_type='cls')
    )


def test_constants_of_files_are_ignored():
    weights, config = official_files.small('secvit')
    angles = {f'layers.{i}.RoPE.angle': torch.full((16,), torch.nan) for i in range(4)}
    assert_same(loaded_from(config, {**weights, **angles}), loaded_from(config, weights))
    weights, config = official_files.small('vim')
    loaded_from(config, {**weights, 'rope.freqs_cos': torch.ones(196, 192)})


def test_dense_backbones_take_full_files(small):
    """What they do not build is left out, in strict mode too."""
    _, weights, config, loaded = small
    expected = loaded.state_dict()
    for out_indices in [(0,), (1, 2), None]:
        for checkpoint in (weights, expected):
            dense = loaded_from(config, checkpoint, out_indices=out_indices).state_dict()
            assert len(dense) < len(expected)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.items())


@pytest.mark.parametrize('variant', official_files.VARIANTS)
def test_dense_backbones_of_full_size(variant):
    weights = official_files.without_memory(official_files.shapes(variant))
    for settings in (dict(), dict(out_indices=(0,)), dict(frozen_stages=1), dict(out_type='cls')):
        loaded_from(config_of(variant), weights, **settings)


def test_dense_checkpoint_in_a_classifier(small):
    """The class token and the last norms are missing: said, and an error in strict mode."""
    _, _, config, loaded = small
    dense = loaded_from(config, loaded.state_dict())
    model = build(config, out_type='cls', min_matched=0.5)
    with pytest.raises(RuntimeError, match=r'Missing key.*final_norm'):
        model.load_state_dict(dense.state_dict())
    assert 'final_norm.weight' in model.load_state_dict(dense.state_dict(), strict=False)[0]


def test_own_and_official_names_mix():
    weights, config = official_files.small('vim')
    reference = loaded_from(config, weights, out_type='cls')
    mixed = {k: v for k, v in weights.items() if not k.startswith('layers.0.')}
    mixed |= {k: v for k, v in reference.state_dict().items() if k.startswith('blocks.0.')}
    assert_same(loaded_from(config, mixed, out_type='cls'), reference)
    twice = {**weights, 'final_norm.weight': weights['norm_f.weight']}
    with pytest.raises(CheckpointMismatchError, match=r'both norm_f\.weight and final_norm'):
        loaded_from(config, twice)


def test_file_of_another_dtype(small):
    """The model's dtype stays."""
    _, weights, config, _ = small
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    model = build(config).double()
    model.load_state_dict(half)
    assert {v.dtype for v in model.parameters()} == {torch.float64}


# --- which of model and model_ema ------------------------------------------------------------


@pytest.mark.parametrize(
    ('variant', 'taken'),
    [
        ('vim-tiny', 'model'),
        ('vim-base', 'model'),
        ('vil2-small', 'model'),
        ('secvit-tiny', 'model'),
        ('secvit-small', 'model_ema'),
        ('secvit-base', 'model_ema'),
        ('secvit-large', 'model_ema'),
    ],
)
def test_model_or_ema(variant, taken, log):
    shapes = official_files.shapes(variant)
    checkpoint = dict(
        model=official_files.without_memory(shapes, 1.0),
        model_ema=official_files.without_memory(shapes, 2.0),
    )
    backbone = on_meta(config_of(variant))
    backbone.load_state_dict(checkpoint, assign=True)
    value = next(backbone.parameters()).mean().item()
    assert value == dict(model=1.0, model_ema=2.0)[taken]
    assert log == [f'The checkpoint holds both model and model_ema: took {taken}.']


def test_only_one_of_model_and_ema(log):
    tensor = torch.ones(1)
    assert select_weights(dict(model=dict(a=tensor), model_ema=None), prefer_ema=True) == dict(
        a=tensor
    )
    assert select_weights(dict(model_ema=dict(a=tensor))) == dict(a=tensor)
    assert select_weights(dict(model=dict(type='Vim'), state_dict=dict(a=tensor))) == dict(
        a=tensor
    )
    assert not log


# --- whole models ----------------------------------------------------------------------------


def test_own_checkpoint_of_a_whole_model(small, tmp_path):
    _, weights, config, _ = small
    trained, other = Wrapper(config), Wrapper(config)
    trained.backbone.load_state_dict(weights)
    tensors, file = trained.state_dict(), str(tmp_path / 'epoch_1.pth')
    ddp = {f'module.{k}': v for k, v in tensors.items()}
    for state_dict in (ddp, tensors):
        torch.save(dict(state_dict=state_dict, meta=dict(epoch=1)), file)
        load_checkpoint(other, file, strict=True)
        assert_same(other, trained)
        other.backbone.load_state_dict({k: v + 1 for k, v in weights.items()})
    ema = ExponentialMovingAverage(other)
    ema.load_state_dict(ExponentialMovingAverage(trained).state_dict())
    assert_same(ema.module, trained)
    # Its backbone alone, with and without saying where it stands.
    pretrained = dict(type='Pretrained', checkpoint=file)
    backbone = build(config, init_cfg=dict(pretrained, prefix='backbone.'))
    backbone.init_weights()
    assert_same(backbone, trained.backbone)
    with pytest.raises(CheckpointMismatchError, match=r"add prefix='backbone\.' to init_cfg"):
        build(config, init_cfg=pretrained).init_weights()


class Images(torch.utils.data.Dataset):
    metainfo = {}

    def __init__(self, readable=True):
        self.readable = readable

    def __len__(self):
        return 1

    def __getitem__(self, index):
        assert self.readable, 'training has begun'
        return goldens.image(1, 32, 32)[0]


def runner(work_dir, model, dataset, max_epochs=1, **settings):
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=dataset, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
        experiment_name=str(work_dir),
        **settings,
    )


def test_training_resumes(tmp_path):
    """Saved, averaged and loaded again by mmengine's runner."""
    weights, config = official_files.small('vim')
    file = tmp_path / 'official.pth'
    torch.save(official_files.published_form('vim', weights), file)
    config['out_indices'] = (0,)
    config['init_cfg'] = dict(type='Pretrained', checkpoint=str(file))
    hooks = dict(custom_hooks=[dict(type=EMAHook)])
    first = runner(tmp_path / 'run', Wrapper(config), Images(), **hooks)
    first.train()
    trained = first.model.state_dict()
    assert not torch.equal(
        trained['backbone.blocks.0.norm.weight'], weights['layers.0.norm.weight']
    )
    second = runner(
        tmp_path / 'run', Wrapper(config), Images(False), resume=True, **hooks
    )  # at its end already: trains no more
    second.train()
    for name, tensor in trained.items():
        assert torch.equal(second.model.state_dict()[name], tensor), name


@pytest.mark.parametrize('family', FAMILIES)
def test_official_file_as_load_from_of_a_detector(family, tmp_path):
    """An error before training, not a detector with random weights."""
    weights, config = official_files.small(family)
    file = tmp_path / 'official.pth'
    torch.save(official_files.published_form(family, weights), file)
    channels = [64, 128, 256, 512] if family == 'secvit' else [192] * 4
    detector = dict(
        type='mmdet.RetinaNet',
        backbone=config,
        neck=dict(type='mmdet.FPN', in_channels=channels, out_channels=8, num_outs=5),
        bbox_head=dict(
            type='mmdet.RetinaHead', num_classes=1, in_channels=8, feat_channels=8, stacked_convs=1
        ),
    )
    with pytest.raises(CheckpointMismatchError, match='belongs into the backbone, init_cfg='):
        runner(
            tmp_path / 'run', detector, Images(False), load_from=str(file), default_scope='mmdet'
        ).train()
    detector['backbone'] = dict(config, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    with pytest.raises(AssertionError, match='training has begun'):
        runner(tmp_path / 'run2', detector, Images(False), default_scope='mmdet').train()


# --- files that do not fit -------------------------------------------------------------------


@pytest.mark.parametrize('wanted', official_files.VARIANTS)
def test_another_variant(wanted):
    """Files of all others, of the other families too."""
    backbone = on_meta(config_of(wanted))
    for given in official_files.VARIANTS:
        if given.removesuffix('-stride8') == wanted.removesuffix('-stride8'):
            continue
        weights = official_files.without_memory(official_files.shapes(given))
        forms = [weights]
        if given.startswith('vil'):
            forms.append(official_files.raw(2 if given.startswith('vil2') else 1, weights))
        for checkpoint in forms:
            with pytest.raises(CheckpointMismatchError, match='does not fit the backbone'):
                backbone.load_state_dict(checkpoint, strict=False)


def test_stride8_into_stride16():
    """The same weights but for the table, which is resized."""
    for given, wanted in itertools.permutations(['vim-tiny', 'vim-tiny-stride8']):
        backbone = on_meta(config_of(wanted))
        grid = backbone.pos_embed.shape
        weights = official_files.without_memory(official_files.shapes(given))
        backbone.load_state_dict(weights, assign=True)
        assert backbone.pos_embed.shape == grid


def test_error_lists_what_differs():
    """Missing, unexpected and misshapen tensors, shortened, and what to do."""
    weights = official_files.without_memory(official_files.shapes('vil-smallplus'))
    weights['blocks.0.norm.weight'] = torch.zeros(7)
    del weights['blocks.1.norm.weight']
    with pytest.raises(CheckpointMismatchError) as caught:
        on_meta(config_of('vil-small')).load_state_dict(weights)
    first, missing, unexpected, misshapen, advice = str(caught.value).splitlines()
    assert first.startswith('This checkpoint does not fit the backbone ViL: 337 tensors match')
    assert missing == 'missing (1): blocks.1.norm.weight'
    assert unexpected.startswith('unexpected (28): blocks.24.')
    assert unexpected.endswith(', and 20 more')
    assert misshapen == (
        'misshapen (1): blocks.0.norm.weight: (7,) in the checkpoint, (384,) here'
    )
    assert 'another variant' in advice and 'min_matched' in advice


def test_min_matched(log):
    weights = official_files.without_memory(official_files.shapes('vil-small'))
    smallplus = config_of('vil-smallplus')
    backbone = on_meta(smallplus, min_matched=0.9)
    missing, unexpected = backbone.load_state_dict(weights, strict=False, assign=True)
    assert len(missing) == 28 and not unexpected
    assert 'blocks.25' in log[-1]
    on_meta(smallplus, min_matched=0).load_state_dict({}, strict=False)
    with pytest.raises(CheckpointMismatchError):
        on_meta(smallplus).load_state_dict({}, strict=False)


def test_file_without_weights():
    for checkpoint in (dict(teacher=dict(a=torch.ones(1)), epoch=3), dict(model={}, epoch=3)):
        with pytest.raises(CheckpointMismatchError, match=r'no weights.*It has .*epoch'):
            on_meta(config_of('vim-tiny')).load_state_dict(checkpoint, strict=False)


@pytest.mark.parametrize('damage', ['truncated', 'html'])
def test_damaged_file(damage, tmp_path):
    weights, config = official_files.small('vim')
    file = tmp_path / 'official.pth'
    torch.save(weights, file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == 'truncated' else b'<html>Log in')
    backbone = build(config, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    with pytest.raises(CheckpointError, match='cut off' if damage == 'truncated' else 'web page'):
        backbone.init_weights()
