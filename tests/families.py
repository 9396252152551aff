"""The smallest supported model of every conv family in timm, for tests that state a law for all of them."""
from timm_width.models import supported

SHRINKABLE = 96  # pixels that most conv nets accept


def smallest_of_each_family() -> dict[str, str]:
    """Family -> its smallest model by parameters, timm's own test models left out."""
    best: dict[str, str] = {}
    table = supported()
    for name, row in table.items():
        if name.startswith('test_'):
            continue
        now = best.get(row['family'])
        if now is None or row['params'] < table[now]['params']:
            best[row['family']] = name
    return dict(sorted(best.items()))
