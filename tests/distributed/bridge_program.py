"""Megatron-Bridge's own `pretrain` of the tiny model of training.py, on gloo ranks: run by test_bridge.py, by torchrun.

Bridge cannot be imported without TransformerEngine, ModelOpt and a few more, which dense pretraining of the local layer
does not use: any name may be imported from these, and is a class that does nothing. What Bridge computes with, its
configuration, model building, loop, optimizer and checkpoints, and Megatron, is the real thing.

usage: bridge_program.py FOLDER DATA STEPS WORDS..., where WORDS are of: bf16, tp2, gated, bare, plain, load=FOLDER
"""

import functools
import importlib.abc
import importlib.machinery
import os
import sys
import types

UNUSED = ("transformer_engine", "modelopt", "nvidia_resiliency_ext", "megatron.energon", "mlflow", "wandb", "fla",
          "flashinfer", "webdataset", "comet_ml")  # fmt: skip


class AnyName(type):
    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class Unused(types.ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if any(name == top or name.startswith(f"{top}.") for top in UNUSED):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Unused(spec.name)

    def exec_module(self, module):
        pass


def prepare() -> None:
    from megatron_xact.pretraining import cpu_platform

    cpu_platform.activate()
    import megatron.training.checkpointing  # noqa: F401  that Megatron sees what is really there: no TransformerEngine

    import megatron_xact.layers.specs  # noqa: F401

    sys.meta_path.insert(0, Finder())
    from megatron.bridge.training import checkpointing, eval, initialize, setup, train

    setup.initialize_megatron = functools.partial(initialize.initialize_megatron, allow_no_cuda=True)
    setup.set_jit_fusion_options = initialize.compile_helpers = lambda *args: None  # as on the CPU platform
    nothing = {
        checkpointing: ("save_sharded_modelopt_state", "save_modelopt_state", "restore_modelopt_state"),
        train: ("get_tensor_shapes_adjust_fn_for_distillation",),
        eval: ("get_tensor_shapes_adjust_fn_for_distillation",),
    }
    for module, names in nothing.items():
        for name in names:
            setattr(module, name, lambda *args, **kwargs: None)


def container(folder: str, data: str, steps: int, words: list[str]):
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import config
    from megatron.bridge.training.mixed_precision import bf16_mixed

    from megatron_xact.layers import specs

    model = GPTModelProvider(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, seq_length=32,
        normalization="RMSNorm", layernorm_epsilon=1e-5, add_bias_linear=False, attention_dropout=0.0,
        hidden_dropout=0.0, position_embedding_type="rope", rotary_base=500000, transformer_impl="local",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu,  # as a recipe for Llama has them
        tensor_model_parallel_size=2 if "tp2" in words else 1, sequence_parallel="tp2" in words,
        gradient_accumulation_fusion=False, apply_rope_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, bias_dropout_fusion=False, cross_entropy_loss_fusion=False,
    )  # fmt: skip
    if "bare" in words:
        model.transformer_layer_spec, model.gated_linear_unit = specs.xielu, False
    else:
        specs.into(model, "xsilu_glu1" if "gated" in words else "xielu")
    # Bridge's training has no setting for this, which the CPU platform needs.
    model.provide_distributed_model = functools.partial(model.provide_distributed_model, use_cpu_initialization=True)
    distributed = "bf16" in words and "plain" not in words
    load = next((word.removeprefix("load=") for word in words if word.startswith("load=")), None)
    return config.ConfigContainer(
        model=model,
        train=config.TrainingConfig(train_iters=steps, global_batch_size=4, micro_batch_size=2),
        validation=config.ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=config.OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=0.0, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.1,
            clip_grad=1.0, use_distributed_optimizer=distributed,
        ),
        scheduler=config.SchedulerConfig(
            lr_decay_style="WSD", lr_wsd_decay_style="minus_sqrt", lr_warmup_iters=2, lr_wsd_decay_iters=4,
            lr_decay_iters=steps, start_weight_decay=0.1, end_weight_decay=0.1,
        ),
        ddp=config.DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, grad_reduce_in_fp32=True, overlap_grad_reduce=distributed,
            overlap_param_gather=distributed,
        ),
        dataset=config.GPTDatasetConfig(
            random_seed=1234, seq_length=32, num_workers=0, dataloader_type="single", path_to_cache=f"{folder}/cache",
            blend_per_split=[([f"{data}/train_text_document"], None), None, None],
            reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        ),
        logger=config.LoggerConfig(log_interval=1, tensorboard_dir=f"{folder}/tensorboard"),
        tokenizer=config.TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=f"{data}/tokenizer", use_tokenizer_vocab_size=True
        ),
        checkpoint=config.CheckpointConfig(
            save=folder, save_interval=4, load=load, ckpt_step=8 if load else None, ckpt_format="torch_dist"
        ),
        rng=config.RNGConfig(seed=1234),
        dist=config.DistributedInitConfig(distributed_backend="gloo"),
        mixed_precision=bf16_mixed() if "bf16" in words else None,
    )  # fmt: skip


if __name__ == "__main__":
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    prepare()
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    pretrain(container(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]), forward_step)
