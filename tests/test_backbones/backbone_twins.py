"""The models again, written token by token, block by block from the papers' equations.

Slow and plain on purpose: directions by flipping, gates and halves where the papers have them, no
op of the package. A twin takes a model for its parameters alone.
"""

import math

import torch
import torch.nn.functional as F

PATCH = 16


# ----------------------------------------------------------------------- stem


def patches_twin(model, image, stride):
    """(B, h, w, D), each patch cut out by hand; zeros stand beyond the right and lower edge."""
    B, _, height, width = image.shape
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    tops = [0]
    while tops[-1] + PATCH < height:
        tops.append(tops[-1] + stride)
    lefts = [0]
    while lefts[-1] + PATCH < width:
        lefts.append(lefts[-1] + stride)
    rows = []
    for top in tops:
        row = []
        for left in lefts:
            patch = image.new_zeros(B, 3, PATCH, PATCH)
            part = image[:, :, top : top + PATCH, left : left + PATCH]
            patch[:, :, : part.shape[2], : part.shape[3]] = part
            row.append(torch.einsum('bchw,dchw->bd', patch, weight) + bias)
        rows.append(torch.stack(row, 1))
    return torch.stack(rows, 1)


def stem_twin(model, image, stride):
    """Patches with their positions, (B, h, w, D)."""
    tokens = patches_twin(model, image, stride)
    table = model.pos_embed.permute(0, 3, 1, 2)
    table = F.interpolate(
        table, size=tokens.shape[1:3], mode='bicubic', align_corners=False, antialias=False
    )
    return tokens + table.permute(0, 2, 3, 1)


def map_twin(tokens, hw):
    """(B, L, D) -> (B, D, h, w), row by row."""
    h, w = hw
    rows = [tokens[:, r * w : (r + 1) * w].transpose(1, 2) for r in range(h)]
    return torch.stack(rows, 2)


def causal_conv_twin(x, conv):
    """Depth-wise, over a token and its three predecessors, the last tap on the token itself."""
    L = x.shape[1]
    padded = torch.cat([x.new_zeros(x.shape[0], 3, x.shape[2]), x], 1)
    return sum(padded[:, i : i + L] * conv.weight[:, 0, i] for i in range(4)) + conv.bias


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def layer_norm(x, weight, bias, eps):
    x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return x if bias is None else x + bias


def affine(x, linear):
    return F.linear(x, linear.weight, linear.bias)


# ------------------------------------------------------------------------ Vim


def vim_direction(x, z, conv, x_proj, dt_proj, A_log, D):
    rank = dt_proj.weight.shape[1]
    u = F.silu(causal_conv_twin(x, conv))
    dt, B, C = affine(u, x_proj).split([rank, 16, 16], -1)
    delta = F.softplus(affine(dt, dt_proj))
    A = -A_log.exp()
    h, ys = 0, []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        h = (step * A).exp() * h + step * B[:, t, None, :] * u[:, t, :, None]
        ys.append((h * C[:, t, None, :]).sum(-1))
    return (torch.stack(ys, 1) + D * u) * F.silu(z)


def vim_mixer_twin(m, tokens):
    """Two directions, each gated for itself, and half their sum."""
    x, z = affine(tokens, m.in_proj).chunk(2, -1)
    there = vim_direction(x, z, m.conv1d, m.x_proj, m.dt_proj, m.A_log, m.D)
    back = vim_direction(
        x.flip(1), z.flip(1), m.conv1d_b, m.x_proj_b, m.dt_proj_b, m.A_b_log, m.D_b
    )
    return affine((there + back.flip(1)) / 2, m.out_proj)


def vim_twin(model, image, stride=16):
    """Streams and branches of all blocks, (B, D, h, w) each; no class token."""
    tokens = stem_twin(model, image, stride)
    hw = tokens.shape[1:3]
    residual = tokens.flatten(1, 2)
    streams, branches = [], []
    for block in model.blocks:
        hidden = vim_mixer_twin(block.mixer, rms_norm(residual, block.norm.weight))
        residual = residual + hidden
        streams.append(map_twin(residual, hw))
        branches.append(map_twin(hidden, hw))
    return streams, branches


