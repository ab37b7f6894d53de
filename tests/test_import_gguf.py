"""GGUF models become lut-v1: types, LLaMA's configuration, the tokenizer."""

import json

import numpy as np
import pytest
import torch
from checkpoints import CHAT_TEMPLATE, VOCABULARY, llama_config, tensors_like
from hypothesis import given, settings
from hypothesis import strategies as st
from source_checkpoints import HIDDEN, INTERMEDIATE, LAYERS

from vllm_flute import FluteError, lut_linear
from vllm_flute.checkpoint import Checkpoint, check_checkpoint, dequantize_checkpoint, import_checkpoint

gguf = pytest.importorskip("gguf")

from gguf_checkpoints import SPECIAL_IDS, decode, encode, gguf_name, make_gguf  # noqa: E402

from vllm_flute.checkpoint.sources import gguf as source  # noqa: E402
from vllm_flute.checkpoint.sources.gguf_file import GgufFile  # noqa: E402
from vllm_flute.checkpoint.sources.gguf_tokenizer import check_tokenizer, write_tokenizer  # noqa: E402
from vllm_flute.checkpoint.sources.gguf_types import TABLES, dequantize_rows, to_lut  # noqa: E402

EXACT = ("Q4_0", "Q4_1", "IQ4_NL", "MXFP4", "TQ1_0", "TQ2_0")
ROUNDED = ("IQ4_XS", "Q4_K", "Q3_K", "Q2_K")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("gguf"))


# Types


def test_every_table_is_tested():
    assert {*EXACT, *ROUNDED} == TABLES.keys()


@settings(max_examples=20)
@given(kind=st.sampled_from(EXACT + ROUNDED), n=st.integers(1, 9), blocks=st.integers(1, 9), seed=st.integers(0, 99))
def test_types_are_the_packages_weights(kind, n, blocks, seed):
    """Bit by bit where scales have 16 bits; else within the rounding of a scale and of an offset."""
    k = blocks * 256
    weight = np.random.default_rng(seed).normal(0, 0.02, (n, k)).astype(np.float32)
    rows = encode(weight, kind)
    t, exact = to_lut(rows, kind, "x")
    expected = torch.from_numpy(decode(rows, kind))
    assert (t.bits, t.group_size, t.shape) == (*TABLES[kind].spec, (n, k))
    # A few scales of a type that rounds them may happen to be 16-bit numbers.
    assert (t.offsets is not None) == TABLES[kind].affine and (exact or kind in ROUNDED)
    if exact:
        assert torch.equal(t.dequantize(), expected)
    else:
        groups = expected.view(n, -1, t.group_size)
        # Of an affine group the code's part and the offset can both be larger than what they add up to.
        size = groups.abs().amax(-1, keepdim=True) + (
            0 if t.offsets is None else 2 * t.offsets.float().abs()[..., None]
        )
        assert ((t.dequantize().view(groups.shape) - groups).abs() <= 2**-11 * size).all()


