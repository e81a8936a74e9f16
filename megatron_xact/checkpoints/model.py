"""A checkpoint of either kind as one whole fp32 model in this process, behind one small interface.

Megatron's side is Megatron's own: its model builder and its distributed loading, with nothing of our Hugging Face
mapping in between. That is what makes a comparison with the exported model a proof. The layers are the plain torch
("local") ones whatever the run used: same weights and same mathematics, in true fp32 on any machine.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_xact.checkpoints import megatron_io, tokenizer_files
from megatron_xact.checkpoints.architecture import identity_of, record, vocabulary_size
from megatron_xact.checkpoints.modeling import MODELING_FILE, is_ours
from megatron_xact.checkpoints.tokenizer_files import TokenizerFiles
from megatron_xact.pretraining.checkpointing.folder import TRACKER

# What a run's arguments say about parallelism, precision and speed, replaced by: one rank, fp32, nothing fused.
_ONE_RANK = {
    "rank": 0,
    "world_size": 1,
    "data_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "hierarchical_context_parallel_sizes": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "sequence_parallel": False,
    "overlap_p2p_comm": False,
    "tp_comm_overlap": False,
    "spec": None,
}
_PLAIN_FP32 = {
    "bf16": False,
    "fp16": False,
    "fp8": None,
    "fp4": None,
    "fp8_param_gather": False,
    "fp4_param_gather": False,
    "params_dtype": torch.float32,
    "fp32_residual_connection": False,
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "gradient_accumulation_fusion": False,
    "cuda_graph_impl": "none",
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "perform_initialization": False,  # every weight is loaded
}


@dataclass(frozen=True)
class Source:
    """Where a model's weights lie: `kind` is "megatron" (`path`: one iteration's folder), "legacy" (the same, in the
    old format of a file per rank) or "huggingface"."""

    kind: str
    path: Path


@dataclass
class Model:
    """`module` in eval mode, fp32. `vocab_size` leaves out Megatron's padding where the tokenizer tells its true size.

    max_length: positions the model has; seq_length: what a run was trained with (Hugging Face: the same, up to 2048).
    """

    source: Source
    module: torch.nn.Module
    vocab_size: int
    max_length: int
    seq_length: int
    args: Namespace | None = None  # Megatron's

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] int64 -> logits [b, s, vocab_size] fp32, on the model's device."""
        tokens = tokens.to(self.device)
        if self.source.kind == "megatron":
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            logits = self.module(tokens, positions, None)
        else:
            logits = self.module(input_ids=tokens, use_cache=False).logits
        return logits[..., : self.vocab_size].float()

    def tokenizer(self, folder: str | Path | None = None):
        """The tokenizer of this model, or of `folder`. ValueError: there is none."""
        return load_tokenizer(folder or tokenizer_files_of(self.source, self.args).folder)


