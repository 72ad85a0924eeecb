"""Token reductions: tokens of a ViT-shaped net are merged or dropped, by `model.reduction=<name>`.

Every module of this package is imported here, so a new reduction needs one new file and no other edit;
`models/reduction/registry.py` says what the file must hold.
"""

import importlib
import pkgutil

from models.reduction.insertion import insert_reduction
from models.reduction.registry import list_reductions

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = ["insert_reduction", "list_reductions"]
