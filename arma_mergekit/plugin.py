"""How mergekit's own commands come to see ``merge_method: arma``, and CURLoRA adapters: a lazy import hook.

At interpreter start ``arma_mergekit.pth`` (from Python 3.15 on its ``.start``, PEP 829) calls `install`. The
hook waits for two modules, and when one has run imports ours, which does the rest:

    mergekit.merge_methods.registry    `arma_mergekit.method` registers itself
    mergekit.common                    has imported PEFT, for `base+adapter`; `continual.curlora` registers there

It knows these names and nothing of mergekit's or our modules' insides. Until they load it imports nothing but
``sys`` (hence no ``typing``) and reads no file, network or environment variable. A failure of ours becomes a
RuntimeWarning, never an ImportError in somebody else's program. docs/develop.md says why.
"""

import sys

TYPE_CHECKING = False  # what typing.TYPE_CHECKING is, without importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["REGISTRY", "Finder", "install", "installed"]

REGISTRY = "mergekit.merge_methods.registry"
COMMON = "mergekit.common"


class Finder:
    """A meta-path finder that answers for two modules of mergekit alone."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Spec of the module as the other finders give it, its loader wrapped; None for other modules."""
        if fullname not in (REGISTRY, COMMON):
            return None
        for finder in sys.meta_path:
            find = None if isinstance(finder, Finder) else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class Loader:
    """The module's own loader, plus one step after it has run."""

    def __init__(self, loader: "Any") -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> "Any":
        return getattr(self.loader, name)

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        """As the real loader does."""
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: "ModuleType") -> None:
        """Run the module with its real loader, then let ours register."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if module.__name__ == REGISTRY:
            announce()
        else:
            introduce_adapters()


def announce() -> None:
    """Import `arma_mergekit.method`, which registers itself; warn if that fails."""
    try:
        import arma_mergekit.method  # noqa: F401

        # Missing when that module is itself what is importing mergekit: it then registers at its end.
        register = getattr(sys.modules["arma_mergekit.method"], "register", None)
        if register is not None:
            register()
    except Exception as error:  # noqa: BLE001 - mergekit must load whatever is wrong with us
        warn(f"merge_method: arma is not available. {type(error).__name__}: {error}. Run `arma doctor`.")


def introduce_adapters() -> None:
    """Import `arma_mergekit.continual.curlora`, which makes PEFT know its adapters; warn if that fails."""
    try:
        import arma_mergekit.continual.curlora  # noqa: F401
    except Exception as error:  # noqa: BLE001 - likewise
        warn(f"CURLoRA adapters can't be opened here. {type(error).__name__}: {error}.")


def warn(message: str) -> None:
    """Warn, and write to stderr where warnings are errors: the import under way must not fail."""
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        sys.stderr.write(f"RuntimeWarning: {message}\n")


def installed() -> bool:
    """Whether this interpreter has the hook."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def install() -> None:
    """Put the hook in place, once."""
    if not installed():
        sys.meta_path.insert(0, Finder())
