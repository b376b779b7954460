"""Makes the files of this folder with llama.cpp: models with random weights, and the logits that llama.cpp computes.

  mistral.gguf       one layer whose matrices are of nine types, F32 to Q6_K, as llama.cpp quantised them
  mixtral-f32.gguf   two layers, four experts, two a token
  mixtral-q8_0.gguf  the same, quantised
  logits.npz         of each, float32 [T, V], all positions of the ids `prompt`; keys and values are cached in float32.
                     NAME: as llama.cpp computes with the file, which rounds activations where weights are quantised;
                     NAME-exact: after it has dequantised the file, so that it rounds nothing

In an environment of its own, with the source of llama.cpp for its converter (llama-cpp-python's sdist has it):

  pip install llama-cpp-python==0.3.36 torch transformers sentencepiece protobuf gguf
  python make.py vendor/llama.cpp
"""

from __future__ import annotations

import ctypes
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import sentencepiece
import torch
from gguf import GGMLQuantizationType
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

HERE = Path(__file__).parent
VOCABULARY = 288  # 256 bytes, three controls, 27 letters, two pairs
PROMPT = np.random.default_rng(1).integers(3, VOCABULARY, 24).tolist()
TYPES = {
    "token_embd": GGMLQuantizationType.BF16,
    "attn_q": GGMLQuantizationType.Q4_0,
    "attn_k": GGMLQuantizationType.F32,
    "attn_v": GGMLQuantizationType.F16,
    "attn_output": GGMLQuantizationType.Q4_1,
    "ffn_gate": GGMLQuantizationType.Q4_K,
    "ffn_up": GGMLQuantizationType.Q5_K,
    "ffn_down": GGMLQuantizationType.Q6_K,
    "output": GGMLQuantizationType.Q8_0,
}
SENTENCES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]


def mistral() -> PreTrainedModel:
    """Rows of 256, as the K-quants need them."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 1, "head_dim": 64, "sliding_window": None, "max_position_embeddings": 512}
    return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, **sizes, **rest, **_common(1e4)))


def mixtral() -> PreTrainedModel:
    """Small enough for float32."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **rest, **experts, **_common(1e6)))


def _common(theta: float) -> dict:
    return {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def randomise(model: PreTrainedModel) -> None:
    """By fan-in, so that every part shows in the logits; norm scales near 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim == 1:
                values.uniform_(0.5, 1.5)
            else:
                values.normal_(std=1.0 if "embed" in name else values.shape[-1] ** -0.5)


def tokenizer() -> bytes:
    """A SentencePiece model of that many pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 50),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def convert(model: PreTrainedModel, llama: Path, out: Path) -> None:
    """Through transformers' folder and llama.cpp's converter, in float32."""
    randomise(model)
    folder = out.with_suffix("")
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer())
    command = [sys.executable, str(llama / "convert_hf_to_gguf.py"), str(folder), "--outtype", "f32"]
    subprocess.run([*command, "--model-name", out.stem, "--outfile", str(out)], check=True)


def quantise(source: Path, target: Path, kind: int, types: dict[str, int]) -> None:
    """To one of llama.cpp's LLAMA_FTYPE_*, except for tensors of the given types."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure, params.allow_requantize = kind, 1, True, True
    params.token_embedding_type = types.get("token_embd", params.token_embedding_type)
    params.output_tensor_type = types.get("output", params.output_tensor_type)
    overrides = (llama_cpp.llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for override, (name, each) in zip(overrides, types.items(), strict=False):
        override.pattern, override.type = rf"\.{name}\.".encode(), each
    params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit(f"llama.cpp did not quantise {source}")


def logits(path: Path) -> np.ndarray:
    """llama.cpp's, on a CPU, of every position of the prompt."""
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        flash_attn=False,
        type_k=GGMLQuantizationType.F32,
        type_v=GGMLQuantizationType.F32,
        verbose=False,
    )
    model.eval(PROMPT)
    return np.array(model.scores[: len(PROMPT)], np.float32)


def exact_logits(path: Path) -> np.ndarray:
    """The logits of the same weights in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole.gguf"
        quantise(path, whole, llama_cpp.LLAMA_FTYPE_ALL_F32, {})
        return logits(whole)


def main(llama: Path) -> None:
    """Writes the files."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "mistral.gguf"
        convert(mistral(), llama, whole)
        quantise(whole, HERE / "mistral.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, TYPES)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "mixtral.gguf"
        convert(mixtral(), llama, whole)
        (HERE / "mixtral-f32.gguf").write_bytes(whole.read_bytes())
        quantise(whole, HERE / "mixtral-q8_0.gguf", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, {})
    found = {"prompt": np.array(PROMPT)}
    for name in ("mistral", "mixtral-f32", "mixtral-q8_0"):
        found[name] = logits(HERE / f"{name}.gguf")
        found[f"{name}-exact"] = exact_logits(HERE / f"{name}.gguf")
    np.savez_compressed(HERE / "logits.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
