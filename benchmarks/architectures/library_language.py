"""Language models of the transformers library, and encoders of sound, at tiny sizes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from architectures.registry import VOCABULARY, Architecture, tokens
from architectures.transformers_library import from_library

__all__ = ["LIBRARY_LANGUAGE"]

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
_DECODER = _BERT | {"use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "use_cache": False,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Name, class of the configuration, class of the model, the output that counts, sizes.
_TEXT: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", "logits", _BERT),
    "minilm": ("BertConfig", "BertModel", "last_hidden_state", _BERT | {"num_hidden_layers": 3}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        "logits",
        {"vocab_size": VOCABULARY, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    ),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", "logits", _BERT | {"pad_token_id": 1}),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", "logits", _BERT | {"embedding_size": 24}),
    "electra": ("ElectraConfig", "ElectraForTokenClassification", "logits", _BERT | {"embedding_size": 24}),
    "mpnet": ("MPNetConfig", "MPNetModel", "last_hidden_state", _BERT | {"pad_token_id": 1}),
    "deberta-v2": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        "logits",
        _BERT
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        "logits",
        _BERT | {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "xlm-roberta": (
        "XLMRobertaConfig",
        "XLMRobertaForSequenceClassification",
        "logits",
        _BERT | {"pad_token_id": 1},
    ),
    "camembert": (
        "CamembertConfig",
        "CamembertForTokenClassification",
        "logits",
        _BERT | {"pad_token_id": 1},
    ),
    "squeezebert": (
        "SqueezeBertConfig",
        "SqueezeBertForSequenceClassification",
        "logits",
        _BERT | {"embedding_size": 48},
    ),
    "funnel": (
        "FunnelConfig",
        "FunnelModel",
        "last_hidden_state",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 48,
            "n_head": 4,
            "d_head": 12,
            "d_inner": 96,
        },
    ),
    "fnet": (
        "FNetConfig",
        "FNetForSequenceClassification",
        "logits",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96},
    ),
    "esm": (
        "EsmConfig",
        "EsmModel",
        "last_hidden_state",
        _BERT | {"position_embedding_type": "rotary", "mask_token_id": 2, "token_dropout": False},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        "logits",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "use_cache": False,
        },
    ),
    "gpt-neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        "logits",
        _DECODER
        | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", "logits", _DECODER),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        "logits",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 8,
            "n_positions": 32,
            "use_cache": False,
        },
    ),
    "opt": ("OPTConfig", "OPTForCausalLM", "logits", _DECODER | {"ffn_dim": 96, "word_embed_proj_dim": 48}),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        "logits",
        {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4, "use_cache": False},
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", "logits", _DECODER | {"multi_query": True}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", "logits", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", "logits", _GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", "logits", _GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", "logits", _GROUPED | {"head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", "logits", _GROUPED | {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        "logits",
        _GROUPED | {"head_dim": 16, "sliding_window": 8},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        "logits",
        _GROUPED | {"head_dim": 16, "sliding_window": 8},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", "logits", _DECODER | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", "logits", _GROUPED),
    "stablelm": (
        "StableLmConfig",
        "StableLmForCausalLM",
        "logits",
        _GROUPED | {"partial_rotary_factor": 0.5},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", "logits", _GROUPED),
    "granite": ("GraniteConfig", "GraniteForCausalLM", "logits", _GROUPED),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", "logits", _GROUPED),
    "cohere": ("CohereConfig", "CohereForCausalLM", "logits", _GROUPED),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", "logits", _GROUPED | {"num_local_experts": 3}),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        "logits",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "use_cache": False,
        },
    ),
    "t5-encoder": ("T5Config", "T5EncoderModel", "last_hidden_state", _T5),
}
_PAIRS = {
    "t5": ("T5Config", "T5ForConditionalGeneration", "logits", _T5),
    "flan-t5-gated": (
        "T5Config",
        "T5ForConditionalGeneration",
        "logits",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", "logits", _BART),
    "marian": ("MarianConfig", "MarianMTModel", "logits", _BART | {"decoder_start_token_id": 0}),
}
_WHISPER = {
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
}
_WAV2VEC = {
    "vocab_size": 20,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "conv_dim": [16, 16, 24],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}


def _masked() -> tuple[np.ndarray, ...]:
    return (*tokens()(), np.ones((2, 12), np.int64))


def _pair() -> tuple[np.ndarray, ...]:
    return (*_masked(), tokens(8)()[0])


def _sound(*shape: int) -> Callable[[], tuple[np.ndarray, ...]]:
    return lambda: (np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32),)


def _library() -> dict[str, Architecture]:
    found = {}
    for models, example in ((_TEXT, tokens()), (_PAIRS, _pair)):
        for name, (config, model, output, sizes) in models.items():
            build = from_library(config, model, **sizes)
            found[f"hf-{name}"] = Architecture(f"hf-{name}", "language", build, example, output)
    bert = found["hf-bert"]
    found["hf-bert-masked"] = Architecture("hf-bert-masked", "language", bert.build, _masked, "logits")
    sounds = {
        "hf-whisper-encoder": ("WhisperConfig", "WhisperForAudioClassification", _WHISPER, _sound(16, 40)),
        "hf-wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", _WAV2VEC, _sound(400)),
        "hf-audio-spectrogram": (
            "ASTConfig",
            "ASTForAudioClassification",
            _BERT | {"patch_size": 8, "max_length": 40, "num_mel_bins": 16},
            _sound(40, 16),
        ),
    }
    for name, (config, model, sizes, example) in sounds.items():
        found[name] = Architecture(name, "sequence", from_library(config, model, **sizes), example, "logits")
    return found


LIBRARY_LANGUAGE = _library()
