"""GGUF files that cannot be imported, damaged ones above all: each is refused in one line, within little memory."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flute import FluteError

pytest.importorskip("gguf")

from gguf_checkpoints import encode, make_gguf  # noqa: E402

from vllm_flute.checkpoint.sources import gguf as source  # noqa: E402
from vllm_flute.checkpoint.sources.gguf_file import GgufFile  # noqa: E402
from vllm_flute.checkpoint.sources.gguf_types import to_lut  # noqa: E402

# Counts and lengths beyond any file, and numbers that break sums.
_ABSURD = [struct.pack("<Q", value) for value in (0, 1 << 20, 1 << 40, 1 << 63, (1 << 64) - 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "gemma3", "architecture 'gemma3'.*reads GGUF files of 'llama'"),
        ("llama.expert_count", 8, "mixture of experts"),
        ("llama.attention.head_count", np.array([8, 4]), "llama.attention.head_count is .*the same for all layers"),
        ("llama.block_count", 1 << 30, "says that it has 1073741824 layers"),
        ("llama.embedding_length", "x", "llama.embedding_length is 'x', expected a whole number"),
        ("llama.feed_forward_length", 1024, r"ffn_gate.weight is Q4_0 \[512, 256\], expected \[1024, 256\]"),
        ("llama.rope.dimension_count", 16, "llama.rope.dimension_count is 16, expected 32"),
        ("llama.rope.scaling.type", "longrope", "both rope_freqs.weight and rope scaling 'longrope'"),
        ("llama.rope.freq_base", float("nan"), "llama.rope.freq_base is 'nan'"),
        ("llama.rope.freq_base", 10000.0, "rope_freqs.weight are not LLaMA 3.1's factors"),
    ],
)
def test_models_that_are_refused(model, monkeypatch, key, value, message):
    def read(path):
        file = GgufFile(path)
        file.metadata[key] = value
        return file

    monkeypatch.setattr(source, "GgufFile", read)
    with pytest.raises(FluteError, match=message):
        source.open_(model.path)


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}),
    ],
)
def test_rope_scaling_in_metadata(model, monkeypatch, kind, scaling):
    def read(path):
        file = GgufFile(path)
        del file.tensors["rope_freqs.weight"]
        extra = {"type": kind, "factor": 4.0, "original_context_length": 512}
        file.metadata |= {f"llama.rope.scaling.{key}": value for key, value in extra.items()}
        return file

    monkeypatch.setattr(source, "GgufFile", read)
    assert source.open_(model.path).config()["rope_scaling"] == scaling


def test_missing_and_unknown_tensors(model, monkeypatch):
    for change, message in (
        (lambda t: t.pop("blk.1.ffn_up.weight"), "lacks the tensor blk.1.ffn_up.weight"),
        (lambda t: t.update({"blk.0.attn_q.bias": t["blk.0.attn_norm.weight"]}), "attn_q.bias"),
    ):

        def read(path, change=change):
            file = GgufFile(path)
            change(file.tensors)
            return file

        monkeypatch.setattr(source, "GgufFile", read)
        with pytest.raises(FluteError, match=message):
            source.open_(model.path)


def test_codes_that_a_type_lacks_are_refused():
    rows = encode(np.ones((1, 256), np.float32), "TQ2_0")
    rows[0, 3] = 0xFF
    with pytest.raises(FluteError, match="x: it has the code 3"):
        to_lut(rows, "TQ2_0", "x")


def test_scales_that_are_not_finite_are_refused():
    rows = encode(np.ones((2, 64), np.float32), "Q4_0")
    rows[1, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(FluteError, match="x has values that are not finite"):
        to_lut(rows, "Q4_0", "x")


def _open(path):
    """Everything that an import does before and while it reads weights, for what fuzzing cannot make large."""
    opened = source.open_(path)
    opened.convert("model.layers.0.self_attn.q_proj")
    opened.tensor("model.norm.weight")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model without its tokenizer: its head is mostly what decides."""
    path = make_gguf(tmp_path_factory.mktemp("small"), tokenizer=False).path
    return path.read_bytes(), min(t.offset for t in GgufFile(path).tensors.values())


@settings(max_examples=150)
@given(data=st.data())
def test_any_damage_to_the_head_is_one_line(small, tmp_path_factory, data):
    """Bytes, and whole 64-bit counts, changed anywhere in the head: it opens or says what is wrong, nothing else."""
    content, head = bytearray(small[0]), small[1]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, head - 8))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from(_ABSURD)))
        content[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        _open(path)
    except FluteError as e:
        assert "\n" not in str(e) and "damaged.gguf" in str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20


@settings(max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_end_is_one_line(small, tmp_path_factory, share):
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(small[0][: int(share * len(small[0]))])
    with pytest.raises(FluteError, match=r"cut.gguf"):
        _open(path)


@settings(max_examples=150)
@given(data=st.data())
def test_metadata_of_any_other_type_is_one_line(model, tmp_path_factory, data):
    value = data.draw(
        st.one_of(
            st.integers(-1, 1 << 64), st.floats(), st.text(max_size=3), st.booleans(), st.lists(st.text(), max_size=3)
        )
        | st.lists(st.integers(-9, 9), max_size=3).map(np.array)
    )
    key = data.draw(st.sampled_from(sorted(GgufFile(model.path).metadata)))
    read = GgufFile(model.path)
    read.metadata[key] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "GgufFile", lambda path: read)
        try:
            opened = source.open_(model.path)
            opened.extra_files(tmp_path_factory.mktemp("metadata"))
        except FluteError as e:
            assert "\n" not in str(e) and "model.gguf" in str(e)


def test_other_versions_and_byte_orders(small, tmp_path):
    path = tmp_path / "model.gguf"
    for version, message in ((1, "version 1, this reads 2 and 3"), (3 << 24, "big-endian")):
        path.write_bytes(small[0][:4] + struct.pack("<I", version) + small[0][8:])
        with pytest.raises(FluteError, match=message):
            source.open_(path)
    path.write_bytes(b"PK" + small[0][2:])
    with pytest.raises(FluteError, match="is no GGUF file"):
        source.open_(path)


def test_a_directory_of_several_models(model, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(model.path)
    with pytest.raises(FluteError, match=r"holds 2 GGUF models \(a.gguf, b.gguf\): give the file"):
        source.open_(tmp_path)
