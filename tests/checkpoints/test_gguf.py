"""Models in llama.cpp's files: against llama.cpp's logits and the gguf package's reader, and damaged in every way."""

from __future__ import annotations

import dataclasses
import random
import shutil
import struct
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from oracles import smollm

import mixtral_jax as mj
from mixtral_jax.checkpoints.archive import Part
from mixtral_jax.checkpoints.gguf import notes, open_files, open_gguf, read_config
from mixtral_jax.checkpoints.gguf_file import GGUFFile
from mixtral_jax.config import ModelConfig, MoEConfig, model_config
from mixtral_jax.errors import InputError

FOLDER = Path(__file__).parent / "gguf"
MISTRAL, MIXTRAL = FOLDER / "mistral.gguf", FOLDER / "mixtral-f32.gguf"
NINE = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"}


def bits(array: np.ndarray) -> np.ndarray:
    """The bytes, by which NaN is equal to itself, and 0 is not to -0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# Values


def test_every_value_is_as_the_gguf_package_has_it():
    file, theirs = GGUFFile(MISTRAL), gguf.GGUFReader(MISTRAL)
    assert {entry.dtype for entry in file.entries.values()} == NINE
    assert list(file.entries) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry, array = file.entries[tensor.name], file.read(tensor.name)
        assert entry.shape == tuple(tensor.shape.tolist())[::-1] == array.shape
        assert entry.dtype == tensor.tensor_type.name
        wanted = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(entry.dtype, np.float32)
        assert array.dtype == wanted
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(bits(array.astype(np.float32)), bits(expected))


@pytest.mark.parametrize("path", [MISTRAL, FOLDER / "mixtral-q8_0.gguf"], ids=lambda path: path.stem)
@pytest.mark.parametrize("count", [2, 4, 32])
def test_parts_make_up_the_whole(path: Path, count: int):
    file = GGUFFile(path)
    for name, entry in file.entries.items():
        if int(np.prod(entry.shape[:-1] or entry.shape)) % count == 0:
            parts = [file.read(name, Part(index, count)) for index in range(count)]
            np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(file.read(name)))


def test_a_part_of_stacked_experts_is_an_expert():
    file = GGUFFile(MIXTRAL)
    name = "blk.1.ffn_down_exps.weight"
    assert file.entries[name].shape == (4, 64, 32)
    stack = file.read(name).reshape(4, 64, 32)
    np.testing.assert_array_equal(file.read(name, Part(2, 4)), stack[2])


def test_a_large_matrix_is_read_in_runs(tmp_path: Path):
    """1.2 million values, in runs of 131,072, which end within a row."""
    code = gguf.GGMLQuantizationType.Q4_1
    blocks = gguf.quants.quantize(np.random.default_rng(0).standard_normal((2000, 608), np.float32), code)
    file = GGUFFile(write(tmp_path / "x.gguf", {}, {"small": (blocks[:1], code), "large": (blocks, code)}))
    expected = gguf.quants.dequantize(blocks, code)
    np.testing.assert_array_equal(file.read("large"), expected)
    np.testing.assert_array_equal(file.read("large", Part(1, 2)), expected[1000:])


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_part_of_a_quantised_vector_may_begin_within_a_block(tmp_path: Path, kind: str):
    """48 of 96 values are a block of 32 and a half; two vectors, so that the second's place shows too."""
    code, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    blocks = {name: gguf.quants.quantize(rng.standard_normal((1, 96), np.float32), code)[0] for name in "ab"}
    file = GGUFFile(write(tmp_path / "x.gguf", {}, {name: (data, code) for name, data in blocks.items()}))
    for name, data in blocks.items():
        halves = [file.read(name, Part(0, 2)), file.read(name, Part(1, 2))]
        np.testing.assert_array_equal(np.concatenate(halves), gguf.quants.dequantize(data[None], code)[0])


def test_all_types_that_the_package_dequantises_are_read(tmp_path: Path):
    """Random bytes as scales give NaN and infinities, which are passed on, without a warning."""
    rng, tensors = np.random.default_rng(0), {}
    for code in sorted(gguf.quants._type_traits):
        size = gguf.GGML_QUANT_SIZES[code][1]
        tensors[code.name] = (rng.integers(0, 256, (3, 2 * size), np.uint8), code)
    file = GGUFFile(write(tmp_path / "x.gguf", {}, tensors))
    assert len(tensors) > 20
    for name, (data, code) in tensors.items():
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(data, code)
        np.testing.assert_array_equal(bits(file.read(name).astype(np.float32)), bits(expected), name)


