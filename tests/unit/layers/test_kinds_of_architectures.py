"""Kinds of the layers of small copies of public architectures, by the patterns of their names."""

import pytest
import torch
from trees import wrong_kinds

transformers = pytest.importorskip("transformers", reason="the architectures are those of transformers")

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
VISION.pop("vocab_size")
SPEECH = {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

LOOK_UPS = {r"embed_tokens|wte|wpe|(word|position|token_type)_embeddings?|embed_positions|shared": "embedding"}
LLAMA = {
    r"self_attn\.[qkv]_proj": "attention_qkv",
    r"self_attn\.o_proj": "attention_out",
    r"(gate|up)_proj": "mlp_up",
    r"down_proj": "mlp_down",
    r"lm_head": "head",
    r"embed_tokens": "embedding",
}
EXPERTS = {r"mlp\.(gate|router)\.|shared_expert_gate": "dense", r"gate_up_proj": "mlp_up", **LLAMA}
BERT = {
    r"attention\.self\.(query|key|value)(_proj)?": "attention_qkv",
    r"attention\.output\.dense": "attention_out",
    r"intermediate\.dense": "mlp_up",
    r"\d\.output\.dense": "mlp_down",
    r"transform\.dense|pooler\.dense": "dense",
    r"decoder|classifier|seq_relationship": "head",
    r"rel_embeddings": "embedding",
    **LOOK_UPS,
}
BART = {
    r"(self_attn|encoder_attn|attention)\.[qkv]_proj": "attention_qkv",
    r"(self_attn|encoder_attn|attention)\.(out|o)_proj": "attention_out",
    r"fc1": "mlp_up",
    r"fc2": "mlp_down",
    r"lm_head|proj_out|classifier": "head",
    r"conv\d|patch_embedding|patch_embeddings": "conv",
    r"(text|visual)_projection": "head",
    r"class_embedding": "embedding",
    r"position_embedding|token_embedding": "embedding",
    **LOOK_UPS,
}
NEOX = {
    r"query_key_value": "attention_qkv",
    r"(attention|self_attention)\.dense": "attention_out",
    r"dense_h_to_4h": "mlp_up",
    r"dense_4h_to_h": "mlp_down",
    r"lm_head|embed_out": "head",
    r"word_embeddings|embed_in": "embedding",
}
WAV2VEC2 = {
    r"(attention|self_attn)\.([qkv]_proj|linear_(q|k|v|pos))": "attention_qkv",
    r"(attention|self_attn)\.(out_proj|linear_out)": "attention_out",
    r"intermediate_dense": "mlp_up",
    r"output_dense": "mlp_down",
    r"conv_layers|pos_conv_embed|conv_module": "conv",
    r"pos_bias": None,
    r"feature_projection": "dense",
    r"lm_head": "head",
}
MAMBA = {
    r"mixer\.|mamba\.": "dense",
    r"conv1d": "conv",
}
DETR = {
    r"class_labels_classifier": "head",
    r"bbox_predictor\.layers\.2": "head",
    r"bbox_predictor\.layers\.[01]": "dense",
    r"backbone|input_projection": "conv",
    r"query_position_embeddings": "embedding",
}


def resnet_backbone():
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )


# Name of a class, its options, and pattern -> kind: the first that is found in a parameter's name counts.
ARCHITECTURES = [
    ("LlamaForCausalLM", {**SIZES, **GROUPED}, LLAMA),
    ("MistralForCausalLM", {**SIZES, **GROUPED}, LLAMA),
    ("Qwen2ForCausalLM", {**SIZES, **GROUPED}, LLAMA),
    ("Qwen3ForCausalLM", {**SIZES, **GROUPED, "head_dim": 32}, LLAMA),
    ("GemmaForCausalLM", {**SIZES, **GROUPED, "head_dim": 32}, LLAMA),
    ("Gemma2ForCausalLM", {**SIZES, **GROUPED, "head_dim": 32}, LLAMA),
    ("LlamaModel", {**SIZES, "intermediate_size": 64}, LLAMA),
    ("LlamaForSequenceClassification", {**SIZES, "pad_token_id": 0}, {r"score": "head", **LLAMA}),
    ("PhiForCausalLM", {**SIZES}, {r"attn\.dense": "attention_out", r"fc1": "mlp_up", r"fc2": "mlp_down", **LLAMA}),
    ("Phi3ForCausalLM", {**SIZES, **TOKENS}, {r"qkv_proj": "attention_qkv", r"gate_up_proj": "mlp_up", **LLAMA}),
    ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "add_cross_attention": True},
     {r"c_attn|q_attn": "attention_qkv", r"attention\.c_proj|attn\.c_proj": "attention_out", r"c_fc": "mlp_up",
      r"mlp\.c_proj": "mlp_down", r"lm_head": "head", **LOOK_UPS}),
    ("GPTJForCausalLM", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
     {r"[qkv]_proj": "attention_qkv", r"attn\.out_proj": "attention_out", r"fc_in": "mlp_up", r"fc_out": "mlp_down",
      r"lm_head": "head", **LOOK_UPS}),
    ("GPTNeoXForCausalLM", SIZES, NEOX),
    ("FalconForCausalLM", {k: v for k, v in SIZES.items() if k != "intermediate_size"}, NEOX),
    ("BloomForCausalLM", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}, NEOX),
    ("OPTForCausalLM", {"vocab_size": 96, "hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "word_embed_proj_dim": 64}, BART),
    ("T5ForConditionalGeneration",
     {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_heads": 4},
     {r"Attention\.[qkv]\.": "attention_qkv", r"Attention\.o\.": "attention_out", r"\.wi": "mlp_up",
      r"\.wo": "mlp_down", r"lm_head": "head", r"relative_attention_bias|shared|embed_tokens": "embedding"}),
    ("T5ForConditionalGeneration",
     {"vocab_size": 96, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "feed_forward_proj": "gated-gelu"},
     {r"Attention\.[qkv]\.": "attention_qkv", r"Attention\.o\.": "attention_out", r"\.wi": "mlp_up",
      r"\.wo": "mlp_down", r"lm_head": "head", r"relative_attention_bias|shared|embed_tokens": "embedding"}),
    ("BartForConditionalGeneration", {"vocab_size": 96, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1,
     "encoder_ffn_dim": 160, "decoder_ffn_dim": 160, "encoder_attention_heads": 4, "decoder_attention_heads": 4}, BART),
    ("BertForMaskedLM", SIZES, BERT),
    ("BertForPreTraining", SIZES, BERT),
    ("BertForSequenceClassification", SIZES, BERT),
    ("BertModel", SIZES, BERT),
    ("RobertaForSequenceClassification", {**SIZES, "num_labels": 3},
     {r"classifier\.dense": "dense", r"classifier\.out_proj": "head", **BERT}),
    ("DistilBertForMaskedLM", {"vocab_size": 96, "dim": 64, "hidden_dim": 160, "n_layers": 2, "n_heads": 4},
     {r"[qkv]_lin": "attention_qkv", r"out_lin": "attention_out", r"lin1": "mlp_up", r"lin2": "mlp_down",
      r"vocab_transform": "dense", r"vocab_projector": "head", **LOOK_UPS}),
    ("DebertaV2ForMaskedLM", SIZES, BERT),
    ("DebertaV2ForSequenceClassification",
     {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False},
     {r"pos_(key|query)_proj": "attention_qkv", **BERT}),
    ("ModernBertForMaskedLM", {**SIZES, **TOKENS, "cls_token_id": 1, "sep_token_id": 2},
     {r"Wqkv": "attention_qkv", r"attn\.Wo": "attention_out", r"mlp\.Wi": "mlp_up", r"mlp\.Wo": "mlp_down",
      r"head\.dense": "dense", r"decoder": "head", r"tok_embeddings": "embedding"}),
    ("ViTForImageClassification", VISION, {r"cls_token": None, r"projection": "conv", **BART, **BERT}),
    ("SwinForImageClassification",
     {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
     {r"projection": "conv", r"reduction": "dense", r"bias_table": None, **BART, **BERT}),
    ("Swinv2ForImageClassification",
     {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
     {r"projection": "conv", r"reduction|continuous_position": "dense", r"logit_scale": None, **BERT}),
    ("ConvNextForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
     {r"pwconv1": "mlp_up", r"pwconv2": "mlp_down", r"dwconv|patch_embeddings|downsampling": "conv",
      r"classifier": "head"}),
    ("CLIPModel", {"text_config": SIZES, "vision_config": VISION, "projection_dim": 32}, BART),
    ("CLIPTextModelWithProjection", {**SIZES, "projection_dim": 32}, BART),
    ("CLIPVisionModelWithProjection", {**VISION, "projection_dim": 32}, BART),
    ("SiglipModel", {"text_config": SIZES, "vision_config": VISION},
     {r"in_proj": "attention_qkv", r"vision_model\.head\.mlp\.fc": None, r"text_model\.head": "head",
      r"head\.attention\.out_proj": "attention_out", r"probe": None, **BART}),
    ("DetrForObjectDetection",
     {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
      "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 5, "use_timm_backbone": False,
      "use_pretrained_backbone": False, "backbone_config": resnet_backbone},
     {**DETR, **BART}),
    ("WhisperForConditionalGeneration",
     {"vocab_size": 96, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
      "decoder_attention_heads": 4, "encoder_ffn_dim": 160, "decoder_ffn_dim": 160, "num_mel_bins": 16, **TOKENS},
     BART),
    ("Wav2Vec2ForCTC", {**SIZES, **SPEECH}, WAV2VEC2),
    ("Wav2Vec2Model", {**SIZES, **SPEECH}, WAV2VEC2),
    ("Wav2Vec2ConformerModel", {**SIZES, **SPEECH}, WAV2VEC2),
    ("Data2VecAudioModel", {**SIZES, **SPEECH}, WAV2VEC2),
    ("MambaForCausalLM", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
     {r"conv1d": "conv", r"A_log": None, r"embeddings": "embedding", r"lm_head": "head", **MAMBA}),
    ("JambaForCausalLM",
     {**SIZES, **GROUPED, **TOKENS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
      "mamba_d_state": 8, "use_mamba_kernels": False, "expert_layer_period": 2, "expert_layer_offset": 1},
     {r"router": "dense", r"conv1d": "conv", r"A_log": None, **MAMBA, r"gate_up_proj": "mlp_up", **LLAMA}),
    ("RwkvForCausalLM", {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "context_length": 32},
     {r"attention\.(key|value|receptance)": "attention_qkv", r"attention\.output": "attention_out",
      r"feed_forward\.key": "mlp_up", r"feed_forward\.value": "mlp_down", r"feed_forward\.receptance": "dense",
      r"time_": None, r"embeddings": "embedding", r"head": "head"}),
    ("MixtralForCausalLM", {**SIZES, **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, EXPERTS),
    ("Qwen2MoeForCausalLM",
     {**SIZES, **GROUPED, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}, EXPERTS),
    ("Qwen3MoeForCausalLM", {**SIZES, **GROUPED, **MOE, "num_experts": 4, "head_dim": 32}, EXPERTS),
    ("GptOssForCausalLM", {**SIZES, **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
     {r"_bias": None, **EXPERTS}),
    ("DeepseekV3ForCausalLM",
     {**SIZES, **MOE, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1,
      "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
      "qk_nope_head_dim": 8, "v_head_dim": 16},
     {r"q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj": "attention_qkv", **EXPERTS}),
    ("Qwen3NextForCausalLM",
     {**SIZES, **GROUPED, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 32, "head_dim": 16,
      "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
      "layer_types": ["linear_attention", "full_attention"]},
     {r"linear_attn\.in_proj": "attention_qkv", r"linear_attn\.out_proj": "attention_out", r"conv1d": "conv",
      **EXPERTS}),
]  # fmt: skip


def build(name, options):
    made = getattr(transformers, name)
    options = {key: value() if callable(value) else value for key, value in options.items()}
    with torch.device("meta"):
        return made(made.config_class(**options))


@pytest.mark.parametrize(("name", "options", "expected"), ARCHITECTURES)
def test_kinds_of_public_architectures(name, options, expected):
    wrong, count = wrong_kinds(build(name, options), expected)
    assert not wrong, f"{len(wrong)} of {count} wrong"