def locate(folder: str | Path, step: int | None = None) -> Source:
    """What kind of checkpoint lies in `folder`, and which iteration of a run. ValueError or OSError: neither kind."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"{folder} is a Hugging Face folder, which has no step {step}; leave --step out")
        return Source("huggingface", folder)
    marks = (TRACKER, ".metadata", "iter_*", "mp_rank_*")
    if folder.is_dir() and not any(any(folder.glob(mark)) for mark in marks):
        raise ValueError(
            f"{folder} holds no checkpoint: neither config.json (Hugging Face), {TRACKER} (a Megatron run) nor "
            ".metadata (one iteration of a run)"
        )
    path = megatron_io.find(folder, step)
    return Source("legacy" if any(path.glob("mp_rank_*")) else "megatron", path)


def load(folder: str | Path, step: int | None = None) -> Model:
    """The model in `folder`, of either kind, in fp32."""
    source = locate(folder, step)
    if source.kind == "huggingface":
        module = load_hf(source.path)
        length = getattr(module.config, "max_position_embeddings", None) or 2048
        return Model(source, module, module.config.vocab_size, length, min(length, 2048))
    module, args = load_megatron(source)
    vocabulary = args.padded_vocab_size
    with contextlib.suppress(ValueError):  # no tokenizer: the padding stays in
        vocabulary = min(vocabulary, vocabulary_size(args, tokenizer_files_of(source, args).size))
    return Model(source, module, vocabulary, args.max_position_embeddings, args.seq_length, args)


def load_megatron(source: Source) -> tuple[torch.nn.Module, Namespace]:
    """A checkpoint saved with any parallelism as one fp32 GPTModel in this process, and the arguments of its run.

    On the GPU if there is one. ValueError: tensors missing or unexpected, or no activation known for it.
    """
    _be_one_rank()
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_xact.layers.specs import decoder_block

    if source.kind == "legacy":
        raise ValueError(f"{source.path} is in Megatron's old format of a file per rank; bring it over: xact import")
    common = dist_checkpointing.load_common_state_dict(str(source.path))
    args = common["args"]
    changed = copy.copy(args)
    vars(changed).update(_ONE_RANK | _PLAIN_FP32, use_cpu_initialization=not torch.cuda.is_available())
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # "GPTModel is deprecated"
    with contextlib.redirect_stdout(io.StringIO()):  # the spec's announcement is for training logs
        config = gpt_config_from_args(changed)
        config.rope_scaling_factor = changed.rope_scaling_factor  # which Megatron 0.19 forgets to pass on
        config.transformer_layer_spec = partial(decoder_block, activation=record(identity_of(args)))
        model = GPTModelBuilder(config).build_model(
            ProcessGroupCollection.use_mpu_process_groups(), pre_process=True, post_process=True
        )
    model = model.to(torch.cuda.current_device()) if torch.cuda.is_available() else model
    wanted = {
        name: shard
        for name, shard in model.sharded_state_dict(metadata=common.get("content_metadata")).items()
        if not name.endswith("_extra_state")  # FP8 scales of TransformerEngine, of no use in fp32
    }
    _compare_names(source.path, {shard.key for shard in wanted.values()})
    model.load_state_dict(dist_checkpointing.load(wanted, str(source.path)), strict=False)
    return model.eval(), args


def load_hf(folder: str | Path) -> torch.nn.Module:
    """The transformers model of a Hugging Face folder, fp32, on the GPU if there is one.

    ValueError: a modeling file that is not ours; tensors missing, unexpected or of another shape. transformers itself
    only warns of the latter, and leaves what is missing uninitialised.
    """
    import transformers

    ours = is_ours(folder := Path(folder))
    if not ours and (folder / MODELING_FILE).is_file():
        raise ValueError(
            f"{folder / MODELING_FILE} is not what this version of megatron-xact writes (it was changed, or another "
            "version's), so it is not run: export the checkpoint again; if there is only this folder, make one of it "
            "with xact import --no-verify"
        )
    _quiet(transformers)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=ours
    )
    problems = {
        "lacks": info["missing_keys"],
        "has unexpected": info["unexpected_keys"],
        "has of another shape": [key[0] for key in info["mismatched_keys"]],
    }
    for what, names in problems.items():
        if names:
            raise ValueError(f"{folder} {what} {_few(names)}; the model would not be the one that was exported")
    return (model.to("cuda") if torch.cuda.is_available() else model).eval()


def tokenizer_files_of(source: Source, args: Namespace | None) -> TokenizerFiles:
    """The tokenizer that belongs to a checkpoint. ValueError: it is not there."""
    if source.kind == "huggingface":
        return tokenizer_files.of_folder(source.path)
    return tokenizer_files.of_checkpoint(args, source.path)


def load_tokenizer(folder: str | Path, plain: bool = False):
    """transformers' tokenizer of a local folder. ValueError if it has none.

    plain: what tokenizer.json says, even where transformers would choose another class for this type of model.
    """
    import transformers

    _quiet(transformers)
    folder = tokenizer_files.of_folder(Path(folder)).folder
    if plain:
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=is_ours(folder))


def _be_one_rank() -> None:
    """This process as a whole Megatron "cluster": the CPU platform where there is no GPU, and groups of one rank."""
    from megatron_xact.pretraining import cpu_platform

    if not torch.cuda.is_available():
        cpu_platform.activate()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if torch.distributed.get_world_size() != 1:
        raise ValueError("a checkpoint is read by a single process; do not start this with torchrun")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1)
        model_parallel_cuda_manual_seed(1)


def _compare_names(checkpoint: Path, needed: set[str]) -> None:
    """ValueError if the checkpoint lacks a tensor of the model, or has one that the model has no place for."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    there = {
        name
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(("embedding.", "decoder.", "output_layer."))
    }
    for what, names in (("lacks", needed - there), ("has unexpected", there - needed)):
        if names:
            raise ValueError(f"{checkpoint} {what} {_few(names)}; its own arguments describe another model")


def _few(names) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _quiet(transformers) -> None:
    """Nothing but errors: what transformers warns of on loading is checked here, and ends as an error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
