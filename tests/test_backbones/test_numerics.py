"""Number types, and what a module goes through: copies, files, modes, other initialisers."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from backbone_cases import CASES, KINDS, build, gradients, image, randomize

from visionseq_mm.backbones import vim as vim_module

kinds = pytest.mark.parametrize('name', KINDS)


@kinds
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_cast_models(name, dtype):
    for out_type in ('featmap', 'cls'):
        model = build(name, out_type=out_type).eval().to(dtype)
        with torch.no_grad():
            outputs = model(image(40, 70, dtype=dtype))
        assert {out.dtype for out in outputs} == {dtype}
        assert all(out.isfinite().all() for out in outputs)


@pytest.mark.parametrize('name', CASES)
def test_single_precision_is_close_to_double(name):
    model = randomize(build(name, out_indices=-1))
    picture = image(40, 70, dtype=torch.float64)
    (exact,) = model(picture)
    (single,) = model.float()(picture.float())
    error = (single.double() - exact).norm() / exact.norm()
    assert error < 1e-4


@kinds
def test_autocast(name):
    model = build(name)
    picture = image(64, 64, batch=2)
    expected = build(name)(picture)
    with torch.autocast('cpu', torch.bfloat16):
        outputs, grads = gradients(model, picture)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    for out, exact in zip(outputs, expected, strict=True):
        assert (out.float() - exact).norm() < 0.2 * exact.norm()


def test_vim_keeps_its_stream_and_states_in_float32(monkeypatch):
    """Under autocast, in which the mixers' matrices are bfloat16."""
    mixers = []

    def spy(tokens, *weights):
        mixers.append([x.dtype for x in (tokens, *weights[5:8])])
        out = vim_mixer(tokens, *weights)
        mixers[-1].append(out.dtype)
        return out

    vim_mixer = vim_module.vim_mixer
    monkeypatch.setattr(vim_module, 'vim_mixer', spy)
    model = build('vim')
    with torch.no_grad():
        model.pos_embed += 1000  # in bfloat16, whose neighbours are 4 apart here, blocks vanish
    with torch.autocast('cpu', torch.bfloat16):
        maps = model(image(64, 64))
    low, full = torch.bfloat16, torch.float32
    assert mixers == [[full, full, full, full, low]] * 4  # tokens, dt_bias, A, D, result
    assert {m.dtype for m in maps} == {full}
    for before, after in pairwise(maps):
        assert ((after - before) != 0).float().mean() > 0.9


@kinds
def test_state_dict_round_trip(name):
    source = randomize(build(name, out_norm=dict(type='BN'))).float()
    state = source.state_dict()
    kept = {key: tensor.clone() for key, tensor in state.items()}
    target = build(name, seed=1, out_norm=dict(type='BN')).eval()
    result = target.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert state.keys() == kept.keys() == target.state_dict().keys()
    picture = image(48, 64)
    torch.testing.assert_close(target(picture), source(picture), rtol=0, atol=0)


@kinds
def test_copies(name):
    model = build(name, out_norm=dict(type='visionseq_mm.LN2d'), frozen_stages=1).eval()
    expected = model(image(48, 64))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        torch.testing.assert_close(other(image(48, 64)), expected, rtol=0, atol=0)


@kinds
def test_inference_then_training(name):
    model = build(name, with_cp=True)
    with torch.inference_mode():
        inferred = model.eval()(image(48, 64))
    with torch.no_grad():
        assert not any(out.requires_grad for out in model(image(48, 64)))
    outputs, grads = gradients(model, image(48, 64))
    torch.testing.assert_close(outputs, tuple(out.clone() for out in inferred))
    assert None not in grads.values()


@kinds
@pytest.mark.parametrize('out_type', ['featmap', 'cls'])
def test_init_weights_without_init_cfg_changes_nothing(name, out_type):
    """The toolboxes call it on every model; dt_proj's biases, e.g., must live through that."""
    model = build(name, out_type=out_type)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@kinds
def test_constructor_leaves_leaves(name):
    for key, p in build(name).named_parameters():
        assert p.is_leaf, key
        assert p.requires_grad, key
