"""What train makes of a final model: a folder, a repository on the Hub, its latency."""
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf
from torch import nn

from .config import SUFFIX, is_ours, save
from .data import UsageError
from .hub import hub_errors, push_to_hub, show
from .latency.measure import TORCH, measure_many
from .report import METRICS
from .start import provenance_of, weights_of

__all__ = ['publish']

CARD = """---
tags:
- image-classification
- timm
library_name: timm
---
# {name}

{what}

```python
import timm{plugin}

model = timm.create_model('{source}', pretrained=True)
```
{results}"""


def publish(model: nn.Module, args: Namespace, config: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Does what --latency-backend, --save-pretrained and --push-to-hub ask for.

    Args:
        model: The final model.
        args: The flags.
        config: timm's data config that it was trained with.
        results: What each epoch gave.
    """
    if not args.latency_backend and not args.save_pretrained and not args.push_to_hub:
        return
    searched = is_ours(_architecture(model))
    found = _provenance(args, results) if searched else {}
    if args.save_pretrained:
        folder = Path(args.save_pretrained)
        try:
            if searched:
                save(model, folder, found, data_config=config)
            else:
                save_for_hf(model, folder, safe_serialization=True, data_config=dict(config))
            (folder / 'README.md').write_text(_card(model, f'local-dir:{folder}', results), encoding='utf-8')
        except OSError as e:
            raise UsageError(f"--save-pretrained '{folder}': {e.strerror or e}; the weights are in the run's last.pth.tar") from e
        print(f"saved: {'import timm_width; ' * searched}timm.create_model('local-dir:{folder}', pretrained=True)", flush=True)
    if args.push_to_hub:
        if searched:
            show(push_to_hub(model, args.push_to_hub, provenance=found, data_config=config))
        else:
            with hub_errors(args.push_to_hub):
                push_to_hf_hub(model, args.push_to_hub, safe_serialization=True, data_config=dict(config), model_card={
                    'description': _what(model), 'tags': ['image-classification', 'timm']})
            print(f"pushed: timm.create_model('hf-hub:{args.push_to_hub}', pretrained=True)", flush=True)
    if args.latency_backend:
        _time(model.float(), args, config)  # last: what fails here costs nothing


def _provenance(args: Namespace, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the widths were found, and what this training has made of them: accuracies of other weights are no longer said."""
    found = dict(provenance_of(args))
    if not args.model.startswith('local-dir:') or not args.pretrained:  # else these weights began where the folder's did
        found.pop('inherited', None)
        found |= weights_of(args)
    if not results:
        return found
    for key in ('train', *METRICS):
        found.pop(key, None)
    if isinstance(found.get('baseline'), dict):
        found['baseline'] = {name: {k: v for k, v in row.items() if k.partition('_')[0] not in METRICS}
                             for name, row in found['baseline'].items() if isinstance(row, dict)}
    metrics = results[-1].get('validation', {})
    found |= {'train': {'epochs': results[-1]['epoch'] + 1}, 'data': args.dataset or Path(args.data_dir or '').resolve().name}
    return found | {key: round(metrics[key], 2) for key in METRICS if key in metrics}


def _architecture(model: nn.Module) -> str:
    return model.pretrained_cfg.get('architecture') or type(model).__name__


def _what(model: nn.Module) -> str:
    name, count = _architecture(model), sum(p.numel() for p in model.parameters()) / 1e6
    if not name.endswith(SUFFIX):
        return f'{name}, {count:.2f} M parameters.'
    return f'{name.removesuffix(SUFFIX)} with searched widths (timm_width): {count:.2f} M parameters.'


def _card(model: nn.Module, source: str, results: Sequence[Mapping[str, Any]]) -> str:
    metrics = results[-1].get('validation', {}) if results else {}
    told = ''.join(f'\n- {k}: {v:.4f}' for k, v in metrics.items())
    return CARD.format(
        name=_architecture(model), what=_what(model), plugin=', timm_width' * _architecture(model).endswith(SUFFIX), source=source,
        results=f'\nAfter epoch {results[-1]["epoch"]}, on the validation images:\n{told}\n' if told else '')


def _time(model: nn.Module, args: Namespace, config: Mapping[str, Any]) -> None:
    """Prints milliseconds per image of the model and of its base."""
    name = _architecture(model)
    networks = {name: model}
    if name.endswith(SUFFIX):
        networks[name.removesuffix(SUFFIX)] = timm.create_model(
            name.removesuffix(SUFFIX), num_classes=model.num_classes, in_chans=model.in_chans)
    ours = args.latency_backend in TORCH
    found = measure_many(networks, config['input_size'], args.latency_backend, args.latency_precision, args.latency_batch,
                         args.device if ours else None)
    base = list(found.values())[-1]
    print(f"\nlatency ({args.latency_backend}, {base.precision}, batch {base.batch}, {base.backend['device']}):")
    for network, one in found.items():
        unsteady = '  disturbed by other load, however often measured' * one.disturbed
        print(f'  {network:<40}{one.ms:8.3f} ms ±{one.spread:.0%} per image {one.ms / base.ms:6.1%}{unsteady}', flush=True)
    if 'cuda' in args.device:
        torch.cuda.empty_cache()
