"""timm's own model checks (tests/test_models.py of its sdist) on half-width versions of its models.

    python tests/benchmarks/timm_model_checks.py [resnet50 mobilenetv2_100 ...] [--checks "forward and not fx"] [--prune]

Downloads the sdist of the timm that is installed (by pip, to a temporary folder), registers `<base>_half`, which is
`<base>_width` with every searchable group at half, under the base's family, and runs timm's tests on these names. Prints, per
check, how many passed, failed and were skipped, and why the failed ones did. --base runs the same checks on the bases, to tell
our faults from timm's. The checks that download pretrained weights are left out.
"""
import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).parents[2]
NETS = [
    'resnet50', 'mobilenetv2_100', 'efficientnet_b0', 'regnety_016', 'densenet121', 'convnext_atto', 'hrnet_w18_small',
    'res2net50_14w_8s', 'cs3darknet_focus_s', 'ghostnet_100', 'repvgg_a0', 'mobileone_s0', 'nf_regnet_b0', 'nfnet_l0',
    'skresnet18', 'tresnet_m', 'dpn48b', 'fasternet_t0', 'rexnet_100',
]
PLUGIN = '''
"""A pytest plugin: registers `<base>_half` under the base's family, with the base's default cfg."""
import sys
import types
from collections import deque
from functools import lru_cache

import timm
import torch
from timm.models import get_pretrained_cfg, register_model
from timm.models._pretrained import DefaultCfg
from timm.models._registry import _model_to_module

import timm_width

torch.set_num_threads(1)


@lru_cache
def half(base):
    with torch.device('meta'):
        return timm_width.trace(timm.create_model(base)).scaled(0.5)


def add(base):
    timm_width.register(base)
    family = _model_to_module[base]
    module = sys.modules.setdefault(f'half.{family}', types.ModuleType(f'half.{family}'))

    def entry(pretrained=False, **kwargs):
        return timm.create_model(f'{base}_width', pretrained=pretrained, widths=half(base), **kwargs)

    entry.__name__ = entry.__qualname__ = f'{base}_half'
    entry.__module__ = module.__name__
    if not hasattr(module, 'default_cfgs'):
        module.default_cfgs = {}
    cfg = get_pretrained_cfg(base)
    module.default_cfgs[entry.__name__] = DefaultCfg(tags=deque([cfg.tag or '']), cfgs={cfg.tag or '': cfg})
    register_model(entry)


for name in %r:
    add(name)
'''


def sdist(folder: Path) -> Path:
    """Downloads and unpacks timm's tests; returns their folder."""
    import timm

    pip = [sys.executable, '-m', 'pip'] if not subprocess.run(
        [sys.executable, '-m', 'pip', '--version'], capture_output=True).returncode else [shutil.which('pip') or 'pip']
    subprocess.run([*pip, 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '-d', str(folder),
                    f'timm=={timm.__version__}'], check=True)
    with tarfile.open(next(folder.glob('timm-*.tar.gz'))) as tar:
        tar.extractall(folder, members=[m for m in tar.getmembers() if m.name.split('/')[1:2] == ['tests']], filter='data')
    return next(folder.glob('timm-*/tests'))


def run(tests: Path, names: list[str], expression: Optional[str], prune: bool, half: bool) -> collections.OrderedDict:
    """Runs timm's tests; returns check -> list of (model, outcome, reason)."""
    plugin = tests.parent / 'plugin'
    plugin.mkdir(exist_ok=True)
    (plugin / 'half_models.py').write_text(PLUGIN % (names,))
    wanted = [n + '_half' if half else n for n in names]
    report = tests.parent / 'report.xml'
    report.unlink(missing_ok=True)
    keyword = f"({' or '.join(wanted)}) and not pretrained" + (f' and ({expression})' if expression else '')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(plugin), str(ROOT), os.environ.get('PYTHONPATH', '')]),
           'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, '-m', 'pytest', '-q', '--tb=no', '-p', 'half_models', '-p', 'no:cacheprovider',
                    '-W', 'ignore', '--rootdir', str(tests.parent), '-c', os.devnull, '--junitxml', str(report), '-k', keyword,
                    *([] if prune else ['--deselect', 'tests/test_models.py::test_prune_intermediate_layers_contract']),
                    'tests/test_models.py'], cwd=tests.parent, env=env)
    found = collections.OrderedDict()
    for case in ElementTree.parse(report).iter('testcase'):
        check, _, arguments = case.get('name').partition('[')
        model = next((n for n in wanted if re.search(rf'(^|-){re.escape(n)}(\.|-|\]|$)', arguments)), None)
        if model is None:
            continue  # another model whose name contains one of ours
        bad = case.find('failure') if case.find('failure') is not None else case.find('error')
        outcome = 'failed' if bad is not None else 'skipped' if case.find('skipped') is not None else 'passed'
        reason = (bad.get('message') or bad.text or '').strip() if bad is not None else ''
        found.setdefault(check, []).append((model, outcome, reason.partition('\n')[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', default=NETS)
    parser.add_argument('--checks', metavar='EXPRESSION', help="pytest -k expression, as in 'backward or default_cfgs'")
    parser.add_argument('--prune', action='store_true', help='also prune every model at every feature level (slow)')
    parser.add_argument('--base', action='store_true', help='check the bases instead')
    parser.add_argument('--tests', type=Path, help="timm's tests folder, already unpacked")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / 'timm' / 'tests'
        if args.tests:
            shutil.copytree(args.tests, tests)
        else:
            tests = sdist(Path(folder))
        found = run(tests, args.models, args.checks, args.prune, not args.base)
    print(f"\n{'check':45} passed failed skipped")
    for check, rows in found.items():
        count = collections.Counter(outcome for _, outcome, _ in rows)
        print(f"{check:45} {count['passed']:6} {count['failed']:6} {count['skipped']:7}")
    for check, rows in found.items():
        for model, outcome, reason in rows:
            if outcome == 'failed':
                print(f'{check} {model}: {reason[:300]}')
    sys.exit(any(o == 'failed' for rows in found.values() for _, o, _ in rows))


if __name__ == '__main__':
    main()
