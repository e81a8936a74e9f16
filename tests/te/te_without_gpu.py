"""TransformerEngine's real Python layer on a machine without a GPU: its compiled extension is a stub.

`install` is enough to import it, to let Megatron find it and to build modules; `install_whole` also computes. TE's own
assertions are left out: it compares its enums with the extension's in them.
"""

import importlib.machinery
import itertools
import os
import sys
import types


class WithoutAssertions(importlib.machinery.SourceFileLoader):
    """As `python -O` would load this module; that would have to compile torch and Megatron anew too, for 10 s."""

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)

    @staticmethod
    def find_spec(name: str, path, target=None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "transformer_engine":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = WithoutAssertions(name, spec.origin)
        return spec


def install(te_folder: str) -> None:
    """Make `transformer_engine`, unpacked in `te_folder`, importable in this process."""

    class Extension(types.ModuleType):
        """Any attribute is a class; any attribute of that is an enum-like member with a number."""

        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            numbers = itertools.count()

            class Members(type):
                def __getattr__(cls, member: str):
                    if member.startswith("__"):
                        raise AttributeError(member)
                    value = cls()
                    value.number = next(numbers)
                    setattr(cls, member, value)
                    return value

            def to_int(self) -> int:
                return self.number

            stub = Members(name, (), {"__init__": lambda self, *args, **kwargs: None, "__int__": to_int})
            setattr(self, name, stub)
            return stub

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # TE's own switch: do not load the core library
    sys.path.insert(0, te_folder)
    sys.meta_path.insert(0, WithoutAssertions)
    sys.modules["transformer_engine_torch"] = Extension("transformer_engine_torch")
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch  # noqa: F401


def install_whole(te_folder: str, requirements: str | None = None):
    """`install`, and what its modules compute with: `extension.py` in place of the compiled one, the CPU as a Hopper.

    Returns the `extension.Counter` of what TE quantizes. requirements: a folder where its dependencies are, if not
    te_folder.
    """
    if requirements is not None:
        sys.path.insert(0, requirements)
    install(te_folder)
    from megatron_xact.pretraining import cpu_platform

    cpu_platform.activate()
    import extension
    import torch
    import transformer_engine.pytorch.ops.basic.basic_linear as basic_linear
    import transformer_engine.pytorch.ops.basic.rmsnorm as rmsnorm
    import transformer_engine.pytorch.quantization as quantization

    torch.cuda.get_device_capability = lambda *args: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    counter = extension.Counter()
    basic_linear.general_gemm = extension.general_gemm
    rmsnorm.rmsnorm_fwd, rmsnorm.rmsnorm_bwd = extension.rmsnorm_fwd, extension.rmsnorm_bwd
    sys.modules["transformer_engine_torch"].quantize = extension.Quantize(counter)
    for name in vars(quantization):
        if name.startswith("check_") and name.endswith("_support"):
            setattr(quantization, name, lambda *args: (True, ""))
    return counter
