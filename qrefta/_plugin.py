"""Registers qrefta with transformers, now or when transformers imports its quantizers.

After `import qrefta`, plain `AutoModel.from_pretrained(prepared_folder)` has to work, whichever of
the two packages is imported first. But transformers' registry of quantizers imports its 20
quantizers, which costs more than a second, and `qrefta --help` needs none of them. So where the
registry is not yet imported, a finder waits for exactly that import, steps aside, and imports
`qrefta.hf_quantizer` right after it. `transformers.modeling_utils` imports the registry too, in the
middle of its own import: nothing that `qrefta.hf_quantizer` imports may import `modeling_utils`.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"
_PLUGIN = "qrefta.hf_quantizer"


def register() -> None:
    """Register the plug-in, now or later."""
    if _REGISTRY in sys.modules:
        import_module(_PLUGIN)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the registry once, as Python would, with a loader that registers the plug-in."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Leaves everything to Python's loader, and imports the plug-in at the end."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        import_module(_PLUGIN)
