"""A run as a TOML file: Megatron's arguments in a few named tables, the activation, and what is ours.

    base = "llama.toml"              # inherited, relative to this file; tables merge key by key, later wins

    [model]                          # and others, see TABLES
    num-layers = 24                  # any Megatron argument, without the dashes; the tables only group
    disable-bias-linear = true       # a flag: true puts it on the command line, false leaves it out

    [activation]
    name = "xielu"                   # `xact doctor` lists the names; see ActivationConfig
    alpha_p = 0.8                    # effective initial value of a parameter of that activation

    [xact]                           # see XactConfig
    guard-interval = 100

    [launch]                         # see LaunchConfig; and [fp8], [deepspeed]
    hang-timeout = 1800

Instead of passing unknown or ill-typed keys on, every key is checked against Megatron's own parser; errors
say where it stands. Paths inside the tables are relative to the current directory, as for Megatron.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from megatron_xact import activations
from megatron_xact.activations import Activation
from megatron_xact.kernels import backends, fp8_product, linear, mlp_choice
from megatron_xact.pretraining import arguments, resume, signals
from megatron_xact.pretraining.arguments import Value

TABLES = ("model", "parallel", "data", "optimizer", "schedule", "checkpoint", "logging", "runtime")
Tables = dict[str, dict[str, object]]
Layer = tuple[Path | str, Tables]
"""Tables and where they are from, for messages: a file, whose table is named too, or what is to be said as it is."""


@dataclass(frozen=True)
class ActivationConfig:
    """[activation]. Every other key of the table is a parameter's effective initial value."""

    name: str
    init: dict[str, float] = field(default_factory=dict)
    """Effective initial values that differ from the record's, e.g. {"alpha_p": 0.8}."""
    trainable: tuple[str, ...] | None = None
    """Names of all the parameters that are learned; None: the record's own choice."""
    eps: float = 0.0
    """Bit-parity with implementations that clamp the negative branch at min(x, eps), e.g. -1e-6; 0: exact."""
    lr_mult: float = 1.0
    """Multiplier of the run's learning rate for the activation's parameters."""
    weight_decay: float = 0.0
    """Multiplier of the run's weight decay for the activation's parameters; 0: none."""

    def record(self) -> Activation:
        """The activation this table describes. ValueError: unknown name or parameter, impossible value."""
        return activations.get(self.name, trainable=self.trainable, eps=self.eps, **self.init)

    def identity(self) -> dict[str, object]:
        """What a checkpoint says about its activation."""
        return resume.identity(self.record())


@dataclass(frozen=True)
class XactConfig:
    """[xact]."""

    guard_interval: int = 100
    """Steps between comparisons of replicated parameters over the tensor-parallel ranks; 0: off."""
    telemetry_interval: int = 10
    """Steps between records of every layer's activation parameters; 0: off."""
    sample_tokens: int = 0
    """Tokens of text to generate when training ends, as a first look at the model; 0: none."""
    sample_prompt: str = "The "
    """What the sample continues."""
    kernels: str = "auto"
    """What computes activations: "auto" (the fastest there is), "triton" (that or an error), "reference" (torch)."""
    mlp: str = "unfused"
    """Activations inside the MLP's GEMMs: "triton" or "quack", "auto" (where measured to be faster), or "unfused".

    Not "auto" by default as long as the fused kernels have not run on a GPU. "fp8": the MLP's GEMMs in FP8, see [fp8].
    """
    engine: str = "megatron"
    """What shards optimizer states and parameters over data-parallel ranks: "megatron", or "deepspeed" (its ZeRO)."""
    loader: str = "megatron"
    """What fetches batches: "megatron" (its own loader) or "dali" (NVIDIA's); the same batches in the same order."""
    statistics_interval: int = 100
    """Steps between measurements of every layer's pre- and post-activations: sparsity, outliers; 0: off."""
    keep_checkpoints: int = 0
    """Newest checkpoints to keep; older ones are deleted once a newer one is complete; 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are never deleted, e.g. to branch cooldowns from; 0: none."""
    checksums: bool = True
    """Whether a saved checkpoint gets a checksum of every file, and a loaded one is compared with them."""


@dataclass(frozen=True)
class LaunchConfig:
    """[launch]: what ends, restarts or stops a run."""

    signal: str = "SIGUSR1"
    """The scheduler's warning before preemption or the wall-time limit: save, ask for a requeue, end. As SIGTERM."""
    hang_timeout: int = 1800
    """Seconds without a completed step after which a run counts as hung; 0: never."""
    max_restarts: int = 3
    """Restarts, or requeues after a failure, without a new checkpoint in between before the run is given up."""
    on_failure: str = "restart"
    """A killed rank, a lost node, a hang: "restart" from the last complete checkpoint, or "stop"."""
    on_nan: str = "stop"
    """A loss that is NaN or infinite: "stop", or "restart" from the last complete checkpoint."""


