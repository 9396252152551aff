"""timm-width train, from a checkout: python train.py --help."""
import sys

from timm_width.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
