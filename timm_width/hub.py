"""timm-width push FOLDER REPO: puts a saved model on the Hugging Face Hub, with its card.

    timm-width push runs/cafenet someone/mobilenetv2_100_width.cafenet_e_150m
    timm-width push runs/two_budgets someone/resnet18_width.flowers --collection 'ResNet-18 for flowers'

FOLDER is that of a search or of `train --save-pretrained`: config.json and model.safetensors go up as they are, in one commit with
a card and, where matplotlib is installed, a picture of the widths; pushing again replaces all of them. With --collection, each of
the budgets of a search becomes a repository of its own, REPO-macs-0.5x and so on, and all go into one collection. The token is that
of HF_TOKEN or of `hf auth login`.
"""
import io
import math
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import __version__
from .arguments import Parser
from .card import render_card
from .config import SUFFIX, load_spec, networks_in, read_config, save
from .data import UsageError, first_line
from .engine import create
from .plots import plot_ratios
from .report import METRICS
from .show import Network, describe, printable, size_of

__all__ = ['Pushed', 'hub_errors', 'main', 'push_to_hub', 'show']

WEIGHTS, PICTURE = 'model.safetensors', 'widths.png'
PICKLES = ('pytorch_model.bin', 'pytorch_model.pth', 'model.pth')  # what timm would read beside WEIGHTS
TASK = 'image-classification'
# licences of timm's weights that the Hub has a name for; others are `other` with a name of their own
KNOWN = ('apache-2.0', 'mit', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'gemma', 'apple-ascl', 'apple-amlr', 'unknown')
NON_COMMERCIAL = re.compile(r'(^|-)nc(-|$)|non-?commercial|research|apple-amlr|seer-license')
ROW = ('network', 'budget', 'macs', 'params', 'latency_ms', 'latency_spread', 'predicted_ms')


@dataclass(frozen=True)
class Pushed:
    """What a push has made.

    Attributes:
        repo: OWNER/NAME.
        url: Of the commit, or of the pull request.
        revision: Where it is, if not on the main branch.
        notes: What whoever pushed should know.
        collection: URL of the collection that it is in.
    """
    repo: str
    url: str
    revision: Optional[str] = None
    notes: tuple[str, ...] = ()
    collection: Optional[str] = None

    @property
    def source(self) -> str:
        """What timm.create_model loads it by."""
        return f'hf-hub:{self.repo}' + (f'@{self.revision}' if self.revision else '')


