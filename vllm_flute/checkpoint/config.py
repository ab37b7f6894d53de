"""``quantization_config`` of a lut-v1 checkpoint: which layers are quantized, and how."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..codebook import check_bits
from ..errors import FluteError
from ..format import EXTENSIONS, FORMAT, QUANT_METHOD

# Weights of the linear layers of decoder blocks: LLaMA's and most others', StarCoder2's and Phi's, Mixtral's experts;
# routers (mlp.gate) and norms do not end so.
LINEAR = re.compile(r"model\.layers\.\d+\..+(_proj|\.c_fc|\.fc[12]|\.dense|\.experts\.\d+\.w[123])\.weight")
HEAD = "lm_head"

# Matrices that vLLM fuses into one layer: they must agree in bits, group size and in being quantized.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(\w+)")

_KEYS = ("quant_method", "format", "bits", "group_size", "codebook", "ignore", "overrides", "extensions")


class LayerSpec(NamedTuple):
    """How one layer is quantized."""

    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits} bits, group {self.group_size}"


def matches(entry: str, name: str) -> bool:
    """Whether an ``ignore`` entry names a module.

    An entry is a sequence of whole components found anywhere in the dotted name ("lm_head", "model.layers.0",
    "down_proj"), or, after "re:", a regular expression that matches the whole name.
    """
    if entry.startswith("re:"):
        return re.fullmatch(entry[3:], name) is not None
    return f".{entry}." in f".{name}."


def check_pattern(entry: str) -> str:
    """Return ``entry``; raise FluteError when it is empty or not a regular expression although it says so."""
    try:
        re.compile(entry.removeprefix("re:"))
    except re.error as e:
        if entry.startswith("re:"):
            raise FluteError(f"{entry!r} is not a regular expression: {e}") from None
    if not entry.strip("."):
        raise FluteError("an empty name in ignore or overrides matches nothing: remove it")
    return entry


def check_fused(specs: Mapping[str, LayerSpec | None]) -> None:
    """Raise FluteError when matrices that vLLM fuses differ; ``specs``: None for a linear that is not quantized.

    The experts of a mixture are one layer in vLLM too.
    """
    first: dict[tuple[str, ...], str] = {}
    for name in specs:
        if not (expert := _EXPERT.fullmatch(name)):
            continue
        other = first.setdefault(expert.groups(), name)
        if specs[name] != specs[other]:
            raise FluteError(
                f"vLLM makes all experts one layer, but {other} has {specs[other] or 'no quantization'} and {name} "
                f"{specs[name] or 'no quantization'}: quantize them alike, or ignore all of them"
            )
    for group in FUSED:
        for name in specs:
            parent, _, last = name.rpartition(".")
            if last != group[0]:
                continue
            names = [f"{parent}.{part}" for part in group]
            parts = {part: specs[part] for part in names if part in specs}
            if len(set(parts.values())) > 1:
                found = ", ".join(f"{part}: {spec or 'not quantized'}" for part, spec in parts.items())
                raise FluteError(f"vLLM fuses {found} into one layer: quantize them alike, or ignore all of them")


def fused_with(name: str) -> list[str]:
    """The other matrices that vLLM makes one layer with the linear of this name."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" for group in FUSED if last in group for part in group if part != last]


def _layer_spec(values: Mapping[str, Any], where: str) -> LayerSpec:
    for key in ("bits", "group_size"):
        if type(values.get(key)) is not int:
            raise FluteError(f"{where}: {key} is {values.get(key)!r}, expected a whole number; quantize again")
    bits, group_size = values["bits"], values["group_size"]
    try:
        check_bits(bits)
    except FluteError as e:
        raise FluteError(f"{where}: {e}") from None
    if group_size < 8 or group_size % 8:
        raise FluteError(f"{where}: unsupported group size {group_size} (supported: 16, 32, 64, 128, 256 and K itself)")
    return LayerSpec(bits, group_size)


@dataclass(frozen=True)
class LutConfig:
    """The parsed ``quantization_config``.

    Attributes:
        bits, group_size: of every quantized linear layer that has no override.
        codebook: the name of the table that was used; a label only, the tables are tensors of the checkpoint.
        ignore: modules that are not quantized (see `matches`).
        overrides: by exact module name.
        extensions: of format.EXTENSIONS, those that some layer has.
    """

    bits: int
    group_size: int
    codebook: str
    ignore: tuple[str, ...] = ()
    overrides: Mapping[str, LayerSpec] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "LutConfig":
        """Parse and check the dictionary of config.json.

        Raises FluteError for another method or format version, unknown keys and unsupported values.
        """
        where = "quantization_config"
        if not isinstance(d, Mapping):
            raise FluteError(f"{where} is {d!r}, expected an object; quantize again")
        if d.get("quant_method") != QUANT_METHOD:
            raise FluteError(f"{where}: quant_method is {d.get('quant_method')!r}, expected {QUANT_METHOD!r}")
        if d.get("format") != FORMAT:
            raise FluteError(
                f"{where}: unknown format {d.get('format')!r}, this version reads {FORMAT!r}; "
                "upgrade vllm-flute or quantize again"
            )
        if unknown := sorted(set(d) - set(_KEYS)):
            raise FluteError(f"{where}: unknown keys {', '.join(unknown)} (known: {', '.join(_KEYS)})")
        spec = _layer_spec(d, where)
        codebook, ignore, overrides = d.get("codebook", "custom"), d.get("ignore", []), d.get("overrides", {})
        if not isinstance(codebook, str):
            raise FluteError(f"{where}: codebook is {codebook!r}, expected a name")
        if not isinstance(ignore, list | tuple) or not all(isinstance(entry, str) for entry in ignore):
            raise FluteError(f"{where}: ignore is {ignore!r}, expected a list of module names")
        if not isinstance(overrides, Mapping):
            raise FluteError(f"{where}: overrides is {overrides!r}, expected an object by module name")
        for name, values in overrides.items():
            if not isinstance(values, Mapping) or set(values) - {"bits", "group_size"}:
                raise FluteError(
                    f"{where}: override of {name} is {values!r}, expected an object of bits and group_size only"
                )
        extensions = d.get("extensions", [])
        if not isinstance(extensions, list | tuple) or not set(map(str, extensions)) <= set(EXTENSIONS):
            raise FluteError(
                f"{where}: extensions is {extensions!r}, this version knows {', '.join(EXTENSIONS)}: upgrade vllm-flute"
            )
        default = spec._asdict()
        return cls(
            *spec,
            codebook,
            tuple(check_pattern(entry) for entry in ignore),
            {name: _layer_spec(default | values, f"{where}: override of {name}") for name, values in overrides.items()},
            tuple(extensions),
        )

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json; `from_dict` reads it back."""
        extensions = {"extensions": list(self.extensions)} if self.extensions else {}
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "bits": self.bits,
            "group_size": self.group_size,
            "codebook": self.codebook,
            "ignore": list(self.ignore),
            "overrides": {name: spec._asdict() for name, spec in self.overrides.items()},
        } | extensions

    def is_ignored(self, name: str) -> bool:
        """Whether the module of this dotted name is left unquantized."""
        return any(matches(entry, name) for entry in self.ignore)

    def layer(self, name: str) -> LayerSpec:
        """Bits and group size of the quantized layer of this exact name."""
        return self.overrides.get(name, LayerSpec(self.bits, self.group_size))


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of ``patterns`` that names the module, or None."""
    return next((entry for entry in patterns if matches(entry, name)), None)
