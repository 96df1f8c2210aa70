"""Writes tiny random Hugging Face checkpoints, one per family, by transformers' own classes.

Run as a program with a folder to write all of `hf_files.CHECKPOINTS` and `TOKENIZERS` into. Owns
the sizes, the weights' scale and the tokenizers. Knows nothing of how they are converted. Weights
are scaled so that a change anywhere changes the logits: the router is sharp enough to choose
clearly, and every layer adds as much as it passes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before transformers looks: nothing here may ask the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import sentencepiece
import torch
import transformers as tf
from hf_files import (
    CHAT,
    CHECKPOINTS,
    CORPUS,
    N_GREEDY,
    N_POSITIONS,
    SPECIAL,
    TEXTS,
    TOKENIZERS,
    VOCAB,
    prompt,
)
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from moe_gguf.converters.hf.tokenizer import O200K, QWEN2

torch.set_num_threads(1)  # waiting threads spin, and these models are too small for two

HIDDEN, LAYERS, EXPERTS, USED = 64, 3, 8, 2
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": USED,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def mixtral() -> tf.PreTrainedModel:
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **COMMON, intermediate_size=96, num_local_experts=EXPERTS, rope_parameters=ROPE
        )
    )


def qwen2_moe() -> tf.PreTrainedModel:
    return tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **COMMON,
            intermediate_size=160,
            moe_intermediate_size=96,
            shared_expert_intermediate_size=128,
            num_experts=EXPERTS,
            norm_topk_prob=False,
            rope_parameters=ROPE,
        )
    )


def qwen3_moe() -> tf.PreTrainedModel:
    return tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(
            **COMMON,
            head_dim=32,
            intermediate_size=160,
            moe_intermediate_size=96,
            num_experts=EXPERTS,
            norm_topk_prob=True,
            rope_parameters=ROPE,
        )
    )


def qwen3_moe_tied() -> tf.PreTrainedModel:
    """One matrix for embedding and output, and positions scaled."""
    config = qwen3_moe().config
    config.tie_word_embeddings = True
    config.rope_parameters = ROPE | {"rope_type": "linear", "factor": 2.0}
    return tf.Qwen3MoeForCausalLM(config)


def olmoe() -> tf.PreTrainedModel:
    return tf.OlmoeForCausalLM(
        tf.OlmoeConfig(
            **(COMMON | {"num_key_value_heads": 4}),
            intermediate_size=96,
            num_experts=EXPERTS,
            norm_topk_prob=False,
            rope_parameters=ROPE,
        )
    )


def gpt_oss() -> tf.PreTrainedModel:
    return tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **COMMON,
            head_dim=32,
            intermediate_size=96,
            num_local_experts=EXPERTS,
            sliding_window=16,
            # llama.cpp always rounds yarn's corners, as "truncate" does; gpt-oss itself does not.
            rope_parameters=YARN | {"truncate": True},
            attn_implementation="eager",
        )
    )


def _deepseek_v2_config(**more: Any) -> tf.PretrainedConfig:
    return tf.DeepseekV2Config(
        **(COMMON | {"num_key_value_heads": 4} | more.pop("common", {})),
        intermediate_size=160,
        moe_intermediate_size=96,
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=48,
        **more,
    )


def deepseek_v2() -> tf.PreTrainedModel:
    """As V2-Lite: its 27 layers, no query compression, yarn with both of its scales.

    Every expert is used: in so many layers some near tie would be decided by rounding.
    """
    config = _deepseek_v2_config(
        q_lora_rank=None,
        rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        common={"num_hidden_layers": 27, "num_experts_per_tok": EXPERTS},
    )
    return tf.DeepseekV2ForCausalLM(config)


def deepseek_v2_full() -> tf.PreTrainedModel:
    """As V2: compressed queries, scaled routing weights."""
    return tf.DeepseekV2ForCausalLM(
        _deepseek_v2_config(q_lora_rank=24, routed_scaling_factor=2.5, rope_parameters=ROPE)
    )


def deepseek() -> tf.PreTrainedModel:
    """DeepSeek-MoE has no class in transformers: Llama's layers with DeepSeek-V2's experts."""
    config = tf.LlamaConfig(
        **{k: v for k, v in COMMON.items() if k != "num_experts_per_tok"},
        intermediate_size=160,
        rope_parameters=ROPE,
    )
    model = tf.LlamaForCausalLM(config)
    for layer in model.model.layers[1:]:
        layer.mlp = DeepseekV2Moe(_deepseek_v2_config(q_lora_rank=None, rope_parameters=ROPE))
    return model


FAMILIES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_moe_tied": qwen3_moe_tied,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "deepseek": deepseek,
    "deepseek_v2": deepseek_v2,
    "deepseek_v2_full": deepseek_v2_full,
}


def randomize(model: tf.PreTrainedModel, seed: int = 0) -> None:
    """Weights of unit gain, norms near one, routers of gain two, biases that matter."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=rng)
            if "norm" in name:
                value.copy_(1 + 0.1 * noise)
            elif value.dim() == 1 or name.endswith("_bias"):
                value.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                value.copy_(noise)
            else:
                fused_gpt_oss = "experts" in name and isinstance(model, tf.GptOssForCausalLM)
                fan_in = value.shape[-2] if fused_gpt_oss else value.shape[-1]
                router = "mlp.gate." in name or "router" in name
                gain = 2.0 if router else 1.0
                if "o_proj" in name or "down_proj" in name:  # deep models add up more layers
                    gain *= (LAYERS / model.config.num_hidden_layers) ** 0.5
                value.copy_(gain * noise / fan_in**0.5)
            # What the target keeps in F16 is a half already, so the conversion itself is exact.
            value.copy_(value.half().float())
    model.eval()


