"""Small random networks of many families of transformers, and inputs for them: what ``accepts.py`` and tests try."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Tensor]]
_TEXT: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(0))


def _text(name: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        model = _build(name, {**_TEXT, **_IDS, **options})
        return model, {"input_ids": _ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}

    return make


def _decoder(name: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        return _build(name, {**_TEXT, **_IDS, **options}), {"input_ids": _ids()}

    return make


def _seq2seq(name: str, options: Mapping[str, Any]) -> Callable[[], Made]:
    def make() -> Made:
        return _build(name, {**_IDS, "decoder_start_token_id": 0, **options}), {
            "input_ids": _ids(),
            "decoder_input_ids": _ids(2, 5),
        }

    return make


def _image(name: str, size: int, options: Mapping[str, Any]) -> Callable[[], Made]:
    def make() -> Made:
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        return _build(name, dict(options)), {"pixel_values": x}

    return make


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options)).eval()  # type: ignore[no-any-return]


def _whisper() -> Made:
    model = _build("WhisperForConditionalGeneration", {
        **_IDS, "vocab_size": 60, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
        "max_source_positions": 10, "max_target_positions": 12, "decoder_start_token_id": 1, "suppress_tokens": None,
        "begin_suppress_tokens": None,
    })  # fmt: skip
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    return model, {"input_features": features, "decoder_input_ids": _ids(2, 5)}


def _clip() -> Made:
    import transformers

    torch.manual_seed(0)
    text = {**_TEXT, **_IDS}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.eval(), {"input_ids": _ids(), "pixel_values": x}


def _wav2vec2() -> Made:
    options = {**_TEXT, "conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (3, 2), "num_labels": 5,
               "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
               "classifier_proj_size": 12, "mask_time_prob": 0.0}  # fmt: skip
    del options["max_position_embeddings"]
    model = _build("Wav2Vec2ForSequenceClassification", options)
    return model, {"input_values": torch.randn(2, 100, generator=torch.Generator().manual_seed(0))}


def _detr() -> Made:
    import transformers

    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=24,
        decoder_ffn_dim=24, num_queries=5, num_labels=3,
    )  # fmt: skip
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return transformers.DetrForObjectDetection(config).eval(), {"pixel_values": x}


_VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 8,
        "patch_size": 2, "num_labels": 5}  # fmt: skip

FAMILIES: dict[str, Callable[[], Made]] = {
    "BERT": _text("BertForSequenceClassification", num_labels=4),
    "RoBERTa": _text("RobertaForSequenceClassification", num_labels=4, max_position_embeddings=40),
    "DistilBERT": _text("DistilBertForSequenceClassification", dim=16, hidden_dim=24, n_layers=3, n_heads=4,
                        num_labels=4),
    "ALBERT": _text("AlbertForSequenceClassification", embedding_size=8, num_labels=4),
    "ELECTRA": _text("ElectraForSequenceClassification", embedding_size=8, num_labels=4),
    "DeBERTa-v2": _text("DebertaV2ForSequenceClassification", num_labels=4, relative_attention=True,
                        pos_att_type=["p2c", "c2p"], position_buckets=8),
    "T5": _seq2seq("T5ForConditionalGeneration", {
        "vocab_size": 60, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 3, "num_heads": 4}),
    "BART": _seq2seq("BartForConditionalGeneration", {
        "vocab_size": 60, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
        "forced_eos_token_id": None}),
    "GPT-2": _decoder("GPT2LMHeadModel", n_embd=16, n_layer=3, n_head=4, n_positions=32),
    "GPT-NeoX": _decoder("GPTNeoXForCausalLM"),
    "Llama": _decoder("LlamaForCausalLM", num_key_value_heads=2),
    "Mistral": _decoder("MistralForCausalLM", num_key_value_heads=2),
    "Qwen2": _decoder("Qwen2ForCausalLM", num_key_value_heads=2),
    "Qwen3": _decoder("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=4),
    "Mixtral": _decoder("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4),
    "Gemma": _decoder("GemmaForCausalLM", num_key_value_heads=2, head_dim=4),
    "Gemma2": _decoder("Gemma2ForCausalLM", num_key_value_heads=2, head_dim=4),
    "OPT": _decoder("OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=16),
    "Phi": _decoder("PhiForCausalLM"),
    "Phi-3": _decoder("Phi3ForCausalLM", num_key_value_heads=2),
    "BLOOM": _decoder("BloomForCausalLM", n_layer=3, n_head=4),
    "Whisper": _whisper,
    "CLIP": _clip,
    "ViT": _image("ViTForImageClassification", 8, _VIT),
    "DeiT": _image("DeiTForImageClassification", 8, _VIT),
    "BEiT": _image("BeitForImageClassification", 8, _VIT),
    "DINOv2": _image("Dinov2ForImageClassification", 8, _VIT | {"mlp_ratio": 2}),
    "Swin": _image("SwinForImageClassification", 16, {
        "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
        "num_labels": 5}),
    "ConvNeXt": _image("ConvNextForImageClassification", 32, {
        "hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "num_labels": 5, "patch_size": 4}),
    "ConvNeXtV2": _image("ConvNextV2ForImageClassification", 32, {
        "hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "num_labels": 5, "patch_size": 4}),
    "ResNet": _image("ResNetForImageClassification", 32, {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic", "num_labels": 5}),
    "ResNet bottleneck": _image("ResNetForImageClassification", 32, {
        "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "bottleneck", "num_labels": 5}),
    "MobileNetV1": _image("MobileNetV1ForImageClassification", 32, {
        "depth_multiplier": 0.25, "num_labels": 5, "image_size": 32}),
    "MobileNetV2": _image("MobileNetV2ForImageClassification", 32, {
        "depth_multiplier": 0.35, "num_labels": 5, "image_size": 32}),
    "EfficientNet": _image("EfficientNetForImageClassification", 32, {
        "image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.4, "hidden_dim": 320, "num_labels": 5}),
    "RegNet": _image("RegNetForImageClassification", 32, {
        "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "groups_width": 4, "num_labels": 5}),
    "SegFormer": _image("SegformerForSemanticSegmentation", 32, {
        "num_encoder_blocks": 2, "depths": [2, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
        "decoder_hidden_size": 12, "num_labels": 5}),
    "PoolFormer": _image("PoolFormerForImageClassification", 32, {
        "depths": [2, 2], "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2],
        "padding": [1, 1], "num_labels": 5}),
    "DETR": _detr,
    "Wav2Vec2": _wav2vec2,
}  # fmt: skip