def push_to_hub(
        model: Union[nn.Module, str, 'PathLike[str]'],
        repo: str,
        private: bool = False,
        revision: Optional[str] = None,
        create_pr: bool = False,
        token: Optional[str] = None,
        license: Optional[str] = None,
        collection: Optional[str] = None,
        provenance: Optional[Mapping[str, Any]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
) -> Pushed:
    """Puts a width model on the Hub: its config, its weights (safetensors only), its card.

    Args:
        model: A `_width` model, or the folder of a saved one.
        repo: OWNER/NAME; NAME alone is one of your own. Made if missing.
        private: Make it a private one.
        revision: Branch to push to, made if missing; by default the main one.
        create_pr: Open a pull request instead.
        token: By default that of HF_TOKEN, or of `hf auth login`.
        license: By default that of the published weights that these began with.
        collection: Title of a collection of the same owner to put it in.
        provenance: How a model (not a folder) was found, as `timm_width.save` takes it.
        data_config: The data config of a model (not a folder), as `timm_width.save` takes it.

    Raises:
        UsageError: The folder holds no such model, or the Hub refuses: in one line.
        ConfigError: The config cannot be read, or the model cannot be saved.
    """
    if isinstance(model, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder, provenance, data_config=data_config)
            return push_to_hub(folder, repo, private, revision, create_pr, token, license, collection)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if create_pr and revision:
        raise UsageError('a pull request is opened against the main branch: give either a revision or create_pr')
    folder = Path(model)
    config, network = _check(folder)
    metadata, notes, hints = _licence(config, license)
    picture = _picture(network)
    if picture is None:
        hints.append("without a picture of the widths, for which there must be matplotlib: pip install 'timm-width[plot]'")
    api = HfApi(token=token, library_name='timm_width', library_version=__version__)
    with hub_errors(repo):
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        info = api.model_info(repo)
        if private and not info.private:
            raise UsageError(f"'{repo}' is there already, and public: make it private in its settings, or push to another one")
        if revision and not api.revision_exists(repo, revision):
            api.create_branch(repo, branch=revision)
        there = {s.rfilename for s in (api.model_info(repo, revision=revision) if revision else info).siblings or ()}
        card = _card(config, network, repo, metadata, notes, picture is not None)
        files = {'README.md': card.encode(), 'config.json': folder / 'config.json', WEIGHTS: folder / WEIGHTS}
        files |= {PICTURE: picture} if picture is not None else {}
        done = api.create_commit(
            repo, [*(CommitOperationAdd(name, file) for name, file in files.items()),
                   *(CommitOperationDelete(name) for name in PICKLES if name in there)],  # of other weights, now
            commit_message=f"Push {config['architecture']} with timm_width {__version__}", revision=revision, create_pr=create_pr)
        made = None
        if collection:
            made = api.create_collection(collection, namespace=repo.partition('/')[0], private=private, exists_ok=True)
            budget = printable(config.get('timm_width', {}).get('budget', ''), 100)
            api.add_collection_item(made.slug, repo, 'model', note=budget or None, exists_ok=True)
    return Pushed(repo, done.pr_url or done.commit_url, done.pr_revision if create_pr else revision, (*notes, *hints),
                  made and made.url)


# -- before anything is sent -----------------------------------------------------------------------------------------------


def _check(folder: Path) -> tuple[dict[str, Any], Network]:
    """Reads a folder, and refuses what nobody could load."""
    if not (folder / 'config.json').is_file():
        raise UsageError(f"'{folder}' is not a folder with a config.json")
    config, _ = read_config(folder)
    network = describe(load_spec(folder), size_of(config))
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"'{folder}' has no {WEIGHTS}: push a trained model (a search with --epochs 0 writes a config only)")
    with torch.device('meta'):
        expected = {name: tuple(t.shape) for name, t in create(f'local-dir:{folder}', None).state_dict().items()}
    try:
        with safe_open(folder / WEIGHTS, 'pt') as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"'{folder / WEIGHTS}' cannot be read: {first_line(e)}") from None
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise UsageError(f"'{folder / WEIGHTS}' has weights of another model than config.json: {printable(wrong[0])} is "
                         f'{found.get(wrong[0], "missing")}, not {expected.get(wrong[0], "there")}')
    return config, network