@pytest.mark.parametrize("path", [MISTRAL, MIXTRAL], ids=lambda path: path.stem)
def test_the_metadata_are_as_the_gguf_package_has_them(path: Path):
    theirs = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert GGUFFile(path).fields == {name: value for name, value in theirs.items() if not name.startswith("GGUF.")}


# Logits


@pytest.mark.parametrize("name", ["mistral", "mixtral-f32", "mixtral-q8_0"])
def test_logits_are_those_of_llama_cpp(name: str):
    """Of the dequantised weights to rounding (2e-6 measured); llama.cpp's own rounding of activations makes 1.2%."""
    wanted = np.load(FOLDER / "logits.npz")
    model = mj.load(FOLDER / f"{name}.gguf", dtype="float32")
    logits_TV = np.asarray(model.logits(wanted["prompt"][None])[0])
    exact_TV, rounded_TV = wanted[f"{name}-exact"], wanted[name]
    assert np.abs(logits_TV - exact_TV).max() < 2e-5 * exact_TV.std()
    assert np.sqrt(np.mean((logits_TV - rounded_TV) ** 2)) < 0.02 * rounded_TV.std()


def test_experts_apart_are_the_same_model(tmp_path: Path):
    """As llama.cpp's converter wrote them until April 2024: ffn_gate.2.weight in place of ffn_gate_exps.weight."""
    file, tensors = GGUFFile(MIXTRAL), {}
    for name, entry in file.entries.items():
        values = file.read(name).reshape(entry.shape)
        parts = enumerate(values) if "_exps" in name else [(None, values)]
        tensors |= {name.replace("_exps", f".{index}"): (each, None) for index, each in parts}
    old = mj.load(write(tmp_path / "old.gguf", file.fields, tensors), dtype="float32")
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(old.logits(tokens), mj.load(MIXTRAL, dtype="float32").logits(tokens))


# Configs


def test_the_config_of_a_mixtral():
    file = GGUFFile(MIXTRAL)
    assert read_config(file.fields, file.entries) == ModelConfig(
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_dim=32,
        vocab_size=288,
        rope_theta=1e6,
        norm_eps=1e-5,
        max_position=512,
        moe=MoEConfig(num_experts=4, experts_per_token=2),
    )


def test_the_config_of_smollm2():
    source = open_gguf(smollm.PATH)
    assert source.form == "GGUF, 1 file"
    assert source.notes == []
    assert source.config.tie_embeddings
    assert (source.config.rope_theta, source.config.norm_eps, source.config.head_dim) == (1e5, 1e-5, 64)
    assert source.problems() == []


@pytest.mark.parametrize(
    ("without", "key", "value"),
    [
        ("attention.head_count_kv", "num_kv_heads", 4),
        ("rope.freq_base", "rope_theta", 1e4),
        ("attention.key_length attention.value_length", "head_dim", 16),
        ("attention.key_length attention.value_length rope.dimension_count", "head_dim", 16),
    ],
)
def test_what_a_key_means_that_is_missing(without: str, key: str, value: float):
    file = GGUFFile(MIXTRAL)
    left = {name: each for name, each in file.fields.items() if name.removeprefix("llama.") not in without.split()}
    assert getattr(read_config(left, file.entries), key) == value


