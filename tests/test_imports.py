"""Which module imports which: no cycles, dependencies run one way, and importing timm_width is quick and light."""
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import timm_width

ROOT = Path(timm_width.__file__).parent
FOLDERS = ('latency', 'models', 'policies')
# each may import those in lines above it; what is not listed may import anything (without making a cycle)
ORDER = [
    {'space', 'rules'},
    {'factors', 'masking', 'moving'},
    {'config', 'cost', 'elimination', 'supernet'},
    {'solve'},
    {'assignment', 'bins', 'budget', 'gating', 'markov', 'meter', 'positions', 'tables'},
    {'extrapolation', 'stages'},
    {'resize'},
    {'bindings'},
    {'ledger'},
    {'check', 'deployed'},
    {'trace'},
    {'laws', 'mixture', 'recover', 'latency.terms'},
    {'models.gpunet', 'models.published', 'models.vgg'},
    {'models.prunet_space'},
    {'models.prunet'},
    {'models.prunet_search'},
    {'models', 'models.width_nets', 'models.make_supported'},
    {'data', 'latency.runner.errors'},
    {'onnx_file', 'latency.runner.timing', 'latency.runner.onnx_widths'},
    {'latency.runner.manifest', 'latency.onnx_graph'},
    {'latency.runner.results', 'latency.onnx_recipe'},
    {'latency.runner.base'},
    {'latency.runner.ort', 'latency.runner.trt', 'latency.runner.trtexec_log'},
    {'latency.runner.trtexec'},
    {'latency.runner.backends'},
    {'latency.runner.main'},
    {'latency.measure', 'latency.model', 'latency.sampling'},
    {'latency'},
    {'arguments', 'grids', 'losses', 'report', 'twins'},
    {'card', 'commandline', 'engine'},
    {'checkpoints', 'holdout', 'make_hub', 'start', 'tasks', 'training_data'},
    {'task_training', 'latency.blocks', 'latency.bundle', 'latency.fit'},
    {'latency.plan'},
    {'latency.block_bundle'},
    {'latency.block_fit'},
    {'latency.build'},
    {'latency.command', 'target'},
    {'problem'},
    {'choosing', 'search_flags'},
    {'comparison', 'projection'},
    {'front'},
    {'plots'},
    {'show'},
    {'hub'},
    {'output'},
    {'conformance', 'execute', 'export', 'search', 'train'},
    {'transfer'},
    {'cli'},
]
HEAVY = ('onnx', 'onnx_ir', 'onnxruntime', 'onnxscript', 'tensorrt', 'matplotlib', 'sklearn', 'pandas')


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {module_name(p): p for p in sorted(ROOT.rglob('*.py'))
         if p.relative_to(ROOT).parts[0] in FOLDERS or p.parent == ROOT}


def imports(name: str, inside: bool) -> dict[str, int]:
    """Modules that a module imports, ours as '.name', with the line; `inside` also those inside functions."""
    path, found = FILES[name], {}
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]

    def visit(node) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside:
                continue
            if isinstance(child, ast.If) and 'TYPE_CHECKING' in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                for a in child.names:
                    found.setdefault(own(a.name), child.lineno)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    parts = package.split('.') if package else []
                    base = '.'.join([*parts[:len(parts) - child.level + 1], *([child.module] if child.module else [])])
                    for a in child.names:
                        one = f'{base}.{a.name}'.strip('.')
                        found.setdefault('.' + (one if one in FILES else base), child.lineno)
                else:
                    for a in child.names:
                        one = own(f'{child.module}.{a.name}')
                        found.setdefault(one if one[1:] in FILES else own(child.module), child.lineno)
            visit(child)

    def own(module: str) -> str:
        return '.' + module.partition('.')[2] if module.split('.')[0] == 'timm_width' else module

    visit(ast.parse(path.read_text()))
    return found


def ours(name: str, inside: bool) -> set[str]:
    return {m[1:] for m in imports(name, inside) if m.startswith('.')} - {''}


def top(name: str, inside: bool) -> set[str]:
    return {m.split('.')[0] for m in imports(name, inside) if not m.startswith('.')}


def test_the_walk_sees_imports():
    """Otherwise the tests below would pass on nothing."""
    assert len(FILES) > 20 and {'space', 'trace', 'models.width_nets', 'policies.base', ''} <= set(FILES)
    assert {'space', 'rules', 'resize', 'ledger'} <= ours('trace', False)
    assert 'trace' in ours('models.width_nets', False) and 'policies.base' in ours('policies.uniform', False)
    assert 'timm' in top('resize', True) and 'timm' not in top('resize', False)
    assert {'numpy'} <= top('space', False) and 'models' in ours('', False)


