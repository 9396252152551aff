"""timm-width search, from a checkout: python search.py --help."""
import sys

from timm_width.cli import main

if __name__ == '__main__':
    sys.exit(main(['search', *sys.argv[1:]]))