@pytest.mark.parametrize(("value", "window"), [(4096, 4096), (0, None)])
def test_a_window_is_taken_where_the_file_has_one(value: int, window: int | None):
    file = GGUFFile(MISTRAL)
    fields = file.fields | {"llama.attention.sliding_window": value}
    assert read_config(fields, file.entries).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen3"}, r"mistral\.gguf: general\.architecture = 'qwen3': only llama"),
        ({"general.architecture": None}, r"mistral\.gguf: general\.architecture: only llama"),
        ({"llama.block_count": None}, r"mistral\.gguf: llama\.block_count: the key is missing"),
        ({"llama.context_length": None}, r"llama\.context_length: the key is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, r"llama\.attention\.layer_norm_rms_epsilon: the key is"),
        ({"llama.attention.head_count": "4"}, r"llama\.attention\.head_count = '4': a whole number"),
        ({"llama.attention.head_count": 0}, r"mistral\.gguf: llama\.attention\.head_count = 0: a number above zero"),
        ({"llama.attention.head_count_kv": [1, 1]}, r"head_count_kv = \[1, 1\]: a whole number"),
        ({"llama.attention.head_count_kv": 3}, r"mistral\.gguf: llama\.attention\.head_count_kv = 3: must divide"),
        ({"llama.rope.freq_base": True}, r"llama\.rope\.freq_base = True: a number"),
        ({"llama.rope.freq_base": float("nan")}, r"llama\.rope\.freq_base = nan"),
        ({"llama.block_count": 2}, r"llama\.block_count = 2: there is no tensor blk\.1\.attn_norm"),
        ({"llama.block_count": 2**32 - 1}, r"llama\.block_count = 4294967295: there is no tensor"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, r"llama\.expert_count = 8: .* is missing"),
        ({"llama.expert_count": 8}, r"llama\.expert_used_count: the key is missing"),
        ({"llama.rope.dimension_count": 32}, r"llama\.rope\.dimension_count = 32: only the size of a key, 64"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type = 'yarn': only none"),
        ({"llama.rope.scaling.type": 3}, r"llama\.rope\.scaling\.type = 3: a string"),
        ({"llama.rope.scaling.factor": 4.0}, r"llama\.rope\.scaling\.factor = 4\.0: positions that are scaled"),
        ({"llama.rope.scale_linear": 2.0}, r"llama\.rope\.scale_linear = 2\.0: positions that are scaled"),
        ({"llama.logit_scale": 0.5}, r"llama\.logit_scale = 0\.5: what it asks for"),
    ],
)
def test_metadata_that_make_no_model_are_refused(changes: dict, message: str):
    file = GGUFFile(MISTRAL)
    fields = {key: value for key, value in (file.fields | changes).items() if value is not None}
    with pytest.raises(InputError, match=message):
        read_config(fields, file.entries)


@pytest.mark.parametrize(
    "harmless",
    [
        {"rope.scaling.type": "none", "rope.scaling.factor": 8.0},
        {"rope.scaling.factor": 1.0},
        {"rope.scale_linear": 0.0},
    ],
)
def test_a_scaling_that_changes_nothing_is_taken(harmless: dict):
    file = GGUFFile(MISTRAL)
    fields = file.fields | {f"llama.{key}": value for key, value in harmless.items()}
    assert read_config(fields, file.entries) == read_config(file.fields, file.entries)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rope_freqs.weight", "tensor rope_freqs.weight: positions that are scaled"),
        ("blk.0.attn_q.bias", "tensor blk.0.attn_q.bias: biases"),
    ],
)
def test_tensors_that_ask_for_more_are_refused(name: str, message: str):
    file = GGUFFile(MISTRAL)
    with pytest.raises(InputError, match=message):
        read_config(file.fields, file.entries | {name: file.entries["output_norm.weight"]})


def test_a_vocabulary_alone_is_refused(tmp_path: Path):
    path = write(tmp_path / "vocabulary.gguf", GGUFFile(MISTRAL).fields, {})
    with pytest.raises(InputError, match=r"no matrix token_embd\.weight"):
        open_gguf(path)


def test_the_tokenizer_is_the_files_own_or_none(tmp_path: Path):
    fields = GGUFFile(MIXTRAL).fields
    tensors = tensors_of(MIXTRAL)
    assert open_gguf(MIXTRAL).tokenizer().vocab_size == 288
    without = write(tmp_path / "without.gguf", fields | {"tokenizer.ggml.model": "no_vocab"}, tensors)
    assert open_gguf(without).tokenizer() is None
    damaged = write(tmp_path / "damaged.gguf", fields | {"tokenizer.ggml.bos_token_id": 500}, tensors)
    with pytest.raises(InputError, match=r"damaged\.gguf: tokenizer\.ggml\.bos_token_id = 500"):
        open_gguf(damaged).tokenizer()


def test_a_mistral_v01_is_told_by_its_shape():
    """Fine-tunes have more tokens; v0.2 has another theta; a window that is in the file needs no word."""
    windowed = model_config("mistral-7b-v0.1")
    config = dataclasses.replace(windowed, sliding_window=None, vocab_size=32002)
    (note,) = notes({}, config)
    assert "4096" in note
    assert notes({"llama.attention.sliding_window": 4096}, windowed) == []
    for name in ("mistral-7b-v0.2", "mistral-7b-v0.3", "mixtral-8x7b", "tiny-mistral"):
        assert notes({}, model_config(name)) == []