def _licence(config: Mapping[str, Any], chosen: Optional[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The licence and the weights that it comes from.

    Args:
        config: What config.json holds.
        chosen: The licence that the user gives.

    Returns:
        Metadata; what readers of the card must know; what only the user must.
    """
    said = _provenance(config)
    recorded = 'inherited' in said
    base, tag = config['architecture'].removesuffix(SUFFIX), config.get('pretrained_cfg', {}).get('tag')
    name = said['inherited'] if recorded else f'{base}.{tag}'
    try:
        cfg = timm.get_pretrained_cfg(name) if isinstance(name, str) and timm.is_model(name.partition('.')[0]) else None
    except RuntimeError:  # no such tag
        cfg = None
    metadata: dict[str, Any] = {'license': chosen} if chosen else {}
    if cfg is None or not cfg.has_weights:
        return metadata, [], [] if chosen else ['no licence is stated: --license gives one']
    licence, notes, hints = cfg.license, [], []
    if recorded and cfg.hf_hub_id:
        metadata |= {'base_model': cfg.hf_hub_id, 'base_model_relation': 'finetune'}
    if licence and not chosen:
        metadata |= {'license': licence} if licence in KNOWN else {'license': 'other', 'license_name': licence}
        if licence not in KNOWN and cfg.origin_url:
            metadata['license_link'] = cfg.origin_url
    begun = f'The weights began with those of {name}' if recorded else (
        f'It is not recorded whether the weights began with those of {name}')
    if licence and NON_COMMERCIAL.search(licence):
        notes.append(f'{begun}, whose licence, {licence}, does not allow commercial use.')
    elif licence and not chosen and not recorded:
        notes.append(f'{begun}; the licence stated is theirs.')
    elif not licence and not chosen:
        hints.append(f'{begun}, of whose licence timm says nothing: --license gives one')
    return metadata, notes, hints


def _provenance(config: Mapping[str, Any]) -> Mapping[str, Any]:
    said = config.get('timm_width')
    return said if isinstance(said, dict) else {}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -- the card --------------------------------------------------------------------------------------------------------------


def _card(config: dict, network: Network, repo: str, metadata: Mapping[str, Any], notes: Sequence[str], picture: bool) -> str:
    """README.md: the card's text, with the licence and the results in its metadata."""
    from huggingface_hub import EvalResult, ModelCard

    said = _provenance(config)
    text = render_card(config, repo, _table(network, said), notes, PICTURE if picture else None, base_widths=network.base)
    card = ModelCard(text)
    policy = [said['policy']] if isinstance(said.get('policy'), str) else []
    data = card.data
    data.tags = list(dict.fromkeys([*(data.tags or ()), TASK, 'timm', 'timm_width', 'pruning', *policy]))
    data.library_name, data.pipeline_tag = 'timm', TASK
    for key in ('license', 'license_name', 'license_link', 'base_model', 'base_model_relation'):
        setattr(data, key, metadata.get(key))
    images = said['data'] if isinstance(said.get('data'), str) and said['data'] else 'validation images'
    results = [EvalResult(task_type=TASK, dataset_type=re.sub(r'[^\w.-]+', '-', images.lower()), dataset_name=images,
                          metric_type=kind, metric_name=METRICS[key], metric_value=round(said[key] / 100, 6))  # a share, there
               for key, kind in (('top1', 'accuracy'), ('map', 'mAP')) if _number(said.get(key))]
    if results:
        data.eval_results, data.model_name = results, repo.rpartition('/')[2]
    return str(card)


def _table(network: Network, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the card's table: what the search set beside the network (at least the base), and the network."""
    keys = (*ROW, *METRICS, *(f'{m}_std' for m in METRICS))

    def row(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: printable(values[k], 60) if k in ROW[:2] else values[k] for k in keys
                if k in values and (k in ROW[:2] or _number(values[k]))}

    baseline = said.get('baseline')
    rows = [row(values) for values in baseline.values() if isinstance(values, dict)] if isinstance(baseline, dict) else []
    if not any(r.get('network') == 'base' for r in rows):
        rows.insert(0, {'network': 'base', 'budget': '', **{k: costs[0] for k, costs in network.costs.items()}})
    costs = said.get('costs')
    timed = costs.get('latency_ms') if isinstance(costs, dict) else None
    timed = timed if isinstance(timed, dict) else {}
    mine = {'network': 'found', 'budget': said.get('budget', ''), **{k: c[1] for k, c in network.costs.items()},
            **{k: said[k] for k in METRICS if k in said}, **{new: timed[old] for new, old in (
                ('latency_ms', 'ms'), ('latency_spread', 'spread'), ('predicted_ms', 'predicted')) if old in timed}}
    return [*rows, row(mine)]


def _picture(network: Network) -> Optional[bytes]:
    """The widths beside the base as a PNG; None without matplotlib."""
    gone = {name: 0 for name in network.widths if any(name.startswith(f'{block}.') for block in network.spec.skips)}
    shown = replace(network.spec, widths={**network.widths, **gone})
    try:
        figure = plot_ratios({printable(shown.provenance.get('budget') or shown.architecture, 60): shown}, network.base)
    except UsageError:
        return None
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=150, bbox_inches='tight')
    return file.getvalue()


# -- what the Hub refuses --------------------------------------------------------------------------------------------------


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Makes one line of what goes wrong between here and the Hub."""
    try:
        yield
    except UsageError:
        raise
    except Exception as e:  # of the network, of rights, of several libraries
        raise UsageError(f"'{repo}' was not pushed: {_reason(e)}") from e


def _reason(error: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RevisionNotFoundError

    unreachable = ConnectionError, TimeoutError, HfHubHTTPError.__bases__[0]  # the last: of the library that the client uses
    below = error
    while getattr(below, 'response', None) is None and below.__cause__ is not None and not isinstance(below, unreachable):
        below = below.__cause__
    status = getattr(getattr(below, 'response', None), 'status_code', None)
    if status == 401 or isinstance(below, LocalTokenNotFoundError):
        return ('the Hub does not accept the token, or has been given none: `hf auth login`, HF_TOKEN or --token gives it one that '
                'may write')
    if status == 403:
        return 'this token may not write there'
    if isinstance(below, RevisionNotFoundError):
        return 'there is no such revision'
    if status == 404:
        return 'there is no such repository that this token may see'
    if status is None and isinstance(below, unreachable):
        if error is not below and 'uploading' in str(error):
            return (f'the upload was interrupted ({first_line(error)} {first_line(below)}); nothing has changed there, and the '
                    'same command tries again')
        return f'the Hub at {constants.ENDPOINT} cannot be reached: {first_line(below)}'
    return printable(' '.join(str(below).split()) or type(below).__name__, 300)


# -- the command -----------------------------------------------------------------------------------------------------------


def parse(argv: Optional[Sequence[str]] = None) -> Namespace:
    """Reads the flags."""
    parser = Parser(prog='timm-width push', description=__doc__, allow_abbrev=False)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='a saved model; with --collection also a search with several')
    parser.add_argument('repo', metavar='REPO', help='OWNER/NAME; NAME alone is one of your own')
    parser.add_argument('--private', action='store_true', help='a repository that only you see')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to push to, made if missing (default: main)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.add_argument('--token', metavar='TOKEN', help='instead of that of HF_TOKEN or `hf auth login`')
    parser.add_argument('--license', metavar='NAME', help='by default that of the published weights that these began with')
    parser.add_argument('--collection', metavar='TITLE', help='put it in a collection; of a search, all of its budgets')
    return parser.parse_args(argv)


def folders_of(args: Namespace) -> dict[str, Path]:
    """Repository -> the folder that goes there.

    Raises:
        UsageError: There is no model, or there are several and no collection for them.
        ConfigError: One of them cannot be read.
    """
    if (args.folder / 'config.json').is_file() and not args.collection:
        return {args.repo: args.folder}
    found = list(networks_in(args.folder))
    if not found:
        raise UsageError(f"'{args.folder}' is not a folder with a config.json")
    names = ['-'.join(folder.relative_to(args.folder).parts) for folder in found]
    if not args.collection:
        raise UsageError(f"'{args.folder}' holds several models: push one of {', '.join(names)}, or all with --collection TITLE")
    return {args.repo + f'-{name}' * bool(name): folder for name, folder in zip(names, found)}


def show(done: Pushed) -> None:
    """Prints where a model is now, and what there is to know about it."""
    for note in done.notes:
        print(f'note: {note}')
    print(f"pushed: import timm_width; timm.create_model('{done.source}', pretrained=True)\n{done.url}", flush=True)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Parses, pushes, and prints where to."""
    args = parse(argv)
    for repo, folder in folders_of(args).items():
        done = push_to_hub(folder, repo, args.private, args.revision, args.create_pr, args.token, args.license, args.collection)
        show(done)
    if done.collection:
        print(done.collection)
