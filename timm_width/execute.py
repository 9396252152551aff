"""timm-width exec SCRIPT ...: runs a Python script with timm_width imported, so that timm's own scripts know the width models.

    timm-width exec validate.py --model local-dir:runs/demo --pretrained --data-dir imagenet
    timm-width exec benchmark.py --model resnet50_width
    torchrun --nproc_per_node 2 -m timm_width exec train.py --model resnet50_width ...

Everything after SCRIPT is the script's; its exit code is that of this command. Processes that the script spawns do
not import timm_width: workers of a DataLoader need not, as no model is built there; a script that builds models in processes of its
own must import it there. (Forked ones have it.)
"""
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import timm_width  # noqa: F401  registers the models

from .data import UsageError

__all__ = ['main']

USAGE = 'usage: timm-width exec SCRIPT [its arguments ...]\n\n'


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Runs a script as `python SCRIPT ...` would.

    Raises:
        UsageError: There is no such script.
        SystemExit: The script ends so.
    """
    script, *rest = (sys.argv[2:] if argv is None else list(argv)) or ['']
    if script in ('-h', '--help'):
        print(USAGE + (__doc__ or ''))
        return
    if not script or script.startswith('-'):
        raise UsageError(f"the first argument must be a script, not '{script}'" if script else 'no script given')
    if not Path(script).is_file():
        raise UsageError(f"there is no script '{script}'")
    before = sys.argv, sys.path[:]
    sys.argv = [script, *rest]
    sys.path.insert(0, str(Path(script).resolve().parent))  # where a script finds what lies beside it
    try:
        runpy.run_path(script, run_name='__main__')
    finally:
        sys.argv, sys.path[:] = before
