"""Vision models of the transformers library, at tiny sizes."""

from architectures.registry import CLASSES, Architecture, images
from architectures.transformers_library import from_library

__all__ = ["LIBRARY_VISION"]

_VIT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
_FOUR = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}
_PYRAMID = {
    "num_encoder_blocks": 4,
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "hidden_sizes": [16, 24, 32, 48],
    "mlp_ratios": [2, 2, 2, 2],
}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_LIBRARY = {
    "vit": ("ViT", _VIT),
    "deit": ("DeiT", _VIT),
    "beit": ("Beit", _VIT | {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2", _VIT | {"mlp_ratio": 2}),
    "dinov2-registers": ("Dinov2WithRegisters", _VIT | {"mlp_ratio": 2}),
    "data2vec-vision": ("Data2VecVision", _VIT),
    "vit-msn": ("ViTMSN", _VIT),
    "ijepa": ("IJepa", _VIT),
    "swin": ("Swin", _SWIN),
    "swinv2": ("Swinv2", _SWIN),
    "convnext": ("ConvNext", _FOUR | {"patch_size": 2}),
    "convnextv2": ("ConvNextV2", _FOUR | {"patch_size": 2}),
    "resnet": ("ResNet", _FOUR | {"embedding_size": 16}),
    "regnet": ("RegNet", _FOUR | {"embedding_size": 16, "groups_width": 8}),
    "bit": ("Bit", _FOUR | {"embedding_size": 16, "num_groups": 8}),
    "hgnetv2": (
        "HGNetV2",
        {
            "embedding_size": 16,
            "stem_channels": [3, 16, 16],
            "stage_in_channels": [16, 24],
            "stage_mid_channels": [16, 16],
            "stage_out_channels": [24, 32],
            "stage_num_blocks": [1, 1],
            "stage_downsample": [False, True],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 5],
            "stage_numb_of_layers": [2, 2],
            "depths": [1, 1],
            "hidden_sizes": [24, 32],
        },
    ),
    "mobilenet-v1": ("MobileNetV1", {"image_size": 32, "depth_multiplier": 0.125}),
    "mobilenet-v2": (
        "MobileNetV2",
        {"image_size": 32, "depth_multiplier": 0.25, "finegrained_output": False},
    ),
    "efficientnet": (
        "EfficientNet",
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    ),
    "mobilevit": (
        "MobileViT",
        {
            "image_size": 32,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 12, 16, 16, 24, 32, 48],
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
        },
    ),
    "mobilevitv2": (
        "MobileViTV2",
        {
            "image_size": 64,
            "width_multiplier": 0.25,
            "n_attn_blocks": [1, 1, 1],
            "base_attn_unit_dims": [32, 32, 32],
        },
    ),
    "segformer": ("Segformer", _PYRAMID | {"image_size": 32, "sr_ratios": [2, 2, 1, 1]}),
    "pvt": (
        "Pvt",
        _PYRAMID | {"image_size": 64, "sequence_reduction_ratios": [2, 2, 1, 1], "patch_sizes": [4, 2, 2, 2]},
    ),
    "pvt-v2": ("PvtV2", _PYRAMID | {"image_size": 64, "sr_ratios": [2, 2, 1, 1]}),
    "poolformer": (
        "PoolFormer",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48], "mlp_ratio": 2.0},
    ),
    "cvt": (
        "Cvt",
        {
            "embed_dim": [16, 32, 48],
            "num_heads": [1, 2, 4],
            "depth": [1, 2, 3],
            "mlp_ratio": [2.0, 2.0, 2.0],
            "patch_stride": [2, 2, 2],
            "patch_sizes": [3, 3, 3],
            "patch_padding": [1, 1, 1],
            "attention_drop_rate": [0.0] * 3,
            "drop_rate": [0.0] * 3,
        },
    ),
    "levit": (
        "Levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
        },
    ),
    "focalnet": (
        "FocalNet",
        {
            "image_size": 32,
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
    "hiera": (
        "Hiera",
        {
            "image_size": [32, 32],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "depths": [1, 1],
            "num_heads": [1, 2],
            "embed_dim": 16,
            "masked_unit_size": [4, 4],
            "query_stride": [2, 2],
            "num_query_pool": 1,
        },
    ),
    "swiftformer": (
        "SwiftFormer",
        {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48], "mlp_ratio": 2},
    ),
    "textnet": (
        "TextNet",
        {
            "image_size": [32, 32],
            "stem_out_channels": 16,
            "hidden_sizes": [16, 16, 24, 32, 32],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 1]], [[1, 3]]],
            "conv_layer_strides": [[1], [2], [2], [1]],
        },
    ),
}
_ENCODERS = {
    "clip-vision": (
        "CLIPVisionConfig",
        "CLIPVisionModelWithProjection",
        "image_embeds",
        {"projection_dim": 24},
    ),
    "siglip-vision": ("SiglipVisionConfig", "SiglipVisionModel", "pooler_output", {}),
    "vitdet": ("VitDetConfig", "VitDetModel", "last_hidden_state", {"mlp_ratio": 2}),
    "yolos": (
        "YolosConfig",
        "YolosForObjectDetection",
        "logits",
        {"num_detection_tokens": 4, "image_size": [32, 32]},
    ),
    "dinov3-vit": ("DINOv3ViTConfig", "DINOv3ViTModel", "pooler_output", {"num_register_tokens": 1}),
}


def _library() -> dict[str, Architecture]:
    found = {}
    for name, (kind, sizes) in _LIBRARY.items():
        build = from_library(f"{kind}Config", f"{kind}ForImageClassification", num_labels=CLASSES, **sizes)
        size = sizes.get("image_size", 32)
        example = images(size if isinstance(size, int) else size[0])
        found[f"hf-{name}"] = Architecture(f"hf-{name}", "vision transformer", build, example, "logits")
    for name, (config, model, output, sizes) in _ENCODERS.items():
        build = from_library(config, model, **(_VIT | sizes))
        found[f"hf-{name}"] = Architecture(f"hf-{name}", "vision transformer", build, images(), output)
    return found


LIBRARY_VISION = _library()
