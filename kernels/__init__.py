"""Triton kernels; installed and imported as `fastattn.kernels`.

With the repository's root on sys.path this folder would also answer to `import kernels`, which is
the name of Hugging Face's package: then it steps aside for the real one, or passes for absent.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    _others = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _root]
    _spec = importlib.machinery.PathFinder.find_spec("kernels", _others)
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = _module = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(_module)
    else:  # transformers can't bear an ImportError here; what has no file it takes for absent
        __file__ = None  # type: ignore[assignment]
