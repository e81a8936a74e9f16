"""TransformerEngine's real Python layer on a machine without a GPU: its compiled extension is a stub.

Enough to import it, to let Megatron find it and to build modules; nothing can be computed. Run as a program
(`python -O`, because TE compares its enums with the extension's in assertions) it builds one model with
TransformerEngine layers and one with local ones through our layer spec and prints what they are, as JSON.
"""

import itertools
import json
import os
import sys
import types
import warnings


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
    sys.modules["transformer_engine_torch"] = Extension("transformer_engine_torch")
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch  # noqa: F401


def build(transformer_impl: str):
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    from megatron_xact.layers import specs

    transformer = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=128,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        use_cpu_initialization=True,
        transformer_impl=transformer_impl,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    config = GPTModelConfig(
        transformer=transformer,
        vocab_size=256,
        seq_length=32,
        position_embedding_type="rope",
        transformer_layer_spec=specs.xielu,
    )
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def describe(model) -> dict:
    mlp = model.decoder.layers[0].mlp
    state = model.sharded_state_dict()
    return {
        "classes": {name: type(child).__name__ for name, child in mlp.named_children()},
        "final_norm": type(model.decoder.final_layernorm).__name__,
        "alpha_dtypes": sorted({str(p.dtype) for p in mlp.activation_func.parameters()}),
        # Extra state is TE's own (FP8 scales); the rest must not depend on the kind of layer.
        "checkpoint": {v.key: list(v.global_shape) for v in state.values() if "_extra_state" not in v.key},
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    install(sys.argv[1])
    from megatron_xact.pretraining import cpu_platform

    cpu_platform.activate()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    model_parallel_cuda_manual_seed(1)
    local = describe(build("local"))
    torch.cuda.is_available = lambda: True  # TE refuses to build modules otherwise
    print(json.dumps({"te": describe(build("transformer_engine")), "local": local}))


if __name__ == "__main__":
    main()
