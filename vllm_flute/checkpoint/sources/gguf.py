"""GGUF models of LLaMA's, Qwen2's and Qwen3's architecture (llama.cpp's files)."""

import re
from pathlib import Path

import torch

from ...errors import FluteError
from ...quantization import quantize
from ..config import FUSED, LayerSpec
from ..output import write_json
from .base import Converted
from .gguf_config import ROPE_FREQS, expected_shapes, has_rotary_pairs, hf_name, model_config, rotary_rows, token_ids
from .gguf_file import GgufFile
from .gguf_tokenizer import check_tokenizer, write_tokenizer
from .gguf_types import FLOAT, TABLES, dequantize_rows, to_lut, widen
from .scales import ROUNDED

NAME = "gguf"
# What layers become that no table fits, with --allow-lossy.
_LOSSY = LayerSpec(4, 32)
_BLOCK_LINEAR = re.compile(r"(model\.layers\.\d+\.\w+\.)(\w+_proj)\.weight")


def detect(path: Path, config: dict) -> bool:
    if path.is_dir():
        return not config and any(path.glob("*.gguf"))
    if path.suffix == ".gguf":
        return True
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"GGUF"
    except OSError:
        return False


def open_(path: Path) -> "GgufSource":
    return GgufSource(path)


def _only_file(path: Path) -> Path:
    """The model in a directory of GGUF files; a split model counts as one."""
    models = [p for p in sorted(path.glob("*.gguf")) if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", p.name)]
    if len(models) != 1:
        names = ", ".join(p.name for p in models[:5]) or "parts of a split one without the first"
        raise FluteError(f"{path} holds {len(models)} GGUF models ({names}): give the file to import")
    return models[0]


class GgufSource:
    """A model in GGUF, as `Source`.

    Linear layers whose type is a table times a scale become lut-v1 as they are. The embedding, and a head of another
    type, are decoded to fp16. Layers of types that no table fits, and floating point ones in a fused layer with
    others, are quantized again: 4-bit NormalFloat in groups of 32 (16 beside such).

    Raises:
        FluteError: see `GgufFile`, `model_config` and `check_tokenizer`; tensors that are missing, not known or of
            other shapes.
    """

    kind = NAME

    def __init__(self, path: Path):
        self.path = path
        self.file = GgufFile(_only_file(path) if path.is_dir() else path)
        self.files, self.nbytes = self.file.files, self.file.nbytes
        self._config = model_config(self.file)
        self._check_shapes()
        self.stored = {hf_name(name): name for name in self.file.tensors if name != ROPE_FREQS}
        self.has_tokenizer = check_tokenizer(self.file, self._config["vocab_size"])
        self.specs: dict[str, LayerSpec] = {}
        self.lossy: dict[str, str] = {}
        self.affine: set[str] = set()
        self.notes: list[str] = [] if self.has_tokenizer else ["the file has no tokenizer"]
        self._plan()

    def _check_shapes(self) -> None:
        path, tensors = self.file.path, self.file.tensors
        expected = expected_shapes(self._config)
        for name, shape in expected.items():
            if name not in tensors:
                raise FluteError(f"{path} lacks the tensor {name}: it is no whole model; fetch it again")
            if tensors[name].shape != shape:
                raise FluteError(
                    f"{path}: {name} is {tensors[name].type} {list(tensors[name].shape)}, expected {list(shape)} "
                    "from its metadata"
                )
            if len(shape) == 1 and tensors[name].type not in FLOAT:
                raise FluteError(f"{path}: {name} is {tensors[name].type}, expected F32, F16 or BF16")
        if unknown := sorted(tensors.keys() - expected.keys() - {ROPE_FREQS}):
            raise FluteError(
                f"{path} has {len(unknown)} tensors that import does not know in a model of architecture "
                f"{self._config['model_type']!r} ({unknown[0]}): it would not be the same model without them"
            )

    def _type(self, name: str) -> str:
        """GGUF's type of a tensor by its Hugging Face name."""
        return self.file.tensors[self.stored[name]].type

    def _plan(self) -> None:
        """Decide what each linear layer becomes; layers that vLLM fuses agree in bits and group size."""
        done = set()
        for name in self.stored:
            found = _BLOCK_LINEAR.fullmatch(name)
            if not found or name in done:
                continue
            parts = next((group for group in FUSED if found[2] in group), (found[2],))
            names = [f"{found[1]}{part}.weight" for part in parts]
            done.update(names)
            types = {n: self._type(n) for n in names}
            if all(kind in FLOAT for kind in types.values()):
                continue
            # Wider codes and smaller groups say the same.
            needed = [TABLES[kind].spec if kind in TABLES else _LOSSY for kind in types.values()]
            spec = LayerSpec(max(s.bits for s in needed), min(s.group_size for s in needed))
            affine = any(kind in TABLES and TABLES[kind].affine for kind in types.values())
            for n, kind in types.items():
                self.specs[n.removesuffix(".weight")] = spec
                if affine:
                    self.affine.add(n.removesuffix(".weight"))
                if kind not in TABLES:
                    self.lossy[n.removesuffix(".weight")] = kind
        head = "lm_head.weight"
        if head in self.stored and self._type(head) in TABLES:
            self.specs["lm_head"] = TABLES[self._type(head)].spec
            if TABLES[self._type(head)].affine:
                self.affine.add("lm_head")
        rounded = [n for n in self.stored if self._rounded(n)]
        if rounded:
            kinds = ", ".join(f"{n} ({self._type(n)})" for n in rounded)
            self.notes.append(f"decoded to float16: {kinds}")

    def _rounded(self, name: str) -> bool:
        """Whether a plain tensor of the output is decoded from a quantized type."""
        return name.removesuffix(".weight") not in self.specs and self._type(name) not in FLOAT

    def config(self) -> dict:
        return dict(self._config)

    def tensors(self) -> list[str]:
        return list(self.stored)

    def quantized(self) -> dict[str, LayerSpec]:
        return dict(self.specs)

    def _rows(self, name: str) -> torch.Tensor | None:
        """Which stored rows are the rows of q or k, or None for other tensors."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        heads = heads if has_rotary_pairs(self._config) else None
        return rotary_rows(self.file.tensors[self.stored[name]].shape[0], self._config[heads]) if heads else None

    def convert(self, layer: str) -> Converted:
        name = f"{layer}.weight"
        kind, spec, rows = self._type(name), self.specs[layer], self._rows(name)
        if layer in self.lossy:
            weight = self.decoded(name, torch.float32)
            t = quantize(weight, *spec, "nf", torch.float16, name)
            lost = (t.dequantize() - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny)
            note = f"{kind} quantized again: relative error {lost:.2f}"
            return Converted(widen(t, spec, layer in self.affine), False, note)
        stored = self.file.rows(self.stored[name])
        t, exact = to_lut(stored if rows is None else stored[rows.numpy()], kind, name)
        return Converted(widen(t, spec, layer in self.affine), exact, "" if exact else f"{kind} {ROUNDED}")

    def decoded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any type by its Hugging Face name, plain, computed in fp32 and rounded once."""
        try:
            weight = dequantize_rows(self.file, self.stored[name], dtype)
        except NotImplementedError:
            raise FluteError(
                f"{self.file.path}: the installed gguf package cannot decode {name} ({self._type(name)}): upgrade gguf"
            ) from None
        if not torch.isfinite(weight).all():
            raise FluteError(f"{self.file.path}: {name} has values that are not finite in {dtype}: fetch it again")
        rows = self._rows(name)
        return weight if rows is None else weight[rows]

    def plain(self, layer: str, dtype: torch.dtype) -> torch.Tensor:
        return self.decoded(f"{layer}.weight", dtype)

    def tensor(self, name: str) -> torch.Tensor:
        return self.decoded(name, FLOAT.get(self._type(name), torch.float16))

    def extra_files(self, out: Path) -> None:
        if self.has_tokenizer:
            write_tokenizer(self.file, out, self._config["max_position_embeddings"])
        if ids := token_ids(self.file.metadata):
            write_json(out / "generation_config.json", ids)