@dataclass(frozen=True)
class FP8Config:
    """[fp8]: experimental, whether by Megatron's fp8-format (TransformerEngine) or by mlp = "fp8" in [xact]."""

    enabled: bool = True
    """false: none of it, whatever the config asks for. The same run in BF16, for a pair or as a way out."""
    smooth: bool = False
    """With mlp = "fp8": one factor per channel before the cast of fc2's input, and its inverse in fc2's weight."""
    gradients: str = "e4m3"
    """With mlp = "fp8": "e4m3", or "e5m2" with a bit less of precision for 2^16 times the range."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """[deepspeed], with engine = "deepspeed" in [xact]."""

    zero_stage: int = 1
    """What the data-parallel ranks share out: 1 optimizer states, 2 and gradients, 3 and parameters."""
    offload_optimizer: bool = False
    """Whether optimizer states and fp32 masters live in host memory, and AdamW runs there."""
    offload_parameters: bool = False
    """Whether parameters live there too between their uses; stage 3 only."""


@dataclass(frozen=True)
class BranchConfig:
    """[branch], as `--branch-from` writes it: a run that leaves another one, its trunk, for a cooldown of its own."""

    trunk: str = ""
    """The trunk's folder; "": this run is no branch."""
    step: int = 0
    """The trunk's checkpoint that it starts from."""
    data_steps: int = 0
    """The trunk's train-iters: Megatron shuffles for as many steps as a run has; a branch keeps the trunk's order."""

    @property
    def start(self) -> tuple[Path, int] | None:
        """Folder and step of the checkpoint where a branch that has none of its own begins."""
        return (Path(self.trunk), self.step) if self.trunk else None


OURS = {"xact": XactConfig, "launch": LaunchConfig, "fp8": FP8Config, "deepspeed": DeepSpeedConfig,
        "branch": BranchConfig}  # fmt: skip
CHOICES = {
    "kernels": backends.CHOICES,
    "mlp": mlp_choice.CHOICES,
    "engine": ("megatron", "deepspeed"),
    "loader": ("megatron", "dali"),
    "signal": signals.CHOICES,
    "on_failure": ("restart", "stop"),
    "on_nan": ("restart", "stop"),
    "gradients": tuple(fp8_product.GRADIENTS),
    "zero_stage": (1, 2, 3),
}
# Megatron's sharding of the optimizer, which one config may ask for while engine = "deepspeed" puts ZeRO in its place.
ZERO_INSTEAD = ("use-distributed-optimizer", "overlap-grad-reduce", "overlap-param-gather")
# What Megatron asks TransformerEngine for, left out where [fp8] is not enabled.
FP8_PREFIXES = ("fp8-", "reuse-grad-buf-for-mxfp8-param-ag")
# Steps; Megatron 0.19.2 divides by its own, and has no default.
EVAL_INTERVAL = 1000
Setting = bool | int | str


