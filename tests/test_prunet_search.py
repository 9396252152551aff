"""The shared network of PRUNET's space: its candidates, what a trace says of them, its choices and their exact costs."""
from functools import cache

import numpy as np
import pytest
import timm
import torch

import timm_width
from timm_width.config import ArgumentError
from timm_width.cost import Macs, Params
from timm_width.laws import commutation_faults, cost_faults, random_widths
from timm_width.models.prunet_search import StochasticLayer
from timm_width.models.prunet_space import PrunetError, get_space, space_size, table1

REDUCED = {'width': 0.25, 'depth': 0.5}
FBNET = {'space': table1((2, 2, 3, 2, 5, 5), expansions=(3, 6)).to_dict(), 'width': 0.5}
SIZE = (3, 75, 64)

torch.set_num_threads(1)


@cache
def on_meta(key='reduced'):
    args = {'reduced': REDUCED, 'full': {}, 'table5': {'space': 'table5', 'width': 0.25}, 'fbnet': FBNET}[key]
    with torch.device('meta'):
        return timm.create_model('prunet_search', num_classes=10, **args).eval()


@cache
def real():
    torch.manual_seed(0)
    return timm.create_model('prunet_search', num_classes=10, **REDUCED).eval()


@cache
def traced():
    return timm_width.trace(real(), (3, 64, 64))


def random_choice(model, rng):
    """A candidate and a hidden width per layer, or none."""
    choice = {}
    for name, layer in model.stochastic_layers().items():
        candidate = str(rng.choice(list(layer.blocks)))
        widths = model.hidden_widths(name, candidate)
        choice[name] = (candidate, int(rng.choice(widths)) if widths else None)
        if layer.residual and rng.random() < 0.3:
            choice[name] = None
    return choice


def built(model, choice, **kwargs):
    return timm.create_model('prunet', num_classes=10, **model.chosen(choice), **kwargs).eval()


# -- the network ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('key', ['reduced', 'full', 'table5', 'fbnet'])
def test_it_offers_the_whole_space(key):
    """Layers, candidates and hidden widths multiply to the size of the space."""
    model, total = on_meta(key), 1
    for name, layer in model.stochastic_layers().items():
        total *= sum(len(model.hidden_widths(name, c)) or 1 for c in layer.blocks) + layer.residual
        assert list(layer.candidates) == list(layer.blocks)
    assert total == space_size(model.space)
    assert len(model.stochastic_layers()) == sum(s.depth for s in model.space.stages)


def test_candidates_are_the_papers():
    layers = on_meta('full').stochastic_layers()
    assert list(layers['blocks.0.0'].blocks) == ['k3', 'k5'] and list(layers['blocks.5.1'].blocks) == ['k3', 'k3_se', 'k5', 'k5_se']
    assert [layers[n].residual for n in ('blocks.0.0', 'blocks.1.0', 'blocks.4.0', 'blocks.4.1')] == [True, False, False, True]
    assert {b.hidden for b in layers['blocks.5.1'].blocks.values()} == {8 * 448}
    assert on_meta('full').hidden_widths('blocks.5.1', 'k5_se') == tuple(range(32, 3585, 32))
    assert list(on_meta('table5').stochastic_layers()['blocks.1.0'].blocks) == [
        'k3_relu', 'k5_relu', 'k3_silu', 'k5_silu', 'k7_silu']
    nine = on_meta('fbnet').stochastic_layers()['blocks.4.1'].blocks  # with the skip
    assert [(b.kernel, b.se, b.hidden) for b in nine.values()] == [(k, s, e * 144) for k in (3, 5) for s in (False, True) for e in (3, 6)]


