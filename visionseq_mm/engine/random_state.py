"""Random numbers of a resumed training go on where those of the stopped one ended."""

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import set_random_seed

from visionseq_mm.registry import HOOKS


def random_state() -> dict:
    """The states of this process's generators, as tensors and plain data."""
    state = {
        'python': random.getstate(),
        'numpy': np.random.get_state(),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Put back what :func:`random_state` returned; tensors may have been moved to a GPU."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


class _Batches:
    """An iterator that also drops batches as onedl-mmengine's loop asks for it.

    It loads them, as mmengine's loop does, where onedl-mmengine's own iterator would skip their
    indices alone: then the generators of worker processes would not get to their place.
    """

    def __init__(self, batches):
        self._batches = batches

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._batches)

    def skip_iter(self, num_iters):
        for _ in range(num_iters):
            next(self)


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Stopping and ``--resume`` gives the training that would have been without stopping.

    mmengine restores model, optimizer, schedules and the place in the data, but not the state of
    the random generators, from which dropout, drop path and mmdet's samplers draw, nor, unless the
    config has ``randomness=dict(seed=...)``, the order of the data. This hook

    - writes the states of Python's, numpy's and torch's generators (CPU, and the current GPU) into
      every checkpoint as ``random_state``, and restores them when the training is resumed, not
      with ``load_from``. Files without it resume as before;
    - builds the data loader once more if it was built before the checkpoint's seed was known;
    - keeps what validation draws apart (every pass over a data loader draws a seed for workers):
      how often it runs changes nothing in the training.

    What is then equal, bit for bit where the operations themselves are deterministic:

    - ``IterBasedTrainLoop``, with and without worker processes. mmengine loads and drops all data
      up to the checkpoint, which brings the workers' generators to their place.
    - ``EpochBasedTrainLoop``, resumed from the end of an epoch, without worker processes or with
      ``persistent_workers=False``: new workers have the same seeds in every epoch. With persistent
      workers the order of the data is right, but not the random augmentations: uninterrupted
      workers go on drawing, resumed ones begin again with their seeds.
    - Not equal: several processes. Only the state of rank 0 is in the file. Rank 0 goes on with
      it, the others with seeds drawn from it, so that no two share their dropout.
    """

    def __init__(self):
        self._resumed = None
        self._training = None

    def before_run(self, runner):
        self._seed_of_data = runner.seed

    def before_save_checkpoint(self, runner, checkpoint):
        # The best checkpoint is saved in the middle of a validation.
        checkpoint['random_state'] = self._training or random_state()

    def after_load_checkpoint(self, runner, checkpoint):
        self._resumed = checkpoint.get('random_state')

    def before_train(self, runner):
        if runner.iter == 0:  # Only resuming sets it.
            self._resumed = None
        elif runner.seed != self._seed_of_data:
            self._rebuild_dataloader(runner)

    def _rebuild_dataloader(self, runner):
        cfg = runner.cfg.get('train_dataloader')
        if cfg is None:
            return  # The Runner was given a data loader.
        loop = runner.train_loop
        loop.dataloader = runner.build_dataloader(
            cfg,
            seed=runner.seed,
            diff_rank_seed=runner.cfg.get('randomness', {}).get('diff_rank_seed', False),
        )
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)

    def before_train_epoch(self, runner):
        if self._resumed is None:
            return
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            # The loop now drops batches, which draws random numbers without worker processes,
            # unless it is onedl-mmengine's and was told not to.
            skipped = 0 if getattr(loop, 'fast_forward_on_resume', False) else runner.iter
            loop.dataloader_iterator = _Batches(
                self._batches(loop.dataloader_iterator, skipped, runner.logger)
            )
        else:
            self._restore(runner.logger)

    def _batches(self, batches, skipped, logger):
        """``batches``, restoring after the first ``skipped``."""
        for _ in range(skipped):
            yield next(batches)
        self._restore(logger)
        yield from batches

    def _restore(self, logger):
        set_random_state(self._resumed)
        self._resumed = None
        rank = get_rank()
        if rank:
            # The same number on all ranks, as they have the same state.
            set_random_seed(int(torch.randint(2**31, ())) + rank)
        logger.info('The random state of the checkpoint is restored.')

    def before_val(self, runner):
        self._training = random_state()

    def after_val(self, runner):
        set_random_state(self._training)
        self._training = None
