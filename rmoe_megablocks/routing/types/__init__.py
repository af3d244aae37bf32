"""One file a router type, in the rooms of those with and without a state. A file that lies here is a type."""

import importlib
import pkgutil

for _module in pkgutil.walk_packages(__path__, __name__ + "."):
    importlib.import_module(_module.name)  # which registers it
