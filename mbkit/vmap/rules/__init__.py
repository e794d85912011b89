"""What single operators do when M models call them at once: each file here has a family, and registers its rules."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