def test_negative_scales_reach_the_kernels(model):
    """GGUF's Q4_0 gives the largest weight the code 0, so half of the scales are negative."""
    t = source.open_(model.path).convert("model.layers.0.mlp.up_proj").lut
    assert (t.scales < 0).any()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        for tokens in (1, 32):
            x = torch.randn(tokens, t.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            exact = x.float() @ t.dequantize().T
            assert (lut_linear(x, t).float() - exact).abs().max() <= tolerance * exact.abs().max()


# Whole models


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "TQ2_0", "IQ4_XS"])
def test_a_model_keeps_its_weights(tmp_path, kind):
    made = make_gguf(tmp_path / "in", kind, {"embed": "Q8_0", "lm_head": "Q6_K"})
    report = import_checkpoint(made.path, tmp_path / "out")
    exact = kind in EXACT
    assert report.kind == "gguf" and len(report.layers) == 14 and all(r.exact == exact for r in report.layers)
    assert report.notes == ["decoded to float16: model.embed_tokens.weight (Q8_0), lm_head.weight (Q6_K)"]
    assert len(check_checkpoint(tmp_path / "out")) == 14
    plain = Checkpoint(dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32"))
    assert plain.headers.keys() == made.weights.keys()
    for name, weight in made.weights.items():
        expected = weight if "_proj" in name or weight.dim() == 1 else weight.half().float()
        lost = (plain.tensor(name) - expected).abs().max()
        assert lost == 0 if exact or "_proj" not in name else lost <= 2**-10 * expected.abs().max(), name


def test_configuration_and_tokenizer_are_the_originals(model, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    out = tmp_path / "out"
    import_checkpoint(model.path, out)
    config = json.loads((out / "config.json").read_text())
    original = llama_config(HIDDEN, INTERMEDIATE, LAYERS, torch.bfloat16)
    original["eos_token_id"] = [SPECIAL_IDS["<|eot_id|>"], SPECIAL_IDS["<|end_of_text|>"]]
    assert {key: value for key, value in config.items() if key != "quantization_config"} == original
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == original["eos_token_id"]
    assert AutoConfig.from_pretrained(out).model_type == "llama"

    made, saved = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(model.path.parent / "tokenizer")
    assert len(made) == VOCABULARY and made.chat_template == CHAT_TEMPLATE
    assert (made.bos_token, made.eos_token) == (saved.bos_token, saved.eos_token)
    chat = [{"role": "user", "content": "don't  panic"}]
    for text in ("hello there, naïve 日本 42!\n\n", made.apply_chat_template(chat, tokenize=False)):
        assert made(text)["input_ids"] == saved(text)["input_ids"] and made.decode(made(text)["input_ids"][1:]) == text


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_other_architectures(tmp_path, architecture):
    """Biases, norms of heads, and rows of q and k in their order: the logits are those of the weights in the file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = make_gguf(tmp_path / "in", types={"embed": "F32", "lm_head": "F32"}, architecture=architecture)
    report = import_checkpoint(made.path, tmp_path / "out")
    assert len(report.layers) == 14 and all(r.exact for r in report.layers) and not report.notes
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], LAYERS)
    for name in made.weights:
        assert names.get_name(name, (".weight", ".bias")) == gguf_name(name)
    check_checkpoint(tmp_path / "out")
    plain = dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32")
    _, config = tensors_like(architecture, HIDDEN, INTERMEDIATE, LAYERS, torch.float32)
    original = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    keys = original.load_state_dict(made.weights, strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) <= {"lm_head.weight"}
    tokens = torch.arange(40).unsqueeze(0) * 7 % 900
    with torch.inference_mode():
        expected = original.float().eval()(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tied_head_and_a_quantized_one(tmp_path):
    tied = import_checkpoint(make_gguf(tmp_path / "tied", tied=True).path, tmp_path / "a")
    assert "lm_head" in tied.config.ignore and Checkpoint(tmp_path / "a").tied_head
    import_checkpoint(make_gguf(tmp_path / "own", types={"lm_head": "Q4_0"}).path, tmp_path / "b")
    assert "lm_head" in {info.name for info in check_checkpoint(tmp_path / "b")}


def test_types_mixed_in_a_fused_layer_agree(tmp_path):
    """Ternary codes beside 4-bit ones widen, and layers beside affine ones have offsets of 0: exact all the same."""
    types = {"q_proj": "TQ2_0", "v_proj": "Q4_1", "layers.0.mlp.(gate|up)": "F16", "down_proj": "TQ1_0"}
    made = make_gguf(tmp_path / "in", types=types)
    report = import_checkpoint(made.path, tmp_path / "out")
    layers = {r.name: r for r in report.layers}
    assert all("offsets" in layers[f"model.layers.0.self_attn.{p}_proj"].extensions for p in "qkv")
    assert (layers["model.layers.1.mlp.down_proj"].bits, layers["model.layers.1.mlp.down_proj"].group_size) == (2, 256)
    assert len(layers) == 12 and all(r.exact for r in report.layers)
    plain = Checkpoint(dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32"))
    for name, weight in made.weights.items():
        assert torch.equal(plain.tensor(name), weight), name


def test_other_types_need_allow_lossy(tmp_path):
    made = make_gguf(tmp_path / "in", types={"v_proj": "Q6_K", "down_proj": "Q8_0"})
    with pytest.raises(FluteError, match=r"4 linear layers .*Q6_K, Q8_0.*--allow-lossy.*--ignore"):
        import_checkpoint(made.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = import_checkpoint(made.path, tmp_path / "out", allow_lossy=True)
    lossy = [r for r in report.layers if not r.exact]
    assert len(lossy) == 4 and all("quantized again: relative error 0." in r.note for r in lossy)
    plain = Checkpoint(dequantize_checkpoint(tmp_path / "out", tmp_path / "plain", dtype="float32"))
    for layer in report.layers:
        weight = made.weights[f"{layer.name}.weight"].view(layer.n, -1, 32)
        lost = (plain.tensor(f"{layer.name}.weight").view(weight.shape) - weight).square().mean(-1).sqrt()
        # The scales of least squares do no worse than those whose largest entry meets a group's largest weight: half of
        # NormalFloat's widest gap (1 - 0.696) of that, and the rounding of the scale.
        assert (lost <= (0 if layer.exact else 0.153) * weight.abs().amax(-1)).all()


def test_layers_that_no_table_fits_can_stay_plain(tmp_path):
    made = make_gguf(tmp_path / "in", types={"down_proj": "Q6_K"})
    import_checkpoint(made.path, tmp_path / "out", ignore=["down_proj"])
    out = Checkpoint(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(out.tensor(name), made.weights[name].to(torch.bfloat16))
    assert len(check_checkpoint(tmp_path / "out")) == 12


def test_a_split_model_is_read_as_one(model, tmp_path):
    """As llama-gguf-split leaves it: metadata in the first part, some tensors in each."""
    whole = gguf.GGUFReader(model.path)
    for i in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-{i + 1:05d}-of-00002.gguf", "llama")
        for field in whole.fields.values() if i == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        for t in whole.tensors[i::2]:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    report = import_checkpoint(tmp_path, tmp_path / "out")  # a directory that holds one model
    assert len(report.layers) == 14 and all(r.exact for r in report.layers)
    layer = source.open_(tmp_path / "m-00002-of-00002.gguf").convert("model.layers.1.self_attn.k_proj").lut
    assert torch.equal(layer.dequantize(), model.weights["model.layers.1.self_attn.k_proj.weight"])
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(FluteError, match="m-00001-of-00002.gguf is missing"):
        source.open_(tmp_path / "m-00002-of-00002.gguf")


def test_decoding_by_parts_is_decoding(model, monkeypatch):
    monkeypatch.setattr("vllm_flute.checkpoint.sources.gguf_types._CHUNK_WEIGHTS", 3 * HIDDEN)
    t = dequantize_rows(GgufFile(model.path), "blk.0.ffn_up.weight", torch.float32)
    assert torch.equal(t, model.weights["model.layers.0.mlp.up_proj.weight"])


# Tokenizers


def _metadata(tmp_path, fill) -> GgufFile:
    """A file of metadata alone."""
    writer = gguf.GGUFWriter(tmp_path / "vocabulary.gguf", "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return GgufFile(tmp_path / "vocabulary.gguf")


def test_sentencepiece_is_sentencepieces(tmp_path):
    """LLaMA 2's kind, against the sentencepiece package on a vocabulary that it trains here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import AutoTokenizer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat and the dog ran after the cat, then they ate\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",  # as in LLaMA 2
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "m.model"))
    size = pieces.get_piece_size()
    kinds = [
        6 if pieces.is_byte(i) else 3 if pieces.is_control(i) else 2 if pieces.is_unknown(i) else 1 for i in range(size)
    ]

    def fill(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(i) for i in range(size)])
        writer.add_token_scores([pieces.get_score(i) for i in range(size)])
        writer.add_token_types(kinds)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    file = _metadata(tmp_path, fill)
    assert check_tokenizer(file, size)
    write_tokenizer(file, tmp_path / "out", 64)
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the cat sat", "  two  spaces and catmat", "naïve 日本 \n x"):
        assert made(text)["input_ids"] == [1, *pieces.encode(text)]
        assert made.decode(made(text)["input_ids"], skip_special_tokens=True) == text