@dataclass(frozen=True)
class RunConfig:
    """A resolved config: bases merged, every key known, every value of its type, the activation possible."""

    megatron: dict[str, Value]
    """Megatron's arguments by their names with hyphens, in the order they were first given."""
    activation: ActivationConfig
    xact: XactConfig
    launch: LaunchConfig = LaunchConfig()
    fp8: FP8Config = FP8Config()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    branch: BranchConfig = BranchConfig()
    source: Path | None = field(default=None, compare=False)
    tables: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Which table each Megatron argument stands in; grouping only, no meaning."""

    def arguments(self) -> list[str]:
        """Megatron's command line; with --swiglu if gated: Megatron sizes fc1 and counts FLOPs by it."""
        left_out = ZERO_INSTEAD if self.xact.engine == "deepspeed" else ()
        left_out += () if self.fp8.enabled else FP8_PREFIXES
        words = arguments.command_line({k: v for k, v in self.megatron.items() if not k.startswith(left_out)})
        if "eval-interval" not in self.megatron:
            words += ["--eval-interval", str(EVAL_INTERVAL)]
        if self.xact.loader == "dali":
            words += ["--dataloader-type", "external"]
        no_mask = "no-create-attention-mask-in-dataloader"
        if no_mask not in self.megatron and not self.megatron.get("reset-attention-mask"):
            # attention is causal without; Megatron's default hands [b, 1, s, s] to every rank with every micro-batch
            words += [f"--{no_mask}"]
        return words + (["--swiglu"] if self.activation.record().gated else [])

    @property
    def mlp(self) -> str:
        """`mlp` in [xact]; "unfused" in the place of an "fp8" that [fp8] switches off."""
        return self.xact.mlp if self.fp8.enabled or self.xact.mlp != mlp_choice.FP8 else linear.UNFUSED

    @property
    def asks_for_fp8(self) -> bool:
        return self.fp8.enabled and (self.xact.mlp == mlp_choice.FP8 or bool(self.megatron.get("fp8-format")))

    def with_overrides(self, words: Sequence[str] = (), sets: Sequence[str] = ()) -> RunConfig:
        """This config with `sets` ("table.key=value", in TOML), then Megatron flags (`words`), over it."""
        layers: list[Layer] = [(f"--set {text}", _read_set(text)) for text in sets]
        for key, value in arguments.read_tokens(words).items():
            layers.append(("command line", {self.tables.get(key, "runtime"): {key: value}}))
        return self.with_layers(layers)

    def with_layers(self, layers: Iterable[Layer]) -> RunConfig:
        """This config with others over it, the last one on top."""
        return _resolve([(self.source or "", self._as_tables()), *layers], self.source)

    def dump(self) -> str:
        """TOML that loads to an equal config, with no base."""
        parts = []
        for table, entries in self._as_tables().items():
            lines = [f"{_toml_key(key)} = {_toml(value)}" for key, value in entries.items()]
            parts.append("\n".join([f"[{table}]", *lines]) + "\n")
        return "\n".join(parts)

    def _as_tables(self) -> Tables:
        tables: Tables = {name: {} for name in TABLES}
        for key, value in self.megatron.items():
            tables[self.tables.get(key, "runtime")][key] = value
        a = self.activation
        activation = {"name": a.name, **a.init, "eps": a.eps, "lr-mult": a.lr_mult, "weight-decay": a.weight_decay}
        if a.trainable is not None:
            activation["trainable"] = list(a.trainable)
        meant = {"deepspeed": self.xact.engine == "deepspeed", "branch": bool(self.branch.trunk)}
        meant["fp8"] = self.asks_for_fp8 or self.fp8 != FP8Config()
        ours = {table: _hyphenated(getattr(self, table)) for table in OURS if meant.get(table, True)}
        return {name: t for name, t in tables.items() if t} | {"activation": activation} | ours


def load(path: str | Path) -> RunConfig:
    """Reads and checks a config and its bases. FileNotFoundError, or ValueError naming key and place."""
    path = Path(path)
    return _resolve(_read(path, ()), path)


def load_activation(path: str | Path) -> ActivationConfig:
    """[activation] of a config and its bases, without asking Megatron's parser, which takes seconds, about the rest."""
    entries: dict[str, object] = {}
    place = str(path)
    for file, tables in _read(Path(path), ()):
        if "activation" in tables:
            place = f"{file} [activation]"
            entries = _merge_activation(entries, tables["activation"], place)
    return _activation(entries, place)


def _read(path: Path, above: tuple[Path, ...]) -> list[tuple[Path, Tables]]:
    """The file's tables, after those of its bases. `above`: the files that led here."""
    if path.resolve() in (p.resolve() for p in above):
        raise ValueError(f"base goes in a circle: {' -> '.join(map(str, (*above, path)))}")
    if not path.is_file():
        hint = f" (base of {above[-1]})" if above else ""
        raise FileNotFoundError(f"no such config file: {path}{hint}")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    base = tables.pop("base", None)
    if base is None:
        return [(path, tables)]
    if not isinstance(base, str):
        raise ValueError(f"base = {base!r} ({path}): expected a file name, relative to this file")
    return [*_read(path.parent / base, (*above, path)), (path, tables)]


def _resolve(layers: Iterable[Layer], source: Path | None) -> RunConfig:
    """Merges layers, earliest first, checking every key."""
    megatron: dict[str, Value] = {}
    homes: dict[str, str] = {}
    activation: dict[str, object] = {}
    activation_place = str(source)  # of the layer that had the last word
    ours: dict[str, dict[str, Setting]] = {table: {} for table in OURS}
    for where, tables in layers:
        seen: dict[str, str] = {}
        for table, entries in tables.items():
            if not isinstance(entries, dict):
                raise ValueError(f"{table} = {entries!r} ({where}) stands in no table; put it into e.g. [model]")
            place = f"{where} [{table}]" if isinstance(where, Path) else where
            if table == "activation":
                activation, activation_place = _merge_activation(activation, entries, place), place
            elif table in OURS:
                ours[table] |= _check_ours(OURS[table], entries, place)
            elif table in TABLES:
                for key, value in entries.items():
                    name, value = _check_argument(key, value, place)
                    if name in seen:
                        raise ValueError(f"{key} is given twice in {where}: in [{seen[name]}] and in [{table}]")
                    seen[name] = table
                    megatron[name] = value
                    homes[name] = table
            else:
                known = ", ".join(f"[{t}]" for t in (*TABLES, "activation", *OURS))
                raise ValueError(f"unknown table [{table}] ({where}); the tables are {known}")
        _drop_other_data(megatron, seen)
    settings = {table: OURS[table](**entries) for table, entries in ours.items()}
    return RunConfig(megatron, _activation(activation, activation_place), **settings, source=source, tables=homes)