def vim_cls_twin(model, image, kind, pooling, stride=16):
    """The vector before the head."""
    tokens = stem_twin(model, image, stride).flatten(1, 2)
    count = tokens.shape[1]
    places = {'head': [0], 'middle': [count // 2], 'double': [0, count + 1], None: []}[kind]
    sequence = list(tokens.unbind(1))
    for i, place in enumerate(places):
        cls = model.cls_token[:, i] + model.cls_pos_embed[:, i]
        sequence.insert(place, cls.expand(len(image), -1))
    residual = torch.stack(sequence, 1)
    for block in model.blocks:
        residual = residual + vim_mixer_twin(block.mixer, rms_norm(residual, block.norm.weight))
    y = rms_norm(residual, model.final_norm.weight)
    if kind is not None:
        return y[:, places].mean(1)
    return y.mean(1) if pooling == 'mean' else y.max(1).values


# ------------------------------------------------------------------------ ViL


def headwise_twin(x, linear):
    """Blocks of four channels, each with a matrix of its own."""
    parts = [x[..., 4 * g : 4 * g + 4] @ W.T for g, W in enumerate(linear.weight)]
    y = torch.cat(parts, -1)
    return y if linear.bias is None else y + linear.bias


def grid_conv_twin(x, conv, hw):
    """Depth-wise 3x3 convolution on the grid, one shifted copy for each tap."""
    h, w = hw
    padded = F.pad(x.unflatten(1, hw), (0, 0, 1, 1, 1, 1))
    taps = [
        padded[:, i : i + h, j : j + w] * conv.weight[:, 0, i, j]
        for i in range(3)
        for j in range(3)
    ]
    return (sum(taps) + conv.bias).flatten(1, 2)


def mlstm_cell_twin(cell, q, k, v):
    """The quadratic parallel form, head by head, and the norm of each head."""
    gates = torch.cat([q, k, v], -1)
    i, f = affine(gates, cell.igate), affine(gates, cell.fgate)
    S, E = q.shape[1:]
    Dh = E // 4
    norm, heads = cell.outnorm, []
    for n in range(4):
        part = slice(n * Dh, (n + 1) * Dh)
        sums = F.logsigmoid(f[..., n]).cumsum(1)
        log_D = sums[:, :, None] - sums[:, None, :] + i[:, None, :, n]
        log_D = log_D.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf)
        m = log_D.max(-1, keepdim=True).values
        C = (q[..., part] @ k[..., part].mT / Dh**0.5) * (log_D - m).exp()
        normalizer = torch.maximum(C.sum(-1, keepdim=True).abs(), (-m).exp()) + 1e-6
        bias = None if norm.bias is None else norm.bias[part]
        heads.append(layer_norm(C @ v[..., part] / normalizer, 1 + norm.weight[part], bias, 1e-5))
    return torch.cat(heads, -1)


def vil_paths(traversal, index, hw):
    """Numbers of the tokens in the order in which each direction of layer ``index`` reads them.

    With the grid on which that sequence stands row by row.
    """
    h, w = hw
    rows = [r * w + c for r in range(h) for c in range(w)]
    columns = [r * w + c for c in range(w) for r in range(h)]
    every = [(rows, (h, w)), (rows[::-1], (h, w)), (columns, (w, h)), (columns[::-1], (w, h))]
    return {
        'forward': every[:1],
        'alternating': [every[index % 2]],
        'alternating_quad': [every[index % 4]],
        'bidirectional': every[:2],
        'quad': every,
    }[traversal.removesuffix('_shared')]


def vil_direction_twin(m, x, z, hw):
    """The gated output of one direction, which reads its tokens from the first to the last."""
    if m.conv.weight.ndim == 3:
        c = F.silu(causal_conv_twin(x, m.conv))
    else:
        c = F.silu(grid_conv_twin(x, m.conv, hw))
    q, k, v = (headwise_twin(a, p) for a, p in ((c, m.q_proj), (c, m.k_proj), (x, m.v_proj)))
    return (mlstm_cell_twin(m.mlstm_cell, q, k, v) + m.learnable_skip * c) * F.silu(z)


def vil_layer_twin(layer, tokens, paths, shared):
    """One direction after the other, each of tokens that were put in its order."""
    x, z = affine(tokens, layer.proj_up).chunk(2, -1)
    weights = [layer] * len(paths) if shared else [layer, *layer.other_directions]
    y = 0
    for m, (order, hw) in zip(weights, paths, strict=True):
        gated = vil_direction_twin(m, x[:, order], z[:, order], hw)
        back = [order.index(t) for t in range(len(order))]
        y = y + gated[:, back]
    return affine(y, layer.proj_down)


def vil_twin(model, image, version, stride=16, traversal='alternating', pooling=None):
    """Maps after all blocks (pairs), and the vector before the head where there is one."""
    tokens = stem_twin(model, image, stride)
    hw = tokens.shape[1:3]
    tokens = tokens.flatten(1, 2)
    if pooling == 'middle_cls':
        half = math.ceil(tokens.shape[1] / 2)
        sequence = list(tokens.unbind(1))
        sequence.insert(half, model.cls_token[:, 0].expand(len(image), -1))
        tokens, hw = torch.stack(sequence, 1), (1, len(sequence))
    if version == 1:
        layers = list(model.blocks)
    else:
        pairs = [(p.rowwise_from_top_left, p.rowwise_from_bot_right) for p in model.blocks]
        layers = [layer for pair in pairs for layer in pair]
    maps = []
    for i, block in enumerate(layers):
        x = layer_norm(tokens, 1 + block.norm.weight, block.norm.bias, 1e-5)
        paths = vil_paths(traversal, i, hw)
        tokens = tokens + vil_layer_twin(block.layer, x, paths, traversal.endswith('_shared'))
        if version == 1 or i % 2:
            maps.append(map_twin(tokens, hw))
    if not hasattr(model, 'pool_norm'):
        return maps, None
    final, pool = model.final_norm, model.pool_norm
    y = layer_norm(tokens, 1 + final.weight, final.bias, 1e-5 if version == 1 else 1e-6)
    L = y.shape[1]
    vector = {
        'bilateral_avg': (y[:, 0] + y[:, L - 1]) / 2,
        'bilateral_concat': torch.cat([y[:, 0], y[:, L - 1]], -1),
        'avg': sum(y.unbind(1)) / L,
        'middle_patch': y[:, L // 2],
        'middle_cls': y[:, math.ceil((L - 1) / 2)],
    }[pooling or ('bilateral_avg' if version == 1 else 'bilateral_concat')]
    return maps, layer_norm(vector, pool.weight, pool.bias, 1e-6 if version == 1 else 1e-5)


# --------------------------------------------------------------------- SecViT


def conv_twin(x, conv, **kwargs):
    return F.conv2d(x, conv.weight, conv.bias, **kwargs)


def batch_norm_twin(x, norm, eps=1e-5):
    """With the running statistics."""
    shape = (1, -1, 1, 1)
    x = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + eps).sqrt()
    return x * norm.weight.view(shape) + norm.bias.view(shape)


def channel_norm_twin(x, norm, eps=1e-6):
    return layer_norm(x.movedim(1, -1), norm.weight, norm.bias, eps).movedim(-1, 1)


def cluster_twin(q, k, v, num_clusters):
    """Attention within the clusters of one head, cluster by cluster; all (Dh, L)."""
    Dh, L = q.shape
    k = k * Dh**-0.5
    cosine = F.cosine_similarity(k, k.mean(1, keepdim=True), dim=0)
    order = sorted(range(L), key=cosine.tolist().__getitem__)
    y = [None] * L
    clusters = min(num_clusters, L)
    for c in range(clusters):
        members = order[c * L // clusters : (c + 1) * L // clusters]
        weights = (q[:, members].T @ k[:, members]).softmax(-1)
        for i, row in zip(members, weights @ v[:, members].T, strict=True):
            y[i] = row
    return torch.stack(y, 1)


def rotate_twin(x, h, w):
    """x (Dh, h * w): pairs of channels as complex numbers, turned by row, then by column."""
    quarter = x.shape[0] // 4
    steps = [i / (quarter - 1) if quarter > 1 else 0 for i in range(quarter)]
    frequency = (1 / torch.tensor(10000.0) ** torch.tensor(steps)).to(x.dtype)  # float32 values
    angle = torch.stack([p * frequency for p in range(max(h, w))], 1).to(x.dtype)
    rows = angle[:, :h, None].expand(-1, h, w).flatten(1)
    columns = angle[:, None, :w].expand(-1, h, w).flatten(1)
    turn = torch.polar(torch.ones_like(torch.cat([rows, columns])), torch.cat([rows, columns]))
    turned = torch.complex(x[0::2], x[1::2]) * turn
    return torch.stack([turned.real, turned.imag], 1).flatten(0, 1)


def attention_twin(attn, x, num_heads, num_clusters):
    """Image by image, head by head."""
    B, C, h, w = x.shape
    Dh = C // num_heads
    qkv = conv_twin(x, attn.qkv)
    q, k, v = qkv[:, :C], qkv[:, C : 2 * C], qkv[:, 2 * C :]
    out = conv_twin(v, attn.lepe, padding=2, groups=C)
    rows = []
    for b in range(B):
        for n in range(num_heads):
            q_, k_, v_ = (t[b, n * Dh : (n + 1) * Dh].flatten(1) for t in (q, k, v))
            q_, k_ = rotate_twin(q_, h, w), rotate_twin(k_, h, w)
            rows.append(cluster_twin(q_, k_, v_, num_clusters))
    attended = torch.stack(rows).unflatten(0, (B, num_heads)).flatten(1, 2).unflatten(2, (h, w))
    return conv_twin(attended + out, attn.out_proj)


def secvit_twin(model, image, num_heads, num_clusters):
    """Maps of the stages, and the vector before the head where there is one."""
    x = image
    for i, stride in zip((0, 3, 6, 9), (2, 1, 1, 2), strict=True):
        x = conv_twin(x, model.patch_embed.proj[i], stride=stride, padding=1)
        x = batch_norm_twin(x, model.patch_embed.proj[i + 1])
        if i < 9:
            x = F.gelu(x)
    maps = []
    for stage, heads, clusters in zip(model.stages, num_heads, num_clusters, strict=False):
        for block in stage.blocks:
            C = x.shape[1]
            x = x + conv_twin(x, block.pos, padding=1, groups=C)
            y = attention_twin(block.attn, channel_norm_twin(x, block.norm1), heads, clusters)
            x = x + (block.gamma_1 * y if hasattr(block, 'gamma_1') else y)
            y = F.gelu(conv_twin(channel_norm_twin(x, block.norm2), block.ffn.fc1))
            y = y + conv_twin(y, block.ffn.dwconv, padding=1, groups=3 * C)
            y = conv_twin(y, block.ffn.fc2)
            x = x + (block.gamma_2 * y if hasattr(block, 'gamma_2') else y)
        maps.append(x)
        if stage.downsample is not None:
            x = conv_twin(x, stage.downsample.reduction, stride=2, padding=1)
            x = batch_norm_twin(x, stage.downsample.norm)
    if not hasattr(model, 'final_norm'):
        return maps, None
    x = batch_norm_twin(conv_twin(x, model.proj), model.final_norm)
    return maps, (x * x.sigmoid()).mean((2, 3))


# ------------------------------------------- Swin and FasterViT with clusters


def linear_twin(x, linear):
    """Of a map (B, C, h, w)."""
    bias = 0 if linear.bias is None else linear.bias[:, None, None]
    return torch.einsum('oc,bchw->bohw', linear.weight, x) + bias


def host_block_twin(block, x, num_heads, num_clusters):
    qkv = linear_twin(channel_norm_twin(x, block.norm1, 1e-5), block.attn.qkv)
    heads = qkv.flatten(2).unflatten(1, (3, num_heads, -1))  # (B, 3, H, Dh, L)
    rows = [
        [cluster_twin(*head, num_clusters) for head in zip(*one, strict=True)] for one in heads
    ]
    y = torch.stack([torch.cat(row) for row in rows]).view(x.shape)
    x = x + linear_twin(y, block.attn.proj)
    y = F.gelu(linear_twin(channel_norm_twin(x, block.norm2, 1e-5), block.ffn.layers[0][0]))
    return x + linear_twin(y, block.ffn.layers[1])


def pixels_twin(x, size):
    """(B, C, size, size, h, w): what each square of pixels has; zeros stand beyond the edges."""
    x = F.pad(x, (0, -x.shape[3] % size, 0, -x.shape[2] % size))
    rows = [torch.stack([x[:, :, i::size, j::size] for j in range(size)], 2) for i in range(size)]
    return torch.stack(rows, 2)


def sec_swin_twin(model, image, num_heads, num_clusters):
    """Maps of the stages, and the vector before the head where there is one."""
    stem = model.patch_embed.projection
    x = torch.einsum('bcijhw,ocij->bohw', pixels_twin(image, 4), stem.weight)
    x = channel_norm_twin(x + stem.bias[:, None, None], model.patch_embed.norm, 1e-5)
    maps = []
    for stage, heads, clusters in zip(model.stages, num_heads, num_clusters, strict=False):
        for block in stage.blocks:
            x = host_block_twin(block, x, heads, clusters)
        maps.append(x)
        if stage.downsample is not None:
            x = channel_norm_twin(pixels_twin(x, 2).flatten(1, 3), stage.downsample.norm, 1e-5)
            x = linear_twin(x, stage.downsample.reduction)
    if not hasattr(model, 'final_norm'):
        return maps, None
    return maps, channel_norm_twin(x, model.final_norm, 1e-5).mean((2, 3))


def sec_fastervit_twin(model, image, num_heads, num_clusters):
    """Maps of the stages, and the vector before the head where there is one."""
    stem, x = model.patch_embed, image
    for conv, norm in ((stem.conv1, stem.norm1), (stem.conv2, stem.norm2)):
        x = batch_norm_twin(conv_twin(x, conv, stride=2, padding=1), norm, 1e-4).clamp(min=0)
    maps = []
    for i, stage in enumerate(model.stages):
        for block in stage.blocks:
            if i < 2:
                y = F.gelu(batch_norm_twin(conv_twin(x, block.conv1, padding=1), block.norm1))
                x = x + batch_norm_twin(conv_twin(y, block.conv2, padding=1), block.norm2)
            else:
                x = host_block_twin(block, x, num_heads[i - 2], num_clusters[i - 2])
        maps.append(x)
        if stage.downsample is not None:
            x = channel_norm_twin(x, stage.downsample.norm)
            x = conv_twin(x, stage.downsample.reduction, stride=2, padding=1)
    if not hasattr(model, 'final_norm'):
        return maps, None
    return maps, batch_norm_twin(x, model.final_norm).mean((2, 3))
