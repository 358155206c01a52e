"""One small model of every timm family, a family being a module of `timm.models` that registers architectures.

An architecture is shrunk by arguments that it hands on; some (inception, pnasnet, selecsls, xception) take none.
A family that a newer timm brings has a row of its own that fails until it is listed.
"""

import copy
from functools import partial
from typing import NamedTuple

import timm
import torch
from conftest import CHANNELS, CLASSES
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification


class Family(NamedTuple):
    """An architecture, what shrinks it, the side of the square images it takes, and whether its paths are dropped."""

    architecture: str
    model_args: dict
    size: int = 32
    drop_path: bool = True


# Dropout and dropped paths, so that the two views must share them.
DROPOUT = {"drop_rate": 0.1, "drop_path_rate": 0.1}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
}
WIDTHS = [8, 16, 24, 32]
ONES = [1, 1, 1, 1]
RESNET = {"layers": ONES, "channels": WIDTHS, "stem_width": 8}

FAMILIES = {
    "beit": Family("beit_base_patch16_224", VIT),
    "byoanet": Family("lambda_resnet26t", {"img_size": 32, "width_factor": 0.25}),
    "byobnet": Family("test_byobnet", {}),
    "cait": Family("cait_xxs24_224", VIT | {"depth_token_only": 1}),
    "coat": Family("coat_tiny", {"img_size": 32, "embed_dims": [16] * 4, "serial_depths": ONES, "parallel_depth": 1}),
    # No dropped paths: its class token sees the image in the second block alone.
    "convit": Family("convit_tiny", VIT | {"embed_dim": 4, "num_heads": 4, "local_up_to_layer": 1}, drop_path=False),
    "convmixer": Family("convmixer_768_32", {}, drop_path=False),
    "convnext": Family("test_convnext", {"dims": WIDTHS, "depths": ONES}),
    "cpubone": Family(
        "cpubone_nano", {"width_list": [8, 8, 16, 16, 32], "depth_list": [0, 1, 1, 1, 1], "head_widths": [32, 32]}
    ),
    "crossvit": Family(
        "crossvit_tiny_240",
        {
            "img_size": 32,
            "img_scale": [1.0, 1.0],
            "patch_size": [8, 16],
            "embed_dim": [8, 16],
            "depth": [[1, 1, 0]],
            "num_heads": [2, 2],
        },
    ),
    "csatv2": Family("csatv2", {"dims": WIDTHS, "depths": ONES, "transformer_depths": [0, 0, 1, 1]}, 64),
    "cspnet": Family("cs3darknet_focus_s", {}),
    "cspnext": Family("cspnext_tiny", {"depths": ONES, "channels": [16, 16, 32, 32], "widen_factor": 1.0}),
    "davit": Family("davit_tiny", {"depths": ONES, "embed_dims": WIDTHS, "num_heads": [1, 2, 2, 4]}),
    "deepseek_vit": Family("deepseek_vit_412m", VIT | {"img_size": 24, "mlp_ratio": 2}, 24),
    "deit": Family("deit_tiny_patch16_224", VIT),
    "densenet": Family("densenet121", {"growth_rate": 8, "block_config": [1, 2, 2, 1]}, drop_path=False),
    "dla": Family("dla46_c", {"channels": [8, 8, 16, 16, 24, 32]}, drop_path=False),
    "dpn": Family("dpn48b", {"k_sec": ONES, "inc_sec": [8] * 4, "k_r": 32, "groups": 8}, drop_path=False),
    "edgenext": Family("edgenext_xx_small", {"depths": [1, 2, 2, 2], "dims": WIDTHS, "heads": [2, 2, 2, 2]}),
    "efficientformer": Family("efficientformer_l1", {"depths": [1, 1, 1, 2], "embed_dims": WIDTHS}, 224),
    "efficientformer_v2": Family(
        "efficientformerv2_s0", {"img_size": 64, "depths": [1, 1, 2, 2], "embed_dims": WIDTHS, "mlp_ratios": 2}, 64
    ),
    "efficientnet": Family("test_efficientnet", {}),
    "efficientvim": Family("efficientvim_m1", {"embed_dim": [16, 24, 32], "depths": [1, 1, 1]}, 64),
    "efficientvit_mit": Family(
        "efficientvit_b0",
        {"widths": [8, 8, 16, 16, 32], "depths": [1] * 5, "head_dim": 8, "head_widths": [32, 32]},
        drop_path=False,
    ),
    "efficientvit_msra": Family(
        "efficientvit_m0",
        {"img_size": 64, "embed_dim": [16, 24, 32], "depth": [1, 1, 1], "num_heads": [2, 2, 2]},
        64,
        drop_path=False,
    ),
    "eva": Family("eva02_tiny_patch14_224", VIT),
    "fasternet": Family("fasternet_t0", {"embed_dim": 8, "depths": ONES, "feature_dim": 32}),
    "fastvit": Family("fastvit_sa12", {"layers": ONES, "embed_dims": [8, 16, 32, 32]}, 64),
    "focalnet": Family("focalnet_tiny_srf", {"mlp_ratio": 0.25}),
    "gcvit": Family("gcvit_xxtiny", {"img_size": 32, "embed_dim": 16, "window_size": [8, 4, 2, 1]}),
    "gemma4_vit": Family(
        "gemma4_vit_167m",
        VIT | {"img_size": 24, "head_dim": 8, "intermediate_size": 32, "position_embedding_size": 16},
        24,
    ),
    "ghostnet": Family("ghostnet_050", {}, drop_path=False),
    "hardcorenas": Family("hardcorenas_a", {}),
    "hgnet": Family("hgnetv2_b0", {"head_hidden_size": 32}),
    "hiera": Family("hiera_tiny_224", {"img_size": 32, "embed_dim": 8, "stages": ONES}),
    "hieradet_sam2": Family("sam2_hiera_tiny", {"embed_dim": 8, "stages": [1, 1, 2, 1], "global_att_blocks": [3]}),
    "hrnet": Family("hrnet_w18_small", {}, drop_path=False),
    "iformer": Family(
        "iformer_t",
        {"dims": [16, 16, 32, 32], "depths": [1, 1, 3, 3], "attn_groups": [0, 0, 1, 1]},
    ),
    "inception_next": Family("inception_next_atto", {"depths": ONES, "dims": [16, 16, 24, 32]}),
    "inception_resnet_v2": Family("inception_resnet_v2", {}, 75, drop_path=False),
    "inception_v3": Family("inception_v3", {}, 75, drop_path=False),
    "inception_v4": Family("inception_v4", {}, 75, drop_path=False),
    "lcnetv2": Family("lcnetv2_small", {"scale": 0.25, "depths": ONES, "head_hidden_size": 32}, drop_path=False),
    "levit": Family(
        "levit_128s",
        {"img_size": 64, "embed_dim": [16, 24, 32], "key_dim": 8, "num_heads": [2, 2, 2], "depth": [1, 1, 1]},
        64,
    ),
    "lowformer": Family(
        "lowformer_b0", {"width_list": [8, 8, 16, 16, 32], "depth_list": [0, 1, 1, 1, 1], "head_widths": [32, 32]}
    ),
    "mambaout": Family("test_mambaout", {"dims": WIDTHS, "depths": ONES}),
    "maxxvit": Family(
        "maxvit_pico_rw_256",
        {
            "img_size": 64,
            "embed_dim": [16, 16, 24, 32],
            "depths": ONES,
            "stem_width": [8, 8],
            "transformer_dim_head": 8,
        },
        64,
    ),
    "metaformer": Family("poolformerv2_s12", {}),
    "mlp_mixer": Family("gmixer_12_224", {"img_size": 32}),
    "mobilenetv3": Family("lcnet_035", {}),
    "mobilenetv5": Family("mobilenetv5_base", {"channel_multiplier": 0.1}),
    "mobilevit": Family("mobilevit_xxs", {}),
    "mvitv2": Family("mvitv2_tiny", {"img_size": 32}),
    "naflexvit": Family("naflexvit_base_patch16_gap", VIT),
    "nasnet": Family("nasnetalarge", {"stem_size": 8, "num_features": 96}, drop_path=False),
    "nest": Family("nest_tiny", {"img_size": 32, "mlp_ratio": 0.25}),
    "nextvit": Family("nextvit_small", {"depths": [1, 1, 5, 1], "stem_chs": [8, 8, 8]}),
    "nfnet": Family("test_nfnet", {}),
    "pit": Family(
        "pit_ti_224",
        {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": [8] * 3, "depth": [1] * 3, "heads": [1, 2, 4]},
    ),
    "pnasnet": Family("pnasnet5large", {}, drop_path=False),
    "pvt_v2": Family("pvt_v2_b0", {"depths": ONES, "embed_dims": WIDTHS, "num_heads": [1, 2, 2, 4]}),
    "qwen3_vit": Family("qwen3_vit_88m", VIT | {"pos_embed_grid_size": 4}),
    "rdnet": Family("rdnet_tiny", {"num_init_features": 16, "growth_rates": [8] * 7, "num_blocks_list": [1] * 7}),
    "regnet": Family("regnety_002", {"depth": 4, "w0": 16, "wa": 10.0, "wm": 1.5, "group_size": 8, "stem_width": 8}),
    "repghost": Family("repghostnet_050", {}, drop_path=False),
    "repvit": Family("repvit_m1", {"embed_dim": WIDTHS, "depth": ONES}, drop_path=False),
    "res2net": Family("res2net50_26w_4s", RESNET | {"base_width": 16}),
    "resnest": Family("resnest14d", RESNET),
    "resnet": Family("test_resnet", {"channels": WIDTHS}),
    "resnetv2": Family("resnetv2_18", {"layers": ONES, "channels": WIDTHS, "stem_chs": 8}),
    "rexnet": Family("rexnet_100", {"width_mult": 0.25, "depth_mult": 0.5}),
    "selecsls": Family("selecsls42", {}, drop_path=False),
    "senet": Family("legacy_seresnet18", {"layers": ONES}, drop_path=False),
    "sequencer": Family(
        "sequencer2d_s",
        {"img_size": 32, "layers": ONES, "embed_dims": [16, 24, 24, 24], "hidden_sizes": [4, 6, 6, 6]},
    ),
    "shvit": Family(
        "shvit_s1", {"embed_dim": [16, 24, 32], "depth": [1, 1, 1], "partial_dim": [8, 8, 8]}, 64, drop_path=False
    ),
    "sknet": Family("skresnet18", {"layers": ONES, "channels": [16, 16, 32, 32], "stem_width": 16}),
    "starnet": Family("starnet_s050", {"base_dim": 8, "depths": ONES}),
    "swiftformer": Family("swiftformer_xs", {"layers": ONES, "embed_dims": WIDTHS}),
    "swin_transformer": Family("swin_tiny_patch4_window7_224", SWIN),
    "swin_transformer_v2": Family("swinv2_tiny_window8_256", SWIN),
    "swin_transformer_v2_cr": Family("swinv2_cr_tiny_224", SWIN),
    "tiny_vit": Family(
        "tiny_vit_5m_224",
        {"embed_dims": WIDTHS, "depths": ONES, "num_heads": [1, 2, 2, 4], "window_sizes": [4, 4, 4, 4]},
    ),
    "tnt": Family(
        "tnt_s_patch16_224", {"img_size": 32, "embed_dim": 16, "inner_dim": 8, "depth": 2, "num_heads_outer": 2}
    ),
    "tresnet": Family("tresnet_m", {"layers": ONES, "width_factor": 0.125}),
    "twins": Family(
        "twins_svt_small", {"img_size": 32, "embed_dims": WIDTHS, "num_heads": [1, 2, 2, 4], "depths": [2, 2, 2, 2]}
    ),
    "vgg": Family("vgg11", {"mlp_ratio": 0.01}, drop_path=False),
    "visformer": Family("visformer_tiny", {"img_size": 32, "embed_dim": 48, "depth": [1, 1, 1], "num_heads": 2}),
    "vision_transformer": Family("vit_tiny_patch16_224", VIT),
    "vision_transformer_hybrid": Family("vit_tiny_r_s16_p8_224", VIT | {"patch_size": 1}),
    "vision_transformer_relpos": Family("vit_relpos_small_patch16_224", VIT),
    "vision_transformer_sam": Family("samvit_base_patch16_224", VIT | {"window_size": 2, "global_attn_indexes": [1]}),
    "vitamin": Family("vitamin_small_224", {"img_size": 32, "depth": 1}),
    "volo": Family("volo_d1_224", {"img_size": 32, "mlp_ratio": 0.5}),
    # No dropped paths: timm drops those of blocks without a shortcut, and nothing is left of the image.
    "vovnet": Family(
        "ese_vovnet19b_slim_dw",
        {"stem_chs": [8, 8, 8], "stage_conv_chs": WIDTHS, "stage_out_chs": WIDTHS},
        drop_path=False,
    ),
    "xception": Family("legacy_xception", {}, drop_path=False),
    "xception_aligned": Family(
        "xception41p",
        {
            "block_cfg": [
                {"in_chs": 64, "out_chs": 16, "stride": 2},
                {"in_chs": 16, "out_chs": 24, "stride": 2},
                {"in_chs": 24, "out_chs": 32, "no_skip": True, "stride": 2},
            ]
        },
        drop_path=False,
    ),
    "xcit": Family("xcit_nano_12_p8_224", VIT | {"cls_attn_layers": 1}),
}


# Families that timm gained after 1.0.24, the oldest version that is supported.
NEWER = {
    "cpubone",
    "cspnext",
    "deepseek_vit",
    "efficientvim",
    "gemma4_vit",
    "iformer",
    "lcnetv2",
    "lowformer",
    "qwen3_vit",
}


def build_family(name):
    """The small model of a family, the same at every call, with weights at which every layer shows."""
    if name not in FAMILIES:
        raise LookupError(f"timm {timm.__version__} has a family {name!r} that tests/timm_families.py does not list")
    family = FAMILIES[name]
    # timm writes into nested arguments that it is given.
    model_args = DROPOUT | copy.deepcopy(family.model_args)
    if not family.drop_path:
        del model_args["drop_path_rate"]
    config = {"architecture": family.architecture, "num_classes": CLASSES, "model_args": model_args}
    torch.manual_seed(0)
    model = TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(config))
    draw_weights(model)
    take_statistics(model, torch.randn(8, CHANNELS, family.size, family.size))
    return model


@torch.no_grad()
def draw_weights(model):
    """Random weights of the size that keeps the signal; timm's own gates start at or near 0 and hide their layers."""
    for weight in model.parameters():
        if weight.ndim < 2:
            weight.add_(torch.randn_like(weight), alpha=0.3)
        else:
            weight.normal_(0, (2 / weight[0].numel()) ** 0.5)


@torch.no_grad()
def take_statistics(model, images):
    """Let running statistics be those of `images`, and logits vary by 1 over them.

    With untrained statistics a deep network gives one output to all images, and with large logits one class is sure.
    """
    norms = [(module, module.momentum) for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm, _ in norms:
        norm.momentum = None
    spread = model.train()(images).logits.std()
    for norm, momentum in norms:
        norm.momentum = momentum
    heads = model.timm_model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        # Weight and bias; some heads begin with a norm.
        for weight in list(head.parameters())[-2:]:
            weight.div_(spread)


def families():
    """The families of the installed timm, by name."""
    return sorted(timm.list_modules())


def rows():
    """A row of the sweep for every family, one that is not listed too: (name, function that builds it, image side)."""
    for name in families():
        size = FAMILIES[name].size if name in FAMILIES else 32
        yield f"timm/{name}", partial(build_family, name), size
