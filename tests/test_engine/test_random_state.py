"""A training stopped and resumed draws the random numbers of one that is not stopped."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

import visionseq_mm.engine.random_state as module
from visionseq_mm.engine import RandomStateHook
from visionseq_mm.engine.random_state import random_state, set_random_state

NUM_SAMPLES = 8
BATCH = 2


@DATASETS.register_module()
class Numbers(Dataset):
    """Samples that are augmented with numbers from all three generators."""

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        draws = [random.random(), np.random.rand(), float(torch.rand(()))]
        return dict(inputs=torch.tensor([float(index), *draws]))


@MODELS.register_module()
class Dropped(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs, mode):
        draws = random.random() + np.random.rand()
        x = nn.functional.dropout(torch.stack(inputs), training=self.training)
        return dict(loss=self.linear(x).square().mean() * draws)

    def val_step(self, data):
        return [torch.rand(()), random.random(), np.random.rand()]


@METRICS.register_module()
class Sinking(BaseMetric):
    """A score that is best the first time."""

    calls = 0

    def process(self, data_batch, data_samples):
        self.results.append(None)

    def compute_metrics(self, results):
        self.calls += 1
        return dict(score=-self.calls)


@pytest.fixture(autouse=True)
def workers_end(monkeypatch):
    """Now, because the garbage collector would wait five seconds for each."""
    iterators = []
    iterate = DataLoader.__iter__

    def remember(loader):
        iterators.append(iterate(loader))
        return iterators[-1]

    monkeypatch.setattr(DataLoader, '__iter__', remember)
    yield
    for iterator in iterators:
        if hasattr(iterator, '_shutdown_workers'):
            iterator._shutdown_workers()


class Losses(Hook):
    def __init__(self):
        self.found = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.found[runner.iter + 1] = outputs['loss'].item()


def train(work_dir, by_epoch=False, workers=0, persistent=False, val=100, seed=0, **settings):
    """{iteration: loss} of 8 iterations, or 2 epochs of 4, with a checkpoint in the middle."""
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    loader = dict(
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=persistent,
        dataset=dict(type='Numbers'),
    )
    cfg = dict(
        model=dict(type='Dropped'),
        work_dir=str(work_dir),
        train_dataloader=dict(loader, sampler=dict(type=sampler, shuffle=True)),
        train_cfg=dict(by_epoch=by_epoch, val_interval=val),
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_cfg=dict(),
        val_evaluator=dict(type='Sinking'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                by_epoch=by_epoch,
                interval=1 if by_epoch else 4,
                save_best='score',
                rule='greater',
            )
        ),
        custom_hooks=[dict(type='visionseq_mm.RandomStateHook')],
        randomness=dict(seed=seed),
        experiment_name=str(work_dir),
        **settings,
    )
    cfg['train_cfg'].update(dict(max_epochs=2) if by_epoch else dict(max_iters=8))
    runner = Runner.from_cfg(Config(cfg))
    losses = Losses()
    runner.register_hook(losses)
    runner.train()
    return losses.found


RESUMABLE = {
    'iterations': dict(),
    'iterations-workers': dict(workers=2),
    'iterations-persistent': dict(workers=2, persistent=True),
    'epochs': dict(by_epoch=True),
    # Persistent workers of epochs are left out: see the hook's docstring.
    'epochs-workers': dict(by_epoch=True, workers=2),
}


@pytest.mark.parametrize('name', RESUMABLE)
@pytest.mark.parametrize('seed', [0, None])
def test_resuming(name, seed, tmp_path):
    """Without a seed, mmengine learns it from the file after the data loader has got another."""
    settings = dict(RESUMABLE[name], seed=seed)
    straight = train(tmp_path / 'straight', **settings)
    file = tmp_path / 'straight' / ('epoch_1.pth' if 'epochs' in name else 'iter_4.pth')
    resumed = train(tmp_path / 'resumed', **settings, load_from=str(file), resume=True)
    assert resumed == {i: straight[i] for i in range(5, 9)}


def test_validation_changes_nothing(tmp_path):
    often = train(tmp_path / 'often', val=1)
    assert often == train(tmp_path / 'once')


def test_resuming_from_the_best_checkpoint(tmp_path):
    """It is saved in the middle of a validation, which has drawn random numbers."""
    straight = train(tmp_path / 'straight', val=3)
    (file,) = (tmp_path / 'straight').glob('best*iter_3.pth')
    resumed = train(tmp_path / 'resumed', load_from=str(file), resume=True)
    assert resumed == {i: straight[i] for i in range(4, 9)}


def test_load_from_is_a_new_training(tmp_path):
    """Begun with the same weights, but with random numbers of its own."""
    train(tmp_path / 'straight')
    file = tmp_path / 'straight' / 'iter_4.pth'
    begun = train(tmp_path / 'begun', load_from=str(file))
    assert begun == train(tmp_path / 'bare', load_from=without_state(file))


def test_file_without_the_state(tmp_path):
    train(tmp_path / 'straight')
    file = without_state(tmp_path / 'straight' / 'iter_4.pth')
    assert list(train(tmp_path / 'resumed', load_from=file, resume=True)) == [5, 6, 7, 8]


def without_state(file):
    """A copy as other trainings write it."""
    checkpoint = torch.load(file, weights_only=True)
    del checkpoint['random_state']
    torch.save(checkpoint, file.with_name('bare.pth'))
    return str(file.with_name('bare.pth'))


@pytest.mark.parametrize('fast_forward', [False, True])
def test_data_of_onedl_mmengine(fast_forward):
    """Its loop calls `skip_iter`, or drops nothing; a stand-in for it, to run without it."""
    state = random_state()
    after = draws()
    batches = (f'batch {i}, {draws()}' for i in range(4))
    loop = SimpleNamespace(dataloader_iterator=batches, fast_forward_on_resume=fast_forward)
    runner = SimpleNamespace(iter=3, train_loop=loop, logger=MMLogger.get_current_instance())
    hook = RandomStateHook()
    hook.after_load_checkpoint(None, dict(random_state=state))
    hook.before_train_epoch(runner)
    if not fast_forward:
        loop.dataloader_iterator.skip_iter(3)
    expected = f'batch {0 if fast_forward else 3}, {after}'
    assert next(loop.dataloader_iterator) == expected


def test_state_survives_a_file(tmp_path):
    torch.save(random_state(), tmp_path / 'state.pth')
    before = draws()
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert draws() == before


def test_other_ranks_draw_other_numbers(monkeypatch):
    """All get the state of rank 0; only that goes on with it."""
    state = random_state()
    after = draws()
    found = []
    for rank in range(3):
        monkeypatch.setattr(module, 'get_rank', lambda rank=rank: rank)
        hook = RandomStateHook()
        hook.after_load_checkpoint(None, dict(random_state=state))
        hook._restore(MMLogger.get_current_instance())
        found.append(draws())
    assert found[0] == after
    assert all(len(set(numbers)) == 3 for numbers in zip(*found, strict=True))


def draws():
    return random.random(), np.random.rand(), float(torch.rand(()))
