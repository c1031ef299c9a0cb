"""What follows from the kind of a backbone: optimiser and memory format, for one model of each timm module."""

import pytest
import timm
import torch
from torch import nn

from nearkin.network import RandomKey, default_memory_format, key_randomness, prefers_adamw

SGD = """
    test_byobnet cs3darknet_focus_s cspnext_tiny densenet121 dla46x_c dpn48b test_efficientnet fastvit_t8 ghostnet_050
    hardcorenas_a hgnet_tiny hrnet_w18_small inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
    tf_mobilenetv3_small_minimal_100 nasnetalarge test_nfnet pnasnet5large regnetx_002 repghostnet_050 repvit_m0_9
    res2net50_14w_8s resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 skresnet18 starnet_s1
    tresnet_m vgg11 ese_vovnet19b_slim legacy_xception xception41
""".split()
ADAMW = """
    beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32 test_convnext
    cpubone_nano crossvit_tiny_240 csatv2 davit_tiny deepseek_vit_412m deit_tiny_patch16_224 edgenext_xx_small
    efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224
    fasternet_t0 focalnet_tiny_lrf gcvit_xxtiny gemma4_vit_167m hiera_tiny_224 sam2_hiera_tiny iformer_t
    inception_next_atto levit_128s lowformer_b0 test_mambaout test_coatnet poolformer_s12 gmlp_ti16_224
    mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nest_tiny nextvit_small pit_ti_224 pvt_v2_b0
    qwen3_vit_88m rdnet_tiny sequencer2d_s shvit_s1 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_pcpvt_small
    visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224
    volo_d1_224 xcit_nano_12_p16_224
""".split()
# Modules with both kinds: the other one.
OTHERS = {
    "convnext_tiny": True,
    "convnext_atto_rms": True,
    "fastvit_sa12": True,
    "resnet50_clip": True,
    "mobilenetv4_hybrid_medium": True,
    "mobilenetv4_conv_small": False,
    "resnet50": False,
    "seresnet50": False,
    "ecaresnet26t": False,
    "vgg11_bn": False,
    "efficientnet_b0": False,
    "resnetv2_50x1_bit": False,
    "repvgg_a0": False,
    "mixer_s32_224": True,
    "caformer_s18": True,
}


def on_meta(model):
    with torch.device("meta"):
        return timm.create_model(model, num_classes=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", [*SGD, *ADAMW])
def test_three_images_pass_through_a_model_of_each_module_in_training(model):
    """Each dropout knows which image an entry belongs to, or that it belongs to none."""
    key, size = RandomKey(), on_meta(model).pretrained_cfg["input_size"]
    with torch.device("meta"):
        backbone = timm.create_model(model, num_classes=0, drop_rate=0.1)
    key_randomness(backbone, key).train()
    key.set(0, 0, 0, 1)
    key.begin(3)
    assert len(backbone(torch.empty(3, *size, device="meta"))) == 3


def test_the_table_has_a_model_of_each_module_of_timm():
    modules = {
        name: {module} for module in timm.list_modules() for name in timm.list_models(module=module)
    }
    assert set().union(*(modules[m] for m in SGD + ADAMW)) == set(timm.list_modules())


@pytest.mark.parametrize(
    ("model", "expected"),
    [*((m, False) for m in SGD), *((m, True) for m in ADAMW), *OTHERS.items()],
)
def test_the_optimiser_follows_from_the_modules(model, expected):
    assert prefers_adamw(on_meta(model)) is expected


class Plain(nn.Module):
    """No model of timm: no description of its first convolution."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (nn.BatchNorm2d(4), False),
        (nn.GroupNorm(2, 4), False),
        (nn.GroupNorm(1, 4), True),
        (nn.LayerNorm(4), True),
        (nn.RMSNorm(4), True),
        (nn.MultiheadAttention(4, 2), True),
    ],
)
def test_the_optimiser_of_a_module_that_timm_does_not_know(part, expected):
    assert prefers_adamw(Plain(nn.Conv2d(3, 4, 3), part)) is expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("resnet18", "channels_last"),
        ("efficientnet_b0", "channels_last"),
        ("efficientformerv2_s0", "channels_last"),
        ("poolformer_s12", "channels_last"),
        ("test_vit", "contiguous"),
        ("swin_tiny_patch4_window7_224", "contiguous"),
        ("mixer_s32_224", "contiguous"),
        ("levit_128s", "contiguous"),
    ],
)
def test_the_memory_format_follows_from_the_share_of_convolutions(model, expected):
    module = on_meta(model)
    assert default_memory_format(module, "cpu", 17) == expected
    assert default_memory_format(module, "cpu", 16) == "contiguous"
    assert default_memory_format(module, "cuda", 16) == "channels_last"
    assert default_memory_format(module, "mps", 224) == "contiguous"