def write(name: str, root: Path) -> None:
    """One of CHECKPOINTS with a tokenizer, and beside it what transformers computes from it."""
    family, _, how = name.partition("-")
    model, folder = FAMILIES[family](), root / name
    randomize(model)
    model = model.to(getattr(torch, how, torch.float32))
    folder.mkdir()
    if family == "deepseek":
        _save_deepseek(model, folder)
    else:
        shard = "200KB" if how == "sharded" else "50GB"
        model.save_pretrained(folder, max_shard_size=shard, save_original_format=how != "fused")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if family == "mixtral":
        write_sentencepiece(folder)
    else:
        write_byte_level(folder, "qwen2")
    meaning = pack_mxfp4(folder) if how == "mxfp4" else {}
    model.float().load_state_dict(meaning, strict=False)
    ids = prompt()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
        for _ in range(N_GREEDY):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    arrays = {key: value.numpy() for key, value in meaning.items()}
    np.savez(root / f"{name}.npz", logits=logits, greedy=ids[N_POSITIONS:], **arrays)


def pack_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Give a gpt-oss checkpoint random experts in MXFP4; returns what they mean, by name."""
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    meaning = {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", ".down_proj"))]:
        n, n_in, n_out = tensors.pop(name).shape
        blocks = torch.from_numpy(rng.integers(0, 256, (n, n_out, n_in // 32, 16), np.uint8))
        scales = torch.from_numpy(rng.integers(121, 125, (n, n_out, n_in // 32), np.uint8))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meaning[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return meaning


def _save_deepseek(model: tf.PreTrainedModel, folder: Path) -> None:
    """As the model's own repository does: a matrix per expert, and its own configuration."""
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix(".gate_up_proj")
            for i, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors[f"{base}.{i}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{base}.{i}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix(".down_proj")
            tensors |= {f"{base}.{i}.down_proj.weight": d.contiguous() for i, d in enumerate(value)}
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    config = {
        **COMMON,
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "hidden_act": "silu",
        "intermediate_size": 160,
        "moe_intermediate_size": 96,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "rope_theta": ROPE["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps(config))


# --- tokenizers ---------------------------------------------------------------------------------


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, letters])


CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "qwen2": _split(QWEN2),
    "gpt-4o": _split(O200K),
}


def write_byte_level(folder: Path, cut: str, nfc: bool = False) -> tf.PreTrainedTokenizer:
    """A byte-level BPE tokenizer with this rule of cutting text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = CUTS[cut]
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,  # some ids stay unused, as in real models
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:-1], trainer)
    tokenizer.add_tokens(["<tool>"])
    return _save(tokenizer, folder)


def write_byte_fallback(folder: Path) -> tf.PreTrainedTokenizer:
    """What became of a sentencepiece model in tokenizer.json: merges, bytes, no cutting."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8, special_tokens=special[:3], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    described = json.loads(tokenizer.to_str())
    vocab = described["model"]["vocab"]
    first = 3
    moved = {t: i + (256 if i >= first else 0) for t, i in vocab.items() if i < VOCAB - 264}
    moved |= {token: first + byte for byte, token in enumerate(special[3:])}
    described["model"]["vocab"] = moved
    described["model"]["merges"] = [
        pair for pair in described["model"]["merges"] if "".join(pair) in moved
    ]
    described["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return _save(Tokenizer.from_str(json.dumps(described)), folder, bos="<s>", eos="</s>")


def _save(
    tokenizer: Tokenizer, folder: Path, bos: str = SPECIAL[0], eos: str = SPECIAL[1]
) -> tf.PreTrainedTokenizer:
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=CHAT
    )
    fast.save_pretrained(folder)
    return fast


def write_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """tokenizer.model as Mixtral has it: BPE with bytes, no normalization."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "chat_template": CHAT,
                "add_bos_token": True,
                "add_eos_token": False,
            }
        )
    )
    return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


def write_tokenizer(name: str, root: Path) -> None:
    """One of TOKENIZERS, and beside it the tokens of TEXTS."""
    folder = root / f"tokenizer-{name}"
    folder.mkdir()
    if name == "sentencepiece":
        pieces = write_sentencepiece(folder)
        tokens = [pieces.encode(text) for text in TEXTS]
    else:
        if name == "byte-fallback":
            fast = write_byte_fallback(folder)
        else:
            cut = name if name in CUTS else "qwen2"
            fast = write_byte_level(folder, cut, nfc=name == "nfc")
        tokens = [fast.encode(text, add_special_tokens=False) for text in TEXTS]
    (root / f"tokenizer-{name}.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    for name in CHECKPOINTS:
        write(name, Path(sys.argv[1]))
    for name in TOKENIZERS:
        write_tokenizer(name, Path(sys.argv[1]))
