"""`python -m timm_width` is `timm-width`."""
import sys

from .cli import main

sys.exit(main())
