"""The program `timm-width`: finds the command, runs it, and turns what users get wrong into one line and exit code 2."""
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Optional

from . import __version__
from .budget import BudgetError
from .cost import CostError
from .data import UsageError
from .extrapolation import TransferError
from .latency.model import LatencyError
from .latency.runner.errors import RunnerError
from .policies import PolicyError
from .solve import SolveError
from .space import WidthError, nearest
from .trace import TraceError

__all__ = ['main']

COMMANDS = {  # name -> what --help says; the module of that name has main(argv)
    'search': 'find the widths of a timm model for a budget, train the result',
    'train': 'train a timm model, plain or searched',
    'export': 'write a saved model as an ONNX file, checked against torch',
    'latency': 'measure a network at many widths, here or on another machine',
    'transfer': 'carry widths over to a larger model, or compare them',
    'plot': 'draw what a search found',
    'show': 'print the widths of a network beside its base, and its costs',
    'push': 'put a saved model on the Hugging Face Hub',
    'exec': "run a script, such as timm's validate.py, with timm_width imported",
}
MODULES = {'latency': 'latency.command', 'plot': 'plots', 'push': 'hub', 'exec': 'execute'}  # of commands that are called otherwise
ERRORS = (UsageError, RunnerError, LatencyError, PolicyError, BudgetError, CostError, SolveError, WidthError, TraceError,
          TransferError)
USAGE = 'usage: timm-width COMMAND ...\n\n' + '\n'.join(f'  {name:<8} {text}' for name, text in COMMANDS.items()) + (
    '\n\n  timm-width COMMAND --help lists the flags of a command\n  timm-width --version')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs a command line, by default that of this process.

    Returns:
        The exit code: 0, or 2 for a user's error, whose one message is on stderr.
    """
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or ['']
    if command in ('-h', '--help', 'help'):
        print(USAGE)
        return 0
    if command == '--version':
        print(f'timm-width {__version__}')
        return 0
    if command not in COMMANDS:
        what = f"unknown command '{command}'{nearest(command, COMMANDS)}" if command else 'no command given'
        print(f"timm-width: {what}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        import_module(f'{__package__}.{MODULES.get(command, command)}').main(rest)
    except ERRORS as e:
        print(f'timm-width {command}: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f'timm-width {command}: interrupted{e}', file=sys.stderr)
        return 130
    return 0