# Split models


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """The Mixtral in five files."""
    write(tmp_path / "m.gguf", GGUFFile(MIXTRAL).fields, tensors_of(MIXTRAL), split_max_tensors=5)
    return sorted(tmp_path.glob("m-*-of-00005.gguf"))


def test_a_split_model_is_opened_by_its_first_file(split: list[Path]):
    file, (fields, archive) = GGUFFile(MIXTRAL), open_files(split[0])
    assert open_gguf(split[0]).form == "GGUF, 5 files"
    assert archive.entries.keys() == file.entries.keys()
    assert read_config(fields, archive.entries) == read_config(file.fields, file.entries)
    for name in file.entries:
        np.testing.assert_array_equal(archive.read(name), file.read(name))


def test_split_models_that_are_not_whole_are_refused(split: list[Path], tmp_path: Path):
    with pytest.raises(InputError, match=r"00002-of-00005\.gguf: one of 5 files: give the first"):
        open_gguf(split[1])
    with pytest.raises(InputError, match=r"other\.gguf: one of 5 files: give the first .* NAME-00001-of-00005\.gguf"):
        open_gguf(shutil.copy(split[0], tmp_path / "other.gguf"))
    shutil.copy(split[3], split[2])
    with pytest.raises(InputError, match=r"00003-of-00005\.gguf: split\.no 2 and split\.count 5 are wanted"):
        open_gguf(split[0])
    split[2].unlink()
    with pytest.raises(InputError, match=r"00003-of-00005\.gguf: can't be read"):
        open_gguf(split[0])


# Damage


def test_without_the_gguf_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"mistral\.gguf: reading it needs gguf: pip install 'mixtral-jax\[gguf\]'"):
        GGUFFile(MISTRAL)


def after(name: str, dimensions: int) -> int:
    """Where in the Mistral's file a tensor's type stands; its offset follows."""
    return MISTRAL.read_bytes().index(name.encode()) + len(name) + 4 + 8 * dimensions


def value_of(key: str) -> int:
    """Where the type of a key's value stands."""
    return MISTRAL.read_bytes().index(key.encode()) + len(key)


U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
DAMAGE = {
    "empty": (0, None, "not a GGUF file: it begins with b''"),
    "another format": (0, b"PK\3\4", "not a GGUF file: it begins with"),
    "version 1": (4, U32.pack(1), "GGUF version 1; 2 and 3 can be read"),
    "big-endian": (4, b"\0\0\0\3", "big-endian"),
    "count of tensors": (
        8,
        U64.pack(2**62),
        "4,611,686,018,427,387,904 tensors and 25 keys would go beyond the file's end",
    ),
    "count of keys": (16, U64.pack(2**63), "would go beyond the file's end"),
    "a few more keys": (16, U64.pack(60), "truncated or damaged|type|twice|UTF-8"),
    "length of a key": (24, U64.pack(2**40), "a key would go beyond the file's end"),
    "length of a value": (value_of("general.type") + 4, U64.pack(2**63), "general.type would go beyond the file's end"),
    "type of a value": (value_of("general.type"), U32.pack(13), "general.type has values of type 13"),
    "length of a list": (value_of("tokenizer.ggml.tokens") + 8, U64.pack(2**60), "strings of tokenizer.ggml.tokens"),
    "length of numbers": (value_of("tokenizer.ggml.scores") + 8, U64.pack(2**61), "tokenizer.ggml.scores would go"),
    "list of lists": (value_of("tokenizer.ggml.scores") + 4, U32.pack(9), "tokenizer.ggml.scores has values of type 9"),
    "key in no encoding": (value_of("general.name") - 1, b"\xff", "a key at byte .* is not UTF-8"),
    "value in no encoding": (value_of("general.type") + 12, b"\xff", "general.type at byte .* is not UTF-8"),
    "tensor twice": (after("blk.0.attn_k.weight", 2) - 20 - 8, b"v", "has the tensor blk.0.attn_v.weight twice"),
    "unknown type": (after("blk.0.attn_k.weight", 2), U32.pack(99), "blk.0.attn_k.weight has type 99; .*Q4_K.* can be"),
    "integers": (after("blk.0.attn_k.weight", 2), U32.pack(26), "blk.0.attn_k.weight has type I32"),
    "another type": (after("blk.0.attn_k.weight", 2), U32.pack(1), "tensor blk.0.attn_norm.weight begins at byte"),
    "dimensions": (after("blk.0.attn_k.weight", 0) - 4, U32.pack(5), "blk.0.attn_k.weight has 5 dimensions"),
    "no dimension": (after("blk.0.attn_k.weight", 0) - 4, U32.pack(0), "blk.0.attn_k.weight has 0 dimensions"),
    "an empty one": (after("blk.0.attn_k.weight", 1), U64.pack(0), r"blk.0.attn_k.weight has shape \[0, 256\]"),
    "a huge one": (after("blk.0.attn_k.weight", 1), U64.pack(2**63), "blk.0.attn_k.weight ends at byte"),
    "rows of no blocks": (after("blk.0.attn_q.weight", 0), U64.pack(31), r"shape \[256, 31\]; rows of Q4_0 are mult"),
    "offset": (after("blk.0.attn_k.weight", 2) + 4, U64.pack(2**63), "blk.0.attn_k.weight begins at byte"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path: Path, what: str):
    place, patch, message = DAMAGE[what]
    data = MISTRAL.read_bytes()
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"" if patch is None else data[:place] + patch + data[place + len(patch) :])
    with pytest.raises(InputError, match=rf"damaged\.gguf: .*({message})"):
        GGUFFile(path)


