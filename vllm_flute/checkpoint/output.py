"""A checkpoint directory being written: atomic files, restartable, never loadable before it is complete."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import FluteError
from .reader import CONFIG, INDEX, outside, read_json

STATE = ".vllm-flute-progress.json"
CARD = "README.md"
_WRITER = "vllm-flute"

# Files beside the weights that a model needs as they are; more than this is no tokenizer or licence.
_COPY_LIMIT = 256 << 20
_NOT_COPIED = {CONFIG, INDEX, CARD, "pytorch_model.bin.index.json"}
# Settings of other quantization tools.
_NOT_COPIED |= {"quantize_config.json", "quant_config.json", "quantization_config.json", "flute_config.json"}
_NOT_COPIED |= {"hf_quant_config.json"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` if the block succeeds, durably and at once."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (SafetensorError, OSError) as e:
        raise FluteError(f"cannot write {path}: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes it private, which a server's user could not read


def copy_files(source: Path, out: Path) -> None:
    """Copy what a model has beside its weights and config.json: tokenizer, licence, generation settings.

    Raises FluteError for a link that leads out of the directory, which would copy somebody's private file.
    """
    for path in sorted(source.iterdir()):
        wanted = path.is_file() and path.suffix not in _WEIGHTS and path.name not in _NOT_COPIED
        if wanted and not path.name.startswith(".") and path.stat().st_size <= _COPY_LIMIT:
            if outside(path, source):
                raise FluteError(f"{path} is a link to {path.resolve()}, outside its model: put a copy there instead")
            with replacing(out / path.name) as temporary:
                shutil.copyfile(path, temporary)


class Output:
    """``with Output(out, fingerprint, overwrite) as output:`` continues an interrupted run of the same fingerprint.

    A state file beside the shards records the fingerprint and, for each complete shard, its tensors and a report.
    ``finish`` writes config.json and the index last, so that an unfinished directory loads nowhere.

    Args:
        path: made if it does not exist.
        fingerprint: identifies the source and the options; JSON.
        overwrite: start again where the directory holds another result of this tool, and replace files of the
            same names; files that this tool did not write are never removed.

    Raises:
        FluteError: the directory holds something else, or another process is writing it.
    """

    def __init__(self, path: str | Path, fingerprint: dict, overwrite: bool):
        self.path, self.fingerprint, self.overwrite = Path(path), fingerprint, overwrite
        self.shards: dict[str, dict] = {}
        self.fresh = False

    def __enter__(self) -> "Output":
        if self.path.exists() and not self.path.is_dir():
            raise FluteError(f"{self.path} is a file: choose another output directory")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin()
        except BlockingIOError:
            os.close(self.lock)
            raise FluteError(f"{self.path} is being written by another process: wait for it to end") from None
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def __exit__(self, *exc_info) -> None:
        os.close(self.lock)

    def _begin(self) -> None:
        state = read_json(self.path / STATE) if (self.path / STATE).exists() else {}
        # A process that was killed may leave its first temporary file.
        self.fresh = not {path.name for path in self.path.iterdir()} - {f".{STATE}.tmp"}
        if state.get("fingerprint") == self.fingerprint:
            self.shards = {n: s for n, s in state["shards"].items() if (self.path / n).exists()}
        elif not self.overwrite:
            if state:
                raise FluteError(
                    f"{self.path} holds an unfinished run with another source or other options: "
                    "give --overwrite or another output directory"
                )
            if not self.fresh:
                raise FluteError(f"{self.path} is not empty: give --overwrite or another output directory")
        else:
            self._clear(state)
        self._record()

    def _clear(self, state: dict) -> None:
        """Remove what an earlier run wrote, complete or not."""
        index = read_json(self.path / INDEX) if (self.path / INDEX).exists() else {}
        ours = set(state.get("shards", ()))
        if index.get("metadata", {}).get("written_by") == _WRITER:
            ours |= set(index["weight_map"].values())
        foreign = {path.name for path in self.path.iterdir() if path.suffix in _WEIGHTS} - ours
        if foreign:
            raise FluteError(
                f"{self.path} holds weights that vllm-flute did not write ({min(foreign)}): "
                "choose another output directory, or remove them yourself"
            )
        # config.json first: without it nothing loads the rest.
        for name in [CONFIG, INDEX, CARD, *sorted(ours)]:
            (self.path / name).unlink(missing_ok=True)
        for path in self.path.glob(".model-*.safetensors.tmp"):
            path.unlink()

    def _record(self) -> None:
        write_json(self.path / STATE, {"fingerprint": self.fingerprint, "shards": self.shards})

    def write_shard(self, name: str, tensors: dict[str, torch.Tensor], report: list) -> None:
        """Write one shard and note it as complete, with what there is to report about it (JSON)."""
        write_tensors(self.path / name, tensors)
        self.shards[name] = {"tensors": {key: t.nbytes for key, t in tensors.items()}, "report": report}
        self._record()

    def names(self, prefix: str = "") -> list[str]:
        """The tensors that are written whose names begin so."""
        return [key for shard in self.shards.values() for key in shard["tensors"] if key.startswith(prefix)]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that is written."""
        shard = next(file for file, shard in self.shards.items() if name in shard["tensors"])
        with safe_open(self.path / shard, "pt") as f:
            return f.get_tensor(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors written."""
        return sum(sum(shard["tensors"].values()) for shard in self.shards.values())

    def discard(self) -> None:
        """Remove everything, where this run found the directory empty; else leave it to a later run."""
        if self.fresh:
            for path in self.path.iterdir():
                path.unlink()
            self.path.rmdir()

    def finish(self, config: dict, card: str) -> None:
        """Write the card, the index and config.json; the files beside them are there already."""
        weight_map = {key: name for name, shard in self.shards.items() for key in shard["tensors"]}
        index = {
            "metadata": {"total_size": self.nbytes, "written_by": _WRITER},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_text(self.path / CARD, card)
        write_json(self.path / INDEX, index)
        write_json(self.path / CONFIG, config)
        (self.path / STATE).unlink()
        os.fsync(self.lock)


class Scratch(Output):
    """An output below another one that is done away with: what a run with other options left in it is removed whole."""

    def __init__(self, path: Path, fingerprint: dict):
        super().__init__(path, fingerprint, overwrite=True)

    def _clear(self, state: dict) -> None:
        for path in self.path.iterdir():
            path.unlink()