def test_there_are_no_cycles():
    """At import time; an import inside a function may go up."""
    graph = {n: ours(n, inside=False) & set(FILES) for n in FILES}
    done, path = set(), []

    def walk(name: str) -> None:
        assert name not in path, ' -> '.join([*path[path.index(name):], name])
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                walk(other)
            done.add(path.pop())

    for name in sorted(FILES):
        walk(name)
    assert done == set(FILES)


@pytest.mark.parametrize('name', sorted({n for line in ORDER for n in line} & set(FILES)))
def test_dependencies_run_one_way(name):
    """Also those inside functions."""
    rank = {n: k for k, line in enumerate(ORDER) for n in line}
    above = {m for m in ours(name, inside=True) if rank.get(m, -1) > rank[name]}
    assert not above, f'{name} imports {above}'
    beside = {m for m in ours(name, inside=True) - {name} if rank.get(m) == rank[name]}
    assert not beside or name.startswith(('models', 'engine', 'search', 'train', 'export')), f'{name} imports {beside}'


def test_space_imports_nothing_of_ours_and_no_torch():
    assert not ours('space', inside=True)
    assert not top('space', inside=True) & {'torch', 'timm'}
    assert not ours('rules', inside=True)


POLICIES = [n for n in FILES if n.startswith('policies.') and n != 'policies.base']


@pytest.mark.parametrize('name', ['policies.base', *POLICIES])
def test_a_policy_imports_neither_timm_nor_engine_nor_another_policy(name):
    assert 'timm' not in top(name, inside=True)
    assert not {m for m in ours(name, inside=True) if m.split('.')[0] in (
        'engine', 'latency', 'hub', 'search', 'train', 'cli', 'models', 'data', 'report')}
    assert not {m for m in ours(name, inside=True) if m.startswith('policies')} - {'policies.base'}


def test_only_its_own_file_names_a_policy():
    """`if policy == ...` appears nowhere."""
    files = {n.partition('.')[2] for n in POLICIES}
    names = files | {node.name.lower() for n in POLICIES for node in ast.parse(FILES[n].read_text()).body
                     if isinstance(node, ast.ClassDef)}
    assert {'uniform', 'random', 'autoslim', 'greedy', 'ows', 'aows'} <= names
    for module, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not words & names, f'{module}:{node.lineno}'
        assert module.startswith('policies') or not {m for m in ours(module, True) if m.partition('.')[2] in files and
                                                      m.startswith('policies.')}, module


@pytest.mark.parametrize('name', FILES)
def test_heavy_packages_are_imported_where_they_are_used(name):
    assert not top(name, inside=False) & set(HEAVY)


RUNNER = [n for n in FILES if n.startswith('latency.runner')]


@pytest.mark.parametrize('name', RUNNER)
def test_the_runner_needs_nothing_of_ours_and_no_torch(name):
    """It is copied into bundles, and runs where there is numpy, onnx and one backend; backends are imported inside functions."""
    assert len(RUNNER) > 6 and not {m for m in ours(name, inside=True) if not m.startswith('latency.runner')}
    assert top(name, inside=True) <= {*sys.stdlib_module_names, 'numpy', 'onnx', 'onnxruntime', 'tensorrt', 'cuda'}
    assert top(name, inside=False) <= {*sys.stdlib_module_names, 'numpy'}
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        assert not isinstance(node, ast.ImportFrom) or node.level == 1 or node.level == 0 and node.module.split('.')[0] != 'timm_width'


CHILD = """
import json, os, sys, time
import timm
for _ in range(3):
    if os.fork() == 0:
        before, start = set(sys.modules), time.process_time()
        import timm_width
        seconds = time.process_time() - start
        sys.stdout.write(json.dumps([seconds, sorted(set(sys.modules) - before)]) + chr(10))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope='module')
def imported() -> list:
    """Three times in a process that has imported timm: the seconds that `import timm_width` takes, and what it loads."""
    done = subprocess.run([sys.executable, '-c', CHILD], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0 and done.stdout.count('\n') == 3, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_importing_timm_width_loads_no_heavy_package(imported):
    """Beyond what torch and timm load themselves; nor the scripts' parts."""
    new = set(imported[0][1])
    assert {'timm_width', 'timm_width.trace'} <= new
    assert not {m.split('.')[0] for m in new} & set(HEAVY)
    assert not new & {f'timm_width.{m}' for m in ('cli', 'engine', 'search', 'train', 'export', 'data', 'card', 'make_hub', 'models.make_supported')}


def test_importing_timm_width_is_quick(imported):
    """At most 0.3 s on top of `import timm`, with a margin for a busy machine."""
    best = min(seconds for seconds, _ in imported)
    print(f'import timm_width adds {best:.3f} s to import timm')
    assert best < 0.5