def test_a_layer_is_the_weighted_sum_of_its_candidates():
    layer = real().stochastic_layers()['blocks.1.1']
    x = torch.randn(2, layer.blocks['k3'].c_in, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [c(x) for c in layer.candidates.values()]
        assert torch.allclose(layer(x), sum(each), atol=1e-5)
        layer.weights = torch.tensor([0., 0.25, 0.75, 0.])
        try:
            assert torch.allclose(layer(x), 0.25 * each[1] + 0.75 * each[2], atol=1e-5)
            layer.weights = layer.weights[:3]
            with pytest.raises(ValueError):  # as many weights as candidates
                layer(x)
        finally:
            layer.weights = None


def test_one_candidate_per_layer_is_the_prunet_that_is_chosen():
    """Others deleted and layers left out, weights load by their order and logits are equal: blocks, residuals and strides are alike."""
    torch.manual_seed(1)
    model = timm.create_model('prunet_search', num_classes=10, **REDUCED).eval()
    choice = random_choice(model, np.random.default_rng(3))
    choice = {n: c and (c[0], None) for n, c in choice.items()}  # at the largest hidden widths
    assert None in choice.values()
    prunet = built(model, choice)
    for name, layer in model.stochastic_layers().items():
        for candidate in list(layer.candidates):
            if choice[name] is None or candidate != choice[name][0]:
                del layer.candidates[candidate]
        if choice[name] is None:
            parent, _, leaf = name.rpartition('.')
            model.get_submodule(parent)._modules[leaf] = torch.nn.Identity()
    ours, theirs = prunet.state_dict(), model.state_dict()
    assert [t.shape for t in ours.values()] == [t.shape for t in theirs.values()]
    prunet.load_state_dict(dict(zip(ours, theirs.values())))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(prunet(x), model(x), atol=1e-6)
    assert model.chosen(choice) == on_meta().chosen(choice)  # what is gone can still be named
    assert model.input_sizes() == on_meta().input_sizes()


def test_it_trains():
    torch.manual_seed(0)
    model = timm.create_model('prunet_search', num_classes=3, **REDUCED)
    model(torch.randn(2, 3, 32, 32)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert isinstance(model.blocks[0][0], StochasticLayer) and model.feature_info[-1]['num_chs'] == model.space.stages[-1].filters


# -- what a trace says -----------------------------------------------------------------------------------------------------------


def test_every_candidates_hidden_width_is_a_group_of_its_own():
    space, model = traced(), real()
    hidden = {model.hidden_group(n, c): b for n, layer in model.stochastic_layers().items() for c, b in layer.blocks.items()}
    assert hidden.pop(None).type == 'conv'
    for group, block in hidden.items():
        assert space.searchable[group].size == block.hidden
        assert {t.split('.candidates.')[1].split('.')[0] for t, _ in space[group].axes} == {group.split('.')[4]}
    assert set(space.frozen) == {'classifier'}


def test_blocks_are_the_candidates_that_have_a_residual():
    """Leaving one out means that it gives its input, and costs nothing."""
    space, model = traced(), real()
    want = {f'{n}.candidates.{c}' for n, layer in model.stochastic_layers().items() for c, b in layer.blocks.items()
            if b.residual and b.type != 'conv'}
    assert {b.name for b in space.blocks} == want
    name = 'blocks.4.1.candidates.k5_se'
    costs = model.costs('blocks.4.1', 'k5_se', input_size=(3, 64, 64))
    assert (Macs(space)() - Macs(space)({}, [name]), Params(space)() - Params(space)({}, [name])) == costs


def test_laws():
    widths = random_widths(traced(), 1)
    assert not commutation_faults(real(), traced(), widths) and not cost_faults(real(), traced(), widths)


# -- choices and costs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('key', ['reduced', 'full', 'table5', 'fbnet'])
@pytest.mark.parametrize('seed', range(3))
def test_costs_of_choices_add_up_to_those_of_the_network(key, seed):
    """MACs and parameters, exactly, at an odd size too."""
    model = on_meta(key)
    choice = random_choice(model, np.random.default_rng(seed))
    with torch.device('meta'):
        space = timm_width.trace(built(model, choice), SIZE)
    parts = [model.fixed_costs(SIZE), *(model.costs(n, *(c or (None,)), input_size=SIZE) for n, c in choice.items())]
    assert tuple(map(sum, zip(*parts))) == (Macs(space)(), Params(space)())


def test_costs_of_a_candidate_are_those_of_the_traced_block_at_a_width():
    """At every hidden width, the table is Macs and Params of the shared network's own trace."""
    space, model, layer, candidate = traced(), real(), 'blocks.3.0', 'k3_se'
    group, macs, params = model.hidden_group(layer, candidate), Macs(space), Params(space)
    for hidden in model.hidden_widths(layer, candidate):
        less = model.costs(layer, candidate, input_size=(3, 64, 64))
        now = model.costs(layer, candidate, hidden, (3, 64, 64))
        assert (less[0] - now[0], less[1] - now[1]) == (macs() - macs({group: hidden}), params() - params({group: hidden}))


def test_without_a_classifier():
    with torch.device('meta'):
        model = timm.create_model('prunet_search', num_classes=0, **REDUCED)
        choice = random_choice(model, np.random.default_rng(0))
        space = timm_width.trace(timm.create_model('prunet', num_classes=0, **model.chosen(choice)), SIZE)
    parts = [model.fixed_costs(SIZE), *(model.costs(n, *(c or (None,)), input_size=SIZE) for n, c in choice.items())]
    assert tuple(map(sum, zip(*parts))) == (Macs(space)(), Params(space)())


def test_what_is_chosen_says_its_space():
    for key, said in (('full', {}), ('reduced', REDUCED), ('fbnet', FBNET), ('table5', {'space': 'table5', 'width': 0.25})):
        chosen = on_meta(key).chosen(random_choice(on_meta(key), np.random.default_rng(0)))
        assert {k: v for k, v in chosen.items() if k != 'layers'} == said
        assert get_space(said.get('space'), said.get('width', 1.), said.get('depth', 1.)) == on_meta(key).space


def test_the_base_is_a_choice():
    """GPUNet-1, with one layer of every stage left out."""
    model, bases = on_meta('full'), {1: None, 2: (96, 256), 3: (256, 384), 4: (192,), 5: (800, 1440, 1440, 1440), 6: (1152, 1792, 1792, 1792)}
    choice = {}
    for name in model.offers:
        stage, index = int(name.split('.')[1]) + 1, int(name.split('.')[2])
        widths = bases[stage]
        if stage == 1:
            choice[name] = None if index else ('k3', None)
        else:
            choice[name] = ('k3_se' if stage in (4, 6) else 'k3', widths[index]) if index < len(widths) else None
    want = [tuple(p.shape) for p in timm.create_model('gpunet_1', num_classes=10, device='meta').parameters()]
    assert [tuple(p.shape) for p in built(model, choice, device='meta').parameters()] == want


@pytest.mark.parametrize('change, said', [
    ({'blocks.1.0': None}, "'blocks.1.0' changes the size or the channels of its input: it cannot be left out"),
    ({'blocks.1.0': ('k7', None)}, "'blocks.1.0' has no candidate 'k7'; it has k3, k3_se, k5, k5_se"),
    ({'blocks.1.0': ('k3', 12)}, "'blocks.1.0': 'k3' has no hidden width 12; it has 8, 16, 24, ... up to 64"),
    ({'blocks.1.0': ('k3', 72)}, 'has no hidden width 72'), ({'blocks.0.0': ('k3', 8)}, 'is a plain convolution and has no hidden width, not 8'),
    ({'blocks.9.9': None}, "'blocks.9.9' is unknown, did you mean")])
def test_refused_choices(change, said):
    choice = random_choice(real(), np.random.default_rng(0))
    with pytest.raises(PrunetError) as caught:
        real().chosen({**choice, **change})
    assert said in str(caught.value)


def test_a_choice_names_every_layer():
    choice = random_choice(real(), np.random.default_rng(0))
    del choice['blocks.2.0']
    with pytest.raises(PrunetError, match="'blocks.2.0' is missing"):
        real().chosen(choice)


def test_refused_arguments():
    with pytest.raises(ArgumentError, match="unknown argument 'drop_path_rate'"):
        timm.create_model('prunet_search', drop_path_rate=0.2)
    with pytest.raises(PrunetError, match='unknown space'):
        timm.create_model('prunet_search', space='x')
