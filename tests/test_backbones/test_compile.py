"""torch.compile takes a backbone as one graph, and torch.export as one program."""

import shutil
import subprocess
import sys

import pytest
import torch
from backbone_cases import KINDS, build, gradients, image, loss_of

pytestmark = pytest.mark.usefixtures('one_thread')

#: As small as they get with every kind of layer: compiling takes seconds per layer.
SMALL = {
    'vim': dict(arch=dict(embed_dims=16, depth=2), out_indices=(0, 1)),
    'vil1': dict(arch=dict(embed_dims=16, depth=2), out_indices=(0, 1)),
    'vil2': dict(arch=dict(embed_dims=16, depth=1), out_indices=0),
    'secvit': dict(
        arch=dict(
            embed_dims=(16, 16, 16, 16),
            depths=(1, 1, 1, 1),
            num_heads=(2, 2, 2, 2),
            layer_scale=(False, True, True, True),
        ),
        out_indices=(0, 1),
    ),
    'sec-swin': dict(
        arch=dict(embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2)),
        out_indices=(0, 1),
    ),
    'sec-fastervit': dict(
        arch=dict(
            stem_dims=16, embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(2, 2)
        ),
        out_indices=(0, 2),
    ),
}
TOLERANCE = dict(atol=1e-5, rtol=1e-4)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'reference')
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def small(name, **kwargs):
    return build(name, **{**SMALL[name], **kwargs}).eval()


def compiled(model):
    return torch.compile(model, fullgraph=True, backend='aot_eager')


def assert_same_training_step(model, compiled_model, x):
    outputs, expected = gradients(model, x)
    model.zero_grad(set_to_none=True)
    found = compiled_model(x)
    loss_of(found).backward()
    torch.testing.assert_close(found, outputs, **TOLERANCE)
    for name, parameter in model.named_parameters():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-5 * largest, rtol=1e-4, msg=name
        )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler, for Inductor')
@pytest.mark.skipif(' ' in torch.__file__, reason='Inductor does not quote the path of torch')
@pytest.mark.parametrize('backend', ['reference', 'cpu'])
def test_default_backend_trains_vim(backend, monkeypatch):
    """Inductor relies on the strides that the fake kernels promise."""
    monkeypatch.setenv('VISIONSEQ_BACKEND', backend)
    model = small('vim')
    assert_same_training_step(model, torch.compile(model, fullgraph=True), image(64, 64))


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('name', KINDS)
def test_outputs_and_gradients(name, with_cp):
    model = small(name, with_cp=with_cp)
    assert_same_training_step(model, compiled(model), image(48, 80))


def test_secvit_that_keeps_attention():
    model = small('secvit', recompute='kernel')
    assert_same_training_step(model, compiled(model), image(48, 80))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['secvit', 'sec-fastervit'])
def test_export_of_any_size_with_padding_marked(name):
    model, x = small(name, mask_padding=True), torch.ones(1, 4, 72, 100)
    x[:, :, 60:] = 0
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({2: auto, 3: auto},))
    for size in ((96, 64), (90, 64), (37, 101)):
        other = torch.randn(1, 4, *size)
        other[:, :, 30:, 3:] = 0
        torch.testing.assert_close(program.module()(other), model(other), **TOLERANCE)


@pytest.mark.parametrize('with_cp', [False, True])
def test_vim_with_the_cpu_backend(with_cp, monkeypatch):
    pytest.importorskip('numba')
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'cpu')
    model = small('vim', with_cp=with_cp)
    assert_same_training_step(model, compiled(model), image(48, 80))


@pytest.mark.parametrize(
    'bidirectional, recompute',
    [('none', 'kernel'), ('layer', 'kernel'), ('ssm', 'none'), ('ssm_conv', 'kernel')],
)
def test_vim_is_one_graph(bidirectional, recompute):
    model = small('vim', bidirectional=bidirectional, recompute=recompute)
    found = torch._dynamo.explain(model)(image(48, 80))
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    mixers = [op for op in found.ops_per_graph[0] if 'vim_mixer' in str(op)]
    assert len(mixers) == 2


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[] if n == 'vim' else pytest.mark.slow) for n in KINDS]
)
def test_other_image_sizes(name):
    """The second size makes the sizes variables of the graph, so that not each needs its own."""
    model = small(name)
    compiled_model = compiled(model)
    sizes = (48, 80), (112, 96), (80, 128), (64, 176)
    for size in sizes:
        x = image(*size)
        with torch.no_grad():
            torch.testing.assert_close(compiled_model(x), model(x), **TOLERANCE)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] < len(sizes)


def assert_exported(program, op, x, expected):
    assert f'visionseq_mm.{op}.default' in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)


OPS = dict(vim='vim_mixer', vil1='vil_mixer', vil2='vil_mixer')


def test_export(tmp_path):
    """In memory, and read from a file by a process that knows the ops and no backbone."""
    for name in KINDS:
        model, x = small(name), image(48, 80)
        program = torch.export.export(model, (x,))
        with torch.no_grad():
            expected = model(x)
        assert_exported(program, OPS.get(name, 'sec_attention'), x, expected)
        torch.export.save(program, tmp_path / f'{name}.pt2')
        torch.save((x, expected), tmp_path / f'{name}.pt')
    script = f"""if True:
        import sys
        import torch
        import visionseq_mm.ops
        for name in {KINDS}:
            x, expected = torch.load(name + '.pt')
            found = torch.export.load(name + '.pt2').module()(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert 'visionseq_mm.backbones' not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
