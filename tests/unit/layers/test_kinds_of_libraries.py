"""Kinds of the layers of diffusion models, forecasters and adapted networks, by the patterns of their names."""

import pytest
from torch import nn
from trees import wrong_kinds

from lightning_spectral.layers.kinds import infer_kinds

UNET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 4,
        "attention_head_dim": 8}  # fmt: skip
CONDITIONED = {**UNET, "cross_attention_dim": 24, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
DIFFUSION = {
    r"to_[qkv]\.": "attention_qkv",
    r"to_out": "attention_out",
    r"ff\.net\.0": "mlp_up",
    r"ff\.net\.2": "mlp_down",
    r"embedding_table": "embedding",
    # What is made of the time and the class: their embedding, its projections, shifts and scales.
    r"time_emb|timestep_embedder|norm1\.linear|proj_out_1": "dense",
    r"proj_out_2": "head",
    r"conv|pos_embed|proj_in|attentions\.\d\.proj_out": "conv",
}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("UNet2DModel",
         {**UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
          "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}, DIFFUSION),
        ("UNet2DConditionModel", CONDITIONED, DIFFUSION),
        ("UNet2DConditionModel", {**CONDITIONED, "use_linear_projection": True},
         {r"attentions\.\d\.proj_(in|out)": "dense", **DIFFUSION}),
        ("DiTTransformer2DModel",
         {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
          "norm_num_groups": 4, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}, DIFFUSION),
    ],
)  # fmt: skip
def test_kinds_of_diffusion_models(name, options, expected):
    diffusers = pytest.importorskip("diffusers", reason="the models are those of diffusers")
    wrong, count = wrong_kinds(getattr(diffusers, name)(**options), expected)
    assert not wrong, f"{len(wrong)} of {count} wrong"


@pytest.mark.filterwarnings("ignore:Attribute '\\w+' is an instance of `nn.Module`")
def test_kinds_of_a_temporal_fusion_transformer():
    forecasting = pytest.importorskip("pytorch_forecasting", reason="the model is that of pytorch-forecasting")
    model = forecasting.TemporalFusionTransformer(
        hidden_size=16, output_size=7, loss=forecasting.QuantileLoss(), attention_head_size=4,
        hidden_continuous_size=8, static_categoricals=["shop"], static_reals=["size"],
        time_varying_reals_encoder=["price", "sales"], time_varying_reals_decoder=["price"],
        time_varying_categoricals_encoder=["month"], time_varying_categoricals_decoder=["month"],
        x_reals=["size", "price", "sales"], x_categoricals=["shop", "month"],
        embedding_sizes={"shop": (5, 4), "month": (12, 6)}, embedding_labels={"shop": [], "month": []},
    )  # fmt: skip
    wrong, count = wrong_kinds(model, {
        r"embeddings": "embedding",
        r"[qkv]_layer": "attention_qkv",
        r"w_h": "attention_out",
        r"output_layer": "head",
        # Gated residual networks, that of each position among them, are no blocks of a transformer.
        r"prescalers|grn|static_|lstm|gate|pos_wise_ff": "dense",
    })  # fmt: skip
    assert not wrong, f"{len(wrong)} of {count} wrong"


def test_kinds_of_a_patch_transformer():
    transformers = pytest.importorskip("transformers", reason="the model is that of transformers")
    sizes = {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 32,
             "prediction_length": 12, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    model = transformers.PatchTSTForPrediction(transformers.PatchTSTConfig(**sizes))
    wrong, count = wrong_kinds(model, {
        r"self_attn\.[qkv]_proj": "attention_qkv",
        r"self_attn\.out_proj": "attention_out",
        r"ff\.0": "mlp_up",
        r"ff\.3": "mlp_down",
        r"position_enc": "embedding",
        r"input_embedding": "dense",
        r"head": "head",
    })  # fmt: skip
    assert not wrong, f"{len(wrong)} of {count} wrong"


@pytest.mark.parametrize("hidden", [16, 32])
def test_kinds_of_an_encoder_and_a_decoder_of_torch(hidden):
    model = nn.ModuleDict({
        "tokens": nn.Embedding(10, 16),
        "transformer": nn.Transformer(16, 4, 2, 2, hidden, batch_first=True),
        "out": nn.Linear(16, 10),
    })  # fmt: skip
    wrong, count = wrong_kinds(model, {
        r"in_proj_weight": "attention_qkv",
        r"out_proj": "attention_out",
        r"linear1": "mlp_up",
        r"linear2": "mlp_down",
        r"tokens": "embedding",
        r"^out": "head",
    })  # fmt: skip
    assert not wrong, f"{len(wrong)} of {count} wrong"


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:The following \\w+_pattern keys")
@pytest.mark.parametrize(
    ("name", "options", "dora"),
    [
        ("LlamaForCausalLM", SIZES, False),
        ("LlamaForCausalLM", SIZES, True),
        ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4}, False),
        ("BertForSequenceClassification", SIZES, True),
        ("CLIPTextModelWithProjection", {**SIZES, "projection_dim": 16}, False),
        ("MixtralForCausalLM", {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}, False),
    ],
)
def test_adapters_have_the_kinds_of_what_they_adapt(name, options, dora):
    transformers = pytest.importorskip("transformers", reason="the networks are those of transformers")
    peft = pytest.importorskip("peft", reason="the adapters are those of peft")
    made = getattr(transformers, name)
    model = made(made.config_class(**options))
    plain = infer_kinds(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", use_dora=dora))
    adapters = {name: kind for name, kind in infer_kinds(model).items() if "lora_" in name}
    for name, kind in adapters.items():
        holder = name.partition(".lora_")[0]
        adapted = holder.removeprefix("base_model.model.").replace(".base_layer", "")
        assert kind == plain[f"{adapted}.{getattr(model.get_submodule(holder), 'parameter_name', 'weight')}"], name
    assert len(adapters) >= 8
