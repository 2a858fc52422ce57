"""Outputs and gradients of each backbone against its plain twin, in float64.

The images need padding and are not square, their grid is not the position table's, and every
parameter is random, so that what is misplaced shows.
"""

import pytest
import torch
from backbone_cases import CASES, PYRAMIDS, build, gradients, image, loss_of, randomize
from backbone_twins import (
    sec_fastervit_twin,
    sec_swin_twin,
    secvit_twin,
    vil_twin,
    vim_cls_twin,
    vim_twin,
)

PICTURE = image(55, 83, batch=2, dtype=torch.float64)
#: The twins of Vim and ViL walk the tokens one by one; a stride of 8 makes four times as many.
SMALL_PICTURE = image(30, 45, dtype=torch.float64)


PYRAMID_TWINS = {
    'secvit': secvit_twin,
    'sec-swin': sec_swin_twin,
    'sec-fastervit': sec_fastervit_twin,
}


def pyramid_twin(name, model, picture):
    _, arguments = CASES[name]
    twin = PYRAMID_TWINS[name]
    return twin(model, picture, arguments['arch']['num_heads'], arguments['num_clusters'])


def outputs_of_twin(name, model, picture):
    stride = CASES[name][1].get('stride', 16)
    if name.startswith('vim'):
        return vim_twin(model, picture, stride)[0]
    if name.startswith('vil'):
        return vil_twin(model, picture, int(name[3]), stride)[0]
    return pyramid_twin(name, model, picture)[0]


@pytest.mark.parametrize('name', CASES)
def test_maps_and_all_gradients(name):
    model = randomize(build(name, out_indices=(0, 1, 2, 3)))
    picture = SMALL_PICTURE if name.endswith('stride8') else PICTURE
    outputs, grads = gradients(model, picture)
    model.zero_grad(set_to_none=True)
    expected = outputs_of_twin(name, model, picture)
    loss_of(expected).backward()
    # float32 angles: the twin's may differ by a rounding.
    tolerance = dict(rtol=1e-5, atol=1e-5) if name == 'secvit' else dict(rtol=1e-7, atol=1e-7)
    for out, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out, other, **tolerance)
    for key, p in model.named_parameters():
        scale = p.grad.abs().max()
        assert scale > 0, key
        torch.testing.assert_close(grads[key] / scale, p.grad / scale, **tolerance, msg=key)


def test_vim_branches():
    model = randomize(build('vim', feature='branch'))
    _, expected = vim_twin(model, PICTURE)
    torch.testing.assert_close(list(model(PICTURE)), expected, rtol=1e-7, atol=1e-7)
    streams = randomize(build('vim', feature='stream'))(PICTURE)
    assert not torch.allclose(streams[0], expected[0])


@pytest.mark.parametrize('kind', ['middle', 'head', 'double', None])
@pytest.mark.parametrize('size', [(55, 83), (30, 45)])  # 24 and 6 patches
def test_vim_class_vector(kind, size):
    model = randomize(build('vim', cls_token=kind, out_type='cls'))
    (vector,) = model(image(*size, batch=2, dtype=torch.float64))
    expected = vim_cls_twin(model, image(*size, batch=2, dtype=torch.float64), kind, 'mean')
    torch.testing.assert_close(vector, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize('pooling', ['mean', 'max'])
def test_vim_pooling(pooling):
    model = randomize(build('vim', cls_token=None, pooling=pooling, out_type='cls'))
    expected = vim_cls_twin(model, PICTURE, None, pooling)
    torch.testing.assert_close(model(PICTURE), (expected,), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize('version', [1, 2])
def test_vil_class_vector(version):
    model = randomize(build(f'vil{version}', out_type='cls'))
    _, expected = vil_twin(model, PICTURE, version)
    assert expected.shape == (2, 16 * version)
    # The two norms' epsilons, 1e-5 and 1e-6, are in this comparison.
    torch.testing.assert_close(model(PICTURE), (expected,), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', PYRAMIDS)
def test_class_vectors_of_pyramids(name):
    model = randomize(build(name, out_type='cls'))
    picture = image(70, 45, dtype=torch.float64)
    _, expected = pyramid_twin(name, model, picture)
    assert expected.shape == (1, 1024 if name == 'secvit' else 32)
    tolerance = 1e-5 if name == 'secvit' else 1e-9
    torch.testing.assert_close(model(picture), (expected,), rtol=tolerance, atol=tolerance)