def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path):
    path = write(tmp_path / "x.gguf", {"general.alignment": 48}, {})
    with pytest.raises(InputError, match=r"general\.alignment is 48; a power of two"):
        GGUFFile(path)


def test_another_alignment_is_kept_to(tmp_path: Path):
    tensors = {name: (np.arange(5, dtype=np.float32) + place, None) for place, name in enumerate("abc")}
    file = GGUFFile(write(tmp_path / "x.gguf", {"general.alignment": 256}, tensors))
    for name, (values, _) in tensors.items():
        np.testing.assert_array_equal(file.read(name), values)


def test_a_file_that_ends_anywhere_is_refused(tmp_path: Path):
    data, path = MISTRAL.read_bytes(), tmp_path / "cut.gguf"
    cuts = random.Random(0).sample(range(len(data) - 64), 300)
    for cut in sorted([*range(64), *cuts], reverse=True):
        path.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"cut\.gguf: (truncated|not a GGUF)"):
            GGUFFile(path)


def test_a_header_with_any_byte_changed_is_read_or_refused(tmp_path: Path):
    """Never another exception, nor a wait: lengths and counts are held against the file's before they are used."""
    data, path, rng = bytearray(MISTRAL.read_bytes()), tmp_path / "flipped.gguf", random.Random(0)
    header = after("blk.0.ffn_up.weight", 2) + 12
    for place in rng.sample(range(header), 1000):
        old, data[place] = data[place], rng.randrange(256)
        path.write_bytes(data)
        data[place] = old
        try:
            file = GGUFFile(path)
            read_config(file.fields, file.entries)
        except InputError as error:
            assert "flipped.gguf" in str(error)  # noqa: PT017


@pytest.mark.parametrize("what", ["folder", "nothing"])
def test_what_is_no_file_is_refused(tmp_path: Path, what: str):
    path = tmp_path if what == "folder" else tmp_path / "none.gguf"
    with pytest.raises(InputError, match="can't be read"):
        GGUFFile(path)


def tensors_of(path: Path) -> dict:
    """A file's tensors, for `write`."""
    file = GGUFFile(path)
    return {name: (file.read(name).reshape(entry.shape), None) for name, entry in file.entries.items()}


def write(path: Path, fields: dict, tensors: dict, **options: int) -> Path:
    """A file of the gguf package's writer; tensors: values, or bytes with a quantised type."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, value in fields.items():
        if key == "general.alignment":
            writer.add_uint32(key, value)
            writer.data_alignment = value if value & (value - 1) == 0 else 32
        elif key != "general.architecture":
            writer.add_key_value(key, value, *_types(value))
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _types(value: object) -> list[gguf.GGUFValueType]:
    if isinstance(value, list):
        return [gguf.GGUFValueType.ARRAY, *_types(value[0])]
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return [gguf.GGUFValueType.UINT32 if is_count else gguf.GGUFValueType.get_type(value)]