def _drop_other_data(megatron: dict[str, Value], seen: dict[str, str]) -> None:
    """Data that a later layer names replace mock data, and the other way round: Megatron refuses both together."""
    if megatron.get("mock-data") and "mock-data" in seen:
        replaced = [name for name in arguments.DATA_PATHS if name not in seen]
    elif any(name in seen for name in arguments.DATA_PATHS):
        replaced = ["mock-data"]
    else:
        replaced = []
    for name in replaced:
        megatron.pop(name, None)


def _check_argument(key: str, value: object, place: str) -> tuple[str, Value]:
    try:
        flag, negated = arguments.find(key)
    except ValueError as error:
        raise ValueError(f"{error} ({place})") from None
    try:
        value = flag.check(value)
    except ValueError as error:
        raise ValueError(f"{key} = {value!r} ({place}): {error}") from None
    return flag.name, not value if negated else value


def _merge_activation(inherited: dict, entries: dict, place: str) -> dict:
    """Key by key; but when the name changes, parameters do not carry over (lr-mult and weight-decay do)."""
    entries = {key.replace("-", "_"): value for key, value in entries.items()}
    kinds = {"name": (str, "a string"), "trainable": (list, "a list of parameter names")}
    for key, value in entries.items():
        kind, words = kinds.get(key, (int | float, "a number"))
        if not isinstance(value, kind) or isinstance(value, bool):
            _refuse_unknown(key, place)
            raise ValueError(f"{key} = {value!r} ({place}): expected {words}")
        if key in ("lr_mult", "weight_decay") and not 0 <= value < math.inf:
            raise ValueError(f"{key} = {value!r} ({place}): a multiplier must be finite and not negative")
    if "trainable" in entries and not all(isinstance(name, str) for name in entries["trainable"]):
        raise ValueError(f"trainable = {entries['trainable']!r} ({place}): expected a list of parameter names")
    if "name" in entries and entries["name"] != inherited.get("name"):
        try:
            activations.get(entries["name"])
        except ValueError as error:
            raise ValueError(f"{error} ({place})") from None
        inherited = {key: inherited[key] for key in ("lr_mult", "weight_decay") if key in inherited}
    return inherited | entries


def _refuse_unknown(key: str, place: str) -> None:
    """ValueError if no activation has such a key in its table."""
    known = {f.name for f in fields(ActivationConfig)} - {"init"}
    known |= {q.name for name in activations.names() for q in activations.get(name).parameters}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise ValueError(f"unknown key {key!r} ({place}); nearest: {near[0]!r}")


def _activation(entries: dict[str, object], where: str) -> ActivationConfig:
    settings = {f.name for f in fields(ActivationConfig)} - {"init"}
    given = {key: value for key, value in entries.items() if key in settings}
    if "name" not in given:
        raise ValueError(f'no activation ({where}): add a table [activation] with e.g. name = "xielu"')
    if "trainable" in given:
        given["trainable"] = tuple(given["trainable"])
    init = {key: value for key, value in entries.items() if key not in settings}
    config = ActivationConfig(init=init, **given)
    try:
        record = config.record()
    except ValueError as error:
        raise ValueError(f"{error} ({where})") from None
    return ActivationConfig(init=init, **(given | {"name": record.name}))


def _check_ours(kind: type, entries: dict, place: str) -> dict[str, Setting]:
    """The entries of one of our own tables, by field name; a field's default tells its type."""
    checked = {}
    types = {f.name: type(f.default) for f in fields(kind)}
    expected = {str: "a string", int: "a whole number, 0 for none", bool: "true or false"}
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in types:
            known = ", ".join(n.replace("_", "-") for n in types)
            raise ValueError(f"unknown key {key!r} ({place}); it has {known}")
        if type(value) is not types[name] or (types[name] is int and value < 0):
            raise ValueError(f"{key} = {value!r} ({place}): expected {expected[types[name]]}")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{key} = {value!r} ({place}): expected {' or '.join(map(repr, CHOICES[name]))}")
        checked[name] = value
    return checked


def _hyphenated(settings: XactConfig | LaunchConfig | FP8Config | DeepSpeedConfig | BranchConfig) -> dict[str, Setting]:
    return {f.name.replace("_", "-"): getattr(settings, f.name) for f in fields(settings)}


def _read_set(text: str) -> Tables:
    path, equals, value = text.partition("=")
    table, dot, key = path.strip().partition(".")
    if not (equals and dot and key):
        raise ValueError(f"--set {text}: expected table.key=value, e.g. --set activation.name=xielu")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word: the quotes that TOML wants rarely survive a shell
    return {table: {key: parsed}}


def _toml_key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else json.dumps(key)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