def test_how_text_is_split_depends_on_its_name(model, tmp_path):
    """LLaMA 3 puts its begin token in front and takes digits by threes, SmolLM takes them one by one."""
    from transformers import AutoTokenizer

    meta = GgufFile(model.path).metadata
    found = {}
    for pre in ("llama-bpe", "smollm", "qwen2", "tekken", "gpt-2"):
        file = GgufFile(model.path)
        del file.metadata["tokenizer.ggml.add_bos_token"]
        file.metadata["tokenizer.ggml.pre"] = pre
        # One more word, made by no merge, and digits that merge.
        tokens = meta["tokenizer.ggml.tokens"]
        file.metadata["tokenizer.ggml.tokens"] = [*tokens[:-4], "12", "123", "1234", "Ġqqqq"]
        file.metadata["tokenizer.ggml.token_type"] = np.array([1] * (len(tokens) - 66) + [3] * 62 + [1] * 4)
        file.metadata["tokenizer.ggml.merges"] = ["1 2", "12 3", "123 4", *meta["tokenizer.ggml.merges"]]
        assert check_tokenizer(file, VOCABULARY)
        write_tokenizer(file, tmp_path / pre, 64)
        found[pre] = AutoTokenizer.from_pretrained(tmp_path / pre).tokenize("a1234 qqqq", add_special_tokens=True)
    assert found["llama-bpe"] == ["<|begin_of_text|>", "a", "123", "4", "Ġqqqq"]
    assert found["tekken"] == ["<|begin_of_text|>", "a", "1", "2", "3", "4", "Ġqqqq"]
    assert found["smollm"] == found["qwen2"] == ["a", "1", "2", "3", "4", "Ġq", "qq", "q"]
    assert found["gpt-2"] == ["a", "1234", "Ġq", "qq", "q"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "bert", "tokenizer of kind 'bert'"),
        ("pre", "default", "pre-tokenizer 'default'.*known: llama-bpe"),
        ("tokens", ["a", "a"], "different tokens"),
        ("tokens", [str(i) for i in range(VOCABULARY + 1)], f"at most {VOCABULARY} different"),
        ("token_type", np.ones(3), "token_type has not one number"),
        ("merges", ["ab"], "no list of pairs"),
        ("bos_token_id", VOCABULARY, f"bos_token_id is {VOCABULARY}, beyond"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(model, key, value, message):
    file = GgufFile(model.path)
    file.metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(FluteError, match=message):
        check_tokenizer(file, VOCABULARY)


def test_merges_of_unknown_tokens_are_one_line(model, tmp_path):
    file = GgufFile(model.path)
    file.metadata["tokenizer.ggml.merges"] = ["nothing such"]
    with pytest.raises(FluteError, match=r"model.gguf: its vocabulary makes no tokenizer"):
        write_tokenizer(file, tmp_path / "out", 64)


def test_qwens_tokenizer_is_transformers_own(model, tmp_path):
    """Text in Unicode's decomposed form too."""
    from transformers import AutoTokenizer, Qwen2Tokenizer

    file = GgufFile(model.path)
    meta = file.metadata
    meta["tokenizer.ggml.pre"], meta["tokenizer.ggml.add_bos_token"] = "qwen2", False
    assert check_tokenizer(file, VOCABULARY)
    write_tokenizer(file, tmp_path / "out", 64)
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    vocabulary = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    own = Qwen2Tokenizer(vocabulary, [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]])
    for text in ("don't  panic 1234\n\n", "cafe\u0301 naïve 日本 qqqq", " x"):
        assert made(text)["input_ids"] == own(text)["input_ids"]
    assert made("e\u0301")["input_ids"] == made("\u00e9")["input_ids"]
