"""How each ATen operation moves channel ids.

A tensor's label has one entry per dimension: an int64 array of ids (the dimension carries channels), None (positions without
channels, or of size 1), or SAME (all positions hold the same value, as in a freshly expanded or filled tensor, which agrees with
any channels). A rule gets the ledger `t`, the output and the operation's arguments, unites, freezes or orders ids through the
ledger, and returns the label of the output (a list of labels for a list of outputs). Rules are looked up by the operation's
name without the in-place underscore. An operation without a rule freezes every group it touches.

Ledger methods that rules use: `label(tensor)`, `unite(a, b)`, `freeze(ids, reason)`, `order(ids)`, `site(...)`, and
`unit_rule(weight)` and `note_unit_rule(weight, unit)` for how a grouped convolution or norm was, and is, cut.
"""
import math
from typing import Callable

import numpy as np
import torch

__all__ = ['RULES', 'SAME', 'rule']

SAME = 'same'
FEW_GROUPS, LARGE_GROUP = 4, 16  # a grouped convolution with this few, this large groups keeps their number

RULES: dict[str, Callable] = {}


def rule(*names: str) -> Callable:
    """Registers a function as the rule of ATen operations."""
    def add(fn):
        for name in names:
            RULES[name] = fn
        return fn
    return add


def is_ids(entry) -> bool:
    return isinstance(entry, np.ndarray)


def tensors_in(args) -> list:
    out = []
    for a in args:
        if isinstance(a, torch.Tensor):
            out.append(a)
        elif isinstance(a, (list, tuple)):
            out += tensors_in(a)
    return out


def freeze_label(t, label, reason: str) -> None:
    for entry in label:
        if is_ids(entry):
            t.freeze(entry, reason)


def merge(t, entries: list, sizes: list, size: int, what: str):
    """Unites the entries that meet on one dimension of the given output size; returns the entry of the result."""
    ids = [e for e, s in zip(entries, sizes) if is_ids(e) and s == size]
    if size > 1:
        for e, s in zip(entries, sizes):
            if is_ids(e) and s == 1:
                t.freeze(e, f'{what} broadcasts one channel')
        if any(e is None and s == size for e, s in zip(entries, sizes)):
            for e in ids:
                t.freeze(e, f'{what} with an axis that carries no channels')
            return None
    for e in ids[1:]:
        t.unite(ids[0], e)
    if ids:
        return ids[0]
    return SAME if size > 1 and all(e == SAME or s == 1 for e, s in zip(entries, sizes)) else None


def elementwise(t, out, tensors, what='an element-wise operation') -> list:
    labels = [t.label(x) for x in tensors]
    result = []
    for d in range(-out.ndim, 0):
        here = [(lab[d], x.shape[d]) for lab, x in zip(labels, tensors) if x.ndim >= -d]
        result.append(merge(t, [e for e, _ in here], [s for _, s in here], out.shape[d], what))
    return result


