"""A checkpoint in the Hugging Face layout, read one tensor at a time."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import FluteError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

# What a hub download takes: weights as safetensors, and every small text or tokenizer file beside them.
_HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.md",
    "*.py",
    "LICENSE*",
    "NOTICE*",
]

# Configurations and indexes of the largest models are a few MiB.
_JSON_LIMIT = 64 << 20
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class Header(NamedTuple):
    """One tensor's entry in a safetensors header; ``dtype`` in safetensors' spelling (BF16, U8, F32)."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * _BYTES.get(self.dtype, 1)


def read_json(path: Path) -> dict:
    """The JSON object in ``path``; raises FluteError when it is missing, is not one, or is absurdly large."""
    try:
        if (size := path.stat().st_size) > _JSON_LIMIT:
            raise FluteError(f"{path} has {size >> 20} MiB, expected JSON of at most {_JSON_LIMIT >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FluteError(f"{path} does not exist: give the directory of a Hugging Face checkpoint") from None
    except (ValueError, RecursionError) as e:
        raise FluteError(f"{path} is not valid JSON ({e}): fetch or write it again") from None
    if not isinstance(value, dict):
        raise FluteError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def outside(path: Path, directory: Path) -> bool:
    """Whether a file of a checkpoint's directory is a link that leads out of it (a hub cache keeps files in blobs/)."""
    directory = directory.resolve()
    roots = [directory, *([directory.parent.parent / "blobs"] if directory.parent.name == "snapshots" else [])]
    return not any(path.resolve().is_relative_to(root) for root in roots)


def resolve(source: str | Path) -> Path:
    """The local directory of a checkpoint: ``source`` itself, or the snapshot of a hub id (downloaded if needed).

    HF_HUB_OFFLINE and the other settings of huggingface_hub apply.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise FluteError(f"{path} is a file: give the directory that holds config.json")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", str(source)):
        raise FluteError(f"{source} does not exist, and is not the id of a model on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_HUB_FILES))
    except Exception as e:  # the hub client raises its own, httpx's and requests' types
        reason = " ".join(str(e).split()).split(". ")[0]
        raise FluteError(
            f"{source} is not a directory here, and the hub did not give it ({type(e).__name__}: {reason})"
        ) from None


def _weight_files(path: Path) -> dict[str, str] | list[str]:
    """The index's weight map, or the single file."""
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FluteError(f"{path / INDEX} has no weight_map: fetch or write it again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
                raise FluteError(
                    f"{path / INDEX} lists {name} in {file!r}, expected a .safetensors file beside it: fetch or write "
                    "it again"
                )
        return weight_map
    if (path / SINGLE).exists():
        return [SINGLE]
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise FluteError(
            f"{path} has PyTorch pickles but no {SINGLE}: convert it first "
            "(transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT))"
        )
    raise FluteError(f"{path} has neither {SINGLE} nor {INDEX}: it is not a complete checkpoint")


class Checkpoint:
    """An opened checkpoint: ``config`` (config.json) and ``headers`` of all tensors by name; no weights in memory.

    Args:
        source: a directory, or a hub id.

    Raises:
        FluteError: missing, truncated or corrupt files, and tensors that the index lists but no shard has.
    """

    def __init__(self, source: str | Path):
        self.source = str(source)
        self.path = resolve(source)
        self.config = read_json(self.path / CONFIG)
        listed = _weight_files(self.path)
        self.files = sorted(set(listed.values() if isinstance(listed, dict) else listed))
        self.headers = {}
        stored = {file: self._read_headers(file) for file in self.files}
        for headers in stored.values():  # tensors that the index forgot are loaded by vLLM too
            self.headers |= headers
        for name, file in listed.items() if isinstance(listed, dict) else ():
            if name not in stored[file]:
                raise FluteError(
                    f"{self.path / file} lacks the tensor {name} that {INDEX} lists in it: fetch or write both again"
                )
            self.headers[name] = stored[file][name]

    def _read_headers(self, file: str) -> dict[str, Header]:
        path = self.path / file
        if not path.exists():
            raise FluteError(f"{path} is missing although {INDEX} lists it: fetch it, or write the checkpoint again")
        try:
            with safe_open(path, "pt") as f:
                names = f.keys()
                slices = {name: f.get_slice(name) for name in names}
                return {n: Header(file, s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        except (SafetensorError, OSError) as e:
            raise FluteError(f"{path} is truncated or not a safetensors file ({e}): fetch or write it again") from None

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        The file is opened for each, because an open file keeps every page that was read in the resident set.
        """
        path = self.path / self.headers[name].file
        try:
            with safe_open(path, "pt") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise FluteError(f"{path}: cannot read {name} ({e}): fetch or write it again") from None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(h.nbytes for h in self.headers.values())

    @property
    def tied_head(self) -> bool:
        """Whether the output head is the embedding; a config.json that does not say is read by what is stored."""
        return bool(self.config.get("tie_word_embeddings", "lm_head.weight" not in self.headers))
