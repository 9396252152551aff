"""The convolutions of a re-parameterisable model in its deployed form, on the channel ids of its training form.

The fused copy is run like the original; modules that exist in both put out the same channels, which carries the ids over.
"""
import logging
from typing import Callable, Optional

import numpy as np
import torch
from timm.utils import reparameterize_model
from torch import nn

from .bindings import FUSE
from .ledger import Ledger, meta_copy, run
from .rules import is_ids

__all__ = ['deployed_sites']

_logger = logging.getLogger(__name__)


def deployed_sites(meta: nn.Module, size: tuple[int, ...], ledger: Ledger, components: Callable) -> Optional[list[tuple]]:
    """Sites of the fused model, in the ledger's form and ids.

    Args:
        meta: The model in its training form, on the meta device.
        size: Image size.
        ledger: The ledger of its run.
        components: Solves a ledger's unions: ledger -> component of every id.

    Returns:
        The sites; None for a model that does not change when deployed, or whose fused form cannot be followed.
    """
    if not any(hasattr(m, method) for m in meta.modules() for method in FUSE):
        return None
    try:
        with torch.device('meta'):  # fusions make new layers on the default device
            fused = reparameterize_model(meta_copy(meta), inplace=True).eval()
        other = run(fused, size)
    except Exception as e:  # a fusion of the model's own that does not work
        _logger.warning('%s cannot be re-parameterized: %s', type(meta).__name__, e)
        return None
    root = components(other)
    to_base = np.full(int(root.max()) + 1, -1)

    def carry(label, shape, base_label, base_shape) -> None:
        if shape == base_shape:
            for e, b in zip(label, base_label, strict=True):
                if is_ids(e) and is_ids(b):
                    to_base[root[e]] = b

    for name, tensor in other.tensors.items():
        if name in ledger.tensors:
            base = ledger.tensors[name]
            carry(other.label(tensor), tensor.shape, ledger.label(base), base.shape)
    for name, outputs in other.outputs.items():
        for (label, shape), (base_label, base_shape) in zip(outputs, ledger.outputs.get(name, ()), strict=False):
            carry(label, shape, base_label, base_shape)
    frozen = np.zeros(len(to_base), bool)
    for ids, _ in other.frozen:
        frozen[root[ids]] = True
    out = []
    for owner, kind, positions, factors, where, _, _, before in other.sites:
        free = []
        for e in factors:
            base = to_base[root[e]]
            if (base >= 0).all():
                free.append(base)
            elif frozen[root[e]].all():
                positions *= len(e)
            else:
                _logger.warning('%s: the channels of %s cannot be followed into the deployed form', type(meta).__name__, owner)
                return None
        out.append((owner, kind, positions, free, where, None, None, before))
    return out