def dims_of(dim, ndim: int) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(ndim))
    return [d % ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


# -- element-wise -------------------------------------------------------------------------------------------------------

ELEMENTWISE = (
    'add sub mul div rsub pow maximum minimum where addcmul addcdiv lerp fmod remainder floor_divide copy atan2 masked_fill '
    'eq ne lt le gt ge logical_and logical_or bitwise_and bitwise_or bitwise_not logical_not clamp clamp_min clamp_max '
    'relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softsign '
    'log_sigmoid threshold abs neg exp exp2 log log2 log1p expm1 sqrt rsqrt square reciprocal sin cos tan erf floor ceil '
    'round sign trunc nan_to_num clone detach alias contiguous to _to_copy lift_fresh type_as dropout feature_dropout '
    'alpha_dropout positive').split()


@rule(*ELEMENTWISE)
def _elementwise(t, out, *args, **kwargs):
    return elementwise(t, out, tensors_in(args))


@rule('prelu')
def _prelu(t, out, x, weight):
    label = list(t.label(x))
    if weight.numel() > 1:
        label[1] = merge(t, [label[1], t.label(weight)[0]], [x.shape[1], weight.numel()], x.shape[1], 'prelu')
    return label


@rule('zeros_like', 'ones_like', 'empty_like', 'full_like', 'zeros', 'ones', 'full', 'empty',
      'new_zeros', 'new_ones', 'new_full', 'new_empty', 'bernoulli', 'zero', 'fill')
def _constant(t, out, *args, **kwargs):
    return [SAME if s > 1 else None for s in out.shape]


@rule('softmax', '_softmax', 'log_softmax', '_log_softmax')
def _softmax(t, out, x, *args, **kwargs):
    return t.label(x)


@rule('cumsum', 'cumprod', 'flip', 'roll', 'logcumsumexp')
def _ordered_along(t, out, x, *args, **kwargs):
    freeze_label(t, t.label(x), 'an operation that depends on the order of its channels')
    return [None] * out.ndim


# -- products -------------------------------------------------------------------------------------------------------------


def _factors(entries, sizes) -> tuple[int, list]:
    """Splits dimensions into a fixed count and the id arrays whose lengths multiply it."""
    return math.prod(s for e, s in zip(entries, sizes) if not is_ids(e)), [e for e in entries if is_ids(e)]


def _positions(out, label) -> tuple[int, ...]:
    """Sizes between the first and the last dimension that carry no channels."""
    return tuple(s for e, s in zip(label[1:], out.shape[1:-1]) if not is_ids(e))


@rule('conv1d', 'conv2d', 'conv3d', 'convolution')
def _conv(t, out, x, weight, bias=None, stride=1, padding=0, dilation=1, *rest, **kwargs):
    if len(rest) >= 2:  # aten.convolution: transposed, output_padding, groups
        transposed, groups = bool(rest[0]), int(rest[-1])
    else:
        transposed, groups = False, int(rest[0]) if rest else int(kwargs.get('groups', 1))
    return conv(t, out, x, weight, bias, stride, groups, transposed)


@rule('conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d')
def _conv_transpose(t, out, x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    return conv(t, out, x, weight, bias, stride, int(groups), True)


def conv(t, out, x, weight, bias, stride, groups: int, transposed: bool):
    lx, lw = t.label(x), t.label(weight)
    if x.ndim != out.ndim or weight.ndim != out.ndim:
        freeze_label(t, lx, 'an unbatched convolution')
        return [None] * out.ndim
    for e in lw[2:]:
        if is_ids(e):
            t.freeze(e, 'a kernel axis')
    wout, win = (lw[1], lw[0]) if transposed else (lw[0], lw[1])
    cin, cout = x.shape[1], out.shape[1]
    if groups == 1 and not t.unit_rule(weight):  # (a unit may be all that an earlier resize left of a grouped one)
        merge(t, [lx[1], win], [cin, cin], cin, 'a convolution')
        label = wout if is_ids(wout) else None
    else:
        label = grouped_conv(t, lx[1], win, wout, cin, cout, groups, transposed, weight)
    if bias is not None:
        label = merge(t, [label, t.label(bias)[0]], [cout, cout], cout, 'a convolution bias')
    place = []
    for d in range(2, out.ndim):
        e = lx[d]
        if is_ids(e):
            k, s = weight.shape[d], stride if isinstance(stride, int) else stride[min(d - 2, len(stride) - 1)]
            if out.shape[d] == x.shape[d] and s == 1:
                if k > 1:
                    t.order(e)
            else:
                t.freeze(e, 'a convolution that changes the number of positions')
                e = None
        place.append(e)
    over = x if transposed else out
    fixed, free = _factors([lx[0], *place], [out.shape[0], *over.shape[2:]])
    fixed *= math.prod(weight.shape[2:])
    expanded = not transposed and not is_ids(lw[0])  # one filter for all channels
    fixed2, free2 = _factors([label if expanded else lw[0], lw[1]], weight.shape[:2])
    size, before = ([s for e, s in zip(place, y.shape[2:]) if not is_ids(e)] for y in (out, x))
    t.site('conv', fixed * fixed2, free + free2, size, lx[1], label, weight, before)
    return [lx[0], label, *place]


def grouped_conv(t, ein, win, wout, cin, cout, groups, transposed, weight):
    """Ids of a grouped convolution's output; see DESIGN 2 on conv-groups as units."""
    i, o = cin // groups, cout // groups
    label = wout if is_ids(wout) and len(wout) == cout else None
    if not is_ids(ein) or (label is None and (is_ids(wout) or wout != SAME)):
        for e in (ein, wout, win):
            if is_ids(e):
                t.freeze(e, 'a grouped convolution over an axis that carries no channels')
        return label
    unit = t.unit_rule(weight)
    if unit is None:
        unit = not (groups <= FEW_GROUPS and i >= LARGE_GROUP)
    if transposed or label is None and i > 1:
        for e in (ein, win, label):
            if is_ids(e):
                t.freeze(e, 'a grouped convolution of a kind that cannot be cut')
        return label
    rows_in = ein.reshape(groups, i)
    if label is None:  # a depthwise convolution with one expanded filter (BlurPool)
        return ein if o == 1 else np.repeat(ein, o)
    rows_out = label.reshape(groups, o)
    if unit:  # one conv-group is one unit; the second weight dimension stays whole
        if is_ids(win):
            t.freeze(win, 'channels inside one conv-group')
        t.unite(rows_in[:, :1].repeat(i, 1), rows_in)
        t.unite(rows_in[:, :1].repeat(o, 1), rows_out)
    else:  # the number of conv-groups stays; they shrink position by position
        t.unite(rows_in[:1].repeat(groups, 0), rows_in)
        t.unite(rows_out[:1].repeat(groups, 0), rows_out)
        if is_ids(win):
            t.unite(rows_in[0], win)
        else:
            t.freeze(ein, 'a grouped convolution with fixed inputs')
    t.note_unit_rule(weight, unit)
    return label


@rule('linear')
def _linear(t, out, x, weight, bias=None):
    lx, lw = t.label(x), t.label(weight)
    merge(t, [lx[-1], lw[1]], [x.shape[-1]] * 2, x.shape[-1], 'a linear layer')
    label = lw[0] if is_ids(lw[0]) else None
    if bias is not None:
        label = merge(t, [label, t.label(bias)[0]], [out.shape[-1]] * 2, out.shape[-1], 'a linear bias')
    fixed, free = _factors([*lx[:-1], lw[0], lw[1]], [*x.shape[:-1], *weight.shape])
    t.site('linear', fixed, free, _positions(x, lx), lx[-1], label, weight)
    return [*lx[:-1], label]


@rule('addmm')
def _addmm(t, out, bias, a, b, **kwargs):
    label = _matmul(t, out, a, b)
    label[-1] = merge(t, [label[-1], t.label(bias)[-1]], [out.shape[-1], bias.shape[-1]], out.shape[-1], 'addmm')
    return label


@rule('matmul', 'mm', 'bmm')
def _matmul(t, out, a, b):
    la, lb = t.label(a), t.label(b)
    if a.ndim < 2 or b.ndim < 2:
        freeze_label(t, la, 'a product with a vector')
        freeze_label(t, lb, 'a product with a vector')
        return [None] * out.ndim
    inner = merge(t, [la[-1], lb[-2]], [a.shape[-1]] * 2, a.shape[-1], 'a matrix product')
    batch = []
    for d in range(-out.ndim, -2):
        here = [(lab[d], x.shape[d]) for lab, x in ((la, a), (lb, b)) if x.ndim >= -d]
        batch.append(merge(t, [e for e, _ in here], [s for _, s in here], out.shape[d], 'a batched product'))
    fixed, free = _factors([*batch, la[-2], inner, lb[-1]], [*out.shape[:-2], a.shape[-2], a.shape[-1], b.shape[-1]])
    t.site('matmul', fixed, free, _positions(out, [*batch, la[-2]]), inner, lb[-1], None)
    return [*batch, la[-2], lb[-1]]


@rule('baddbmm')
def _baddbmm(t, out, bias, a, b, **kwargs):
    label = _matmul(t, out, a, b)
    lbias = t.label(bias)
    return [merge(t, [e, lbias[d - out.ndim]], [s, bias.shape[d - out.ndim]], s, 'baddbmm')
            for d, (e, s) in enumerate(zip(label, out.shape))]


@rule('scaled_dot_product_attention')
def _sdpa(t, out, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
    lq, lk, lv = t.label(q), t.label(k), t.label(v)
    inner = merge(t, [lq[-1], lk[-1]], [q.shape[-1]] * 2, q.shape[-1], 'attention')
    keys = merge(t, [lk[-2], lv[-2]], [k.shape[-2]] * 2, k.shape[-2], 'attention')
    batch = []
    for d in range(-out.ndim, -2):
        here = [(lab[d], x.shape[d]) for lab, x in ((lq, q), (lk, k), (lv, v)) if x.ndim >= -d]
        batch.append(merge(t, [e for e, _ in here], [s for _, s in here], out.shape[d], 'attention'))
    if attn_mask is not None:
        label, shape = [*batch, lq[-2], keys], [*out.shape[:-2], q.shape[-2], k.shape[-2]]
        lm = t.label(attn_mask)
        for d in range(-attn_mask.ndim, 0):
            merge(t, [label[d], lm[d]], [shape[d], attn_mask.shape[d]], shape[d], 'an attention mask')
    for last, e in ((inner, q), (lv[-1], v)):
        fixed, free = _factors([*batch, lq[-2], keys, last], [*out.shape[:-2], q.shape[-2], k.shape[-2], e.shape[-1]])
        t.site('matmul', fixed, free, _positions(out, [*batch, lq[-2]]), inner, lv[-1], None)
    return [*batch, lq[-2], lv[-1]]


# -- normalisation and reduction ------------------------------------------------------------------------------------------


def _norm(t, label, dims, shape, vectors, what):
    label = list(label)
    for v in vectors:
        if v is not None:
            lv = t.label(v)
            for d, e, s in zip(dims, lv, v.shape):
                label[d] = merge(t, [label[d], e], [shape[d], s], shape[d], what)
    return label


@rule('batch_norm', 'instance_norm')
def _batch_norm(t, out, x, weight=None, bias=None, mean=None, var=None, *args, **kwargs):
    return _norm(t, t.label(x), [1], out.shape, (weight, bias, mean, var), 'batch norm')


@rule('layer_norm', 'rms_norm')
def _layer_norm(t, out, x, shape, weight=None, bias=None, *args, **kwargs):
    if isinstance(bias, float):
        bias = None
    return _norm(t, t.label(x), range(-len(shape), 0), out.shape, (weight, bias), 'layer norm')


@rule('group_norm')
def _group_norm(t, out, x, groups, weight=None, bias=None, *args, **kwargs):
    label = _norm(t, t.label(x), [1], out.shape, (weight, bias), 'group norm')
    if is_ids(label[1]) and (groups > 1 or t.unit_rule(weight)):  # one norm-group is one unit, as for convolutions
        rows = label[1].reshape(groups, -1)
        t.unite(rows[:, :1].repeat(rows.shape[1], 1), rows)
        t.note_unit_rule(weight, True)
    return label


@rule('mean', 'sum', 'amax', 'amin', 'var', 'std', 'prod', 'logsumexp', 'any', 'all')
def _reduce(t, out, x, dim=None, *args, **kwargs):
    dims = dims_of(None if isinstance(dim, bool) else dim, x.ndim)
    if out.ndim == x.ndim:
        return [None if d in dims else e for d, e in enumerate(t.label(x))]
    return [e for d, e in enumerate(t.label(x)) if d not in dims]


@rule('linalg_vector_norm', 'norm')
def _vector_norm(t, out, x, order=2, dim=None, *args, **kwargs):
    return _reduce(t, out, x, dim)


@rule('max_pool1d', 'max_pool2d', 'max_pool3d', 'avg_pool1d', 'avg_pool2d', 'avg_pool3d', 'adaptive_avg_pool1d',
      'adaptive_avg_pool2d', 'adaptive_max_pool2d', '_adaptive_avg_pool2d', 'lp_pool2d', 'upsample_nearest1d', 'upsample_nearest2d',
      'upsample_bilinear2d', 'upsample_bicubic2d', '_upsample_nearest_exact2d', 'upsample_linear1d', '_upsample_bilinear2d_aa')
def _pool(t, out, x, *args, **kwargs):
    out, several = (out[0], len(out)) if isinstance(out, (list, tuple)) else (out, 0)
    label = list(t.label(x))
    for d in range(x.ndim):
        if is_ids(label[d]) and (d > 1 or out.shape[d] != x.shape[d]):
            t.freeze(label[d], 'pooling or resampling along the channels')
            label[d] = None
    return [label] * several if several else label


# -- rearrangement ------------------------------------------------------------------------------------------------------


def factor_groups(a, b) -> list[tuple[list[int], list[int]]]:
    """Pairs the dimensions of two shapes of equal size into the smallest runs of equal product."""
    runs, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        ia, jb = [], []
        pa = pb = 1
        if i < len(a):
            ia, pa, i = [i], a[i], i + 1
        if j < len(b):
            jb, pb, j = [j], b[j], j + 1
        while pa != pb:
            if pa < pb:
                ia.append(i)
                pa, i = pa * a[i], i + 1
            else:
                jb.append(j)
                pb, j = pb * b[j], j + 1
        runs.append((ia, jb))
    return runs


def flatten_entries(t, entries, sizes):
    """Entry of several dimensions merged into one."""
    found = [k for k, e in enumerate(entries) if is_ids(e)]
    if not found:
        return SAME if entries and all(e == SAME for e in entries) else None
    if len(found) > 1:
        for k in found:
            t.freeze(entries[k], 'two channel axes merged into one')
        return None
    k = found[0]
    return np.tile(np.repeat(entries[k], math.prod(sizes[k + 1:])), math.prod(sizes[:k]))


def split_entry(t, ids, sizes, free=None) -> list:
    """Entries of one dimension split into several: the free one (the last by default) shrinks, position by position."""
    if not is_ids(ids):
        return [ids if s > 1 or ids is None else None for s in sizes]
    grid = ids.reshape(sizes)
    for d in range(len(sizes)):  # ids that vary along one dimension only need no union
        line = np.moveaxis(grid, d, 0).reshape(sizes[d], -1)
        if (line == line[:, :1]).all():
            return [np.ascontiguousarray(line[:, 0]) if k == d else None for k in range(len(sizes))]
    d = len(sizes) - 1 if free is None else free
    line = np.moveaxis(grid, d, 0).reshape(sizes[d], -1)
    t.unite(line[:, :1].repeat(line.shape[1], 1), line)
    return [np.ascontiguousarray(line[:, 0]) if k == d else None for k in range(len(sizes))]


@rule('view', 'reshape', '_unsafe_view', '_reshape_alias', 'flatten', 'unflatten', 'reshape_as', 'view_as', 'squeeze', 'unsqueeze')
def _reshape(t, out, x, *args, **kwargs):
    a, b, lx = list(x.shape), list(out.shape), t.label(x)
    wanted = args[0] if args and isinstance(args[0], (list, tuple)) and len(args[0]) == len(b) else ()
    label = [None] * len(b)
    ia, jb = [d for d, s in enumerate(a) if s != 1], [d for d, s in enumerate(b) if s != 1]
    for run_a, run_b in factor_groups([a[d] for d in ia], [b[d] for d in jb]):
        da, db = [ia[d] for d in run_a], [jb[d] for d in run_b]
        if len(da) == 1 and len(db) == 1:
            label[db[0]] = lx[da[0]]
            continue
        flat = flatten_entries(t, [lx[d] for d in da], [a[d] for d in da]) if len(da) > 1 else lx[da[0]]
        free = next((k for k, d in enumerate(db) if wanted and wanted[d] == -1), None)
        for d, e in zip(db, split_entry(t, flat, [b[d] for d in db], free)):
            label[d] = e
    ones = [lx[d] for d, s in enumerate(a) if s == 1 and is_ids(lx[d])]
    if ones:  # a single labelled channel: keep it where the dimensions match, else give up on it
        for d, s in enumerate(a):
            if s == 1 and is_ids(lx[d]):
                if len(b) == len(a) and b[d] == 1:
                    label[d] = lx[d]
                else:
                    t.freeze(lx[d], 'a reshape of one channel')
    return label


@rule('permute')
def _permute(t, out, x, dims):
    label = t.label(x)
    return [label[d] for d in dims]


@rule('transpose', 'swapaxes', 'swapdims', 'transpose_copy')
def _transpose(t, out, x, a, b):
    label = list(t.label(x))
    label[a], label[b] = label[b], label[a]
    return label


@rule('t', 'numpy_T')
def _t(t, out, x):
    return list(t.label(x))[::-1]


@rule('movedim')
def _movedim(t, out, x, source, destination):
    src, dst = dims_of(source, x.ndim), dims_of(destination, x.ndim)
    rest = iter([d for d in range(x.ndim) if d not in src])
    order = [src[dst.index(d)] if d in dst else next(rest) for d in range(x.ndim)]
    label = t.label(x)
    return [label[d] for d in order]


@rule('expand', 'expand_as', 'broadcast_to')
def _expand(t, out, x, *args, **kwargs):
    label, shift = t.label(x), out.ndim - x.ndim
    result = [SAME if s > 1 else None for s in out.shape]
    for d, (e, s) in enumerate(zip(label, x.shape)):
        if s == out.shape[d + shift]:
            result[d + shift] = e
        elif is_ids(e):
            t.freeze(e, 'an expansion of one channel')
    return result


@rule('repeat')
def _repeat(t, out, x, repeats):
    label, shift = t.label(x), out.ndim - x.ndim
    result = [SAME if s > 1 else None for s in out.shape]
    for d, (e, s) in enumerate(zip(label, x.shape)):
        if s > 1:
            result[d + shift] = np.tile(e, repeats[d + shift]) if is_ids(e) else e
        elif is_ids(e):
            t.freeze(e, 'a repetition of one channel')
    return result


@rule('repeat_interleave')
def _repeat_interleave(t, out, x, repeats, dim=None, **kwargs):
    label = list(t.label(x))
    if not isinstance(repeats, int) or dim is None:
        freeze_label(t, label, 'a repetition')
        return [None] * out.ndim
    if is_ids(label[dim]):
        label[dim] = np.repeat(label[dim], repeats)
    return label


@rule('cat', 'concat')
def _cat(t, out, tensors, dim=0):
    tensors = [x for x in tensors if x.numel() or x.ndim == out.ndim]
    dim %= out.ndim
    labels = [t.label(x) for x in tensors]
    result = []
    for d in range(out.ndim):
        here = [lab[d] for lab in labels]
        if d != dim:
            result.append(merge(t, here, [x.shape[d] for x in tensors], out.shape[d], 'a concatenation'))
        elif any(is_ids(e) for e in here):
            result.append(np.concatenate([
                e if is_ids(e) else t.fixed(x.shape[d], 'concatenated with an axis that carries no channels')
                for e, x in zip(here, tensors)]))
        else:
            result.append(None)
    return result


@rule('stack')
def _stack(t, out, tensors, dim=0):
    dim %= out.ndim
    label = elementwise(t, tensors[0], tensors, 'a stack')
    return [*label[:dim], None, *label[dim:]]


@rule('split_with_sizes', 'tensor_split')
def _cut(t, out, x, sizes, dim=0, **kwargs):
    """Parts with sizes of their own are cuts, even where the sizes happen to be equal."""
    label, dim = list(t.label(x)), dim % x.ndim
    if not is_ids(label[dim]):
        return [label] * len(out)
    parts = np.split(label[dim], np.cumsum([o.shape[dim] for o in out])[:-1])
    return [[*label[:dim], p, *label[dim + 1:]] for p in parts]


@rule('chunk', 'split', 'unsafe_chunk', 'unsafe_split')
def _split(t, out, x, sizes, dim=0, **kwargs):
    """Equal parts shrink together, position by position; where the last one is short, they are cuts."""
    result = _cut(t, out, x, sizes, dim)
    parts = [label[dim % x.ndim] for label in result]
    if is_ids(parts[0]) and len({len(p) for p in parts}) == 1:
        for p in parts[1:]:
            t.unite(parts[0], p)
    return result


@rule('unbind')
def _unbind(t, out, x, dim=0):
    label, dim = list(t.label(x)), dim % x.ndim
    if is_ids(label[dim]):
        t.freeze(label[dim], 'channels taken apart one by one')
    return [label[:dim] + label[dim + 1:]] * len(out)


@rule('select')
def _select(t, out, x, dim, index):
    label, dim = list(t.label(x)), dim % x.ndim
    if is_ids(label[dim]):
        t.freeze(label[dim], 'one channel taken out')
    return label[:dim] + label[dim + 1:]


@rule('slice', 'narrow')
def _slice(t, out, x, dim=0, start=None, end=None, step=1):
    label, dim = list(t.label(x)), dim % x.ndim
    e = label[dim]
    if is_ids(e):
        n, begin = x.shape[dim], start or 0
        begin = min(max(begin + n if begin < 0 else begin, 0), n)
        if step != 1:
            t.freeze(e, 'channels taken with a stride')
        label[dim] = e[begin:begin + out.shape[dim] * step:step]
    return label


@rule('index')
def _index(t, out, x, indices):
    label, at = list(t.label(x)), [d for d, i in enumerate(indices) if i is not None]
    for d in at:
        if is_ids(label[d]):
            t.freeze(label[d], 'channels picked by index')
    if len(at) != at[-1] - at[0] + 1 or any(indices[d].dtype == torch.bool for d in at):
        freeze_label(t, label, 'an index over several axes')
        return [None] * out.ndim
    new = [None] * (out.ndim - (x.ndim - len(at)))
    return label[:at[0]] + new + label[at[-1] + 1:]


@rule('index_select', 'gather', 'take_along_dim')
def _gather(t, out, x, dim, index, **kwargs):
    label, dim = list(t.label(x)), dim % x.ndim
    if is_ids(label[dim]):
        t.freeze(label[dim], 'channels picked by index')
    label[dim] = None
    return label if out.ndim == x.ndim else [None] * out.ndim


@rule('pad', 'constant_pad_nd', 'reflection_pad2d', 'replication_pad2d')
def _pad(t, out, x, *args, **kwargs):
    label, amounts = list(t.label(x)), args[0] if args else kwargs.get('pad', kwargs.get('padding', ()))
    for d in range(x.ndim):
        at = 2 * (x.ndim - 1 - d)  # amounts begin with the last dimension; the total may be zero for a shift
        if is_ids(label[d]) and any(amounts[at:at + 2]):
            t.freeze(label[d], 'padding along the channels')
            label[d] = None
    return label


@rule('unfold')
def _unfold(t, out, x, dim, size, step):
    label, dim = list(t.label(x)), dim % x.ndim
    if is_ids(label[dim]):
        t.freeze(label[dim], 'a sliding window over the channels')
        label[dim] = None
    return [*label, None]


@rule('im2col')
def _im2col(t, out, x, kernel_size, *args, **kwargs):
    e = t.label(x)[1]
    return [None, np.repeat(e, math.prod(kernel_size)) if is_ids(e) else None, None]
