"""Encoder, decoder and heads: sizes, first weights, norms and activations."""

import itertools
import math

import pytest
import torch
from helpers.agents import (
    DEPTH, LAYERS, SHAPES, UNITS, B, C, T, both_twins, close, every_script, make, make_batch,
    row_of,
)  # fmt: skip
from torch import nn

import dreamerv1
import dreamerv2

# Sizes

COUNTS = {  # preset, image channels, actions -> encoder, RSSM, decoder, world model, actor, critic
    (dreamerv1, "dmc_pixels", 3, 6): (690_144, 557_920, 3_795_555, 5_296_820, 578_412, 413_601),
    (dreamerv1, "atari", 3, 6): (690_144, 557_920, 3_795_555, 5_710_421, 576_006, 413_601),
    (dreamerv2, "atari", 1, 18):
        (1_549_776, 5_664_848, 10_497_553, 19_975_379, 1_138_418, 1_131_601),
    (dreamerv2, "atari", 1, 6):
        (1_549_776, 5_657_648, 10_497_553, 19_968_179, 1_133_606, 1_131_601),
    (dreamerv2, "dmc_pixels", 3, 6):
        (1_551_312, 1_247_248, 9_886_611, 13_656_772, 976_012, 971_601),
}  # fmt: skip


@pytest.mark.parametrize("setting", COUNTS, ids=lambda x: f"{x[0].__name__}-{x[1]}-{x[3]}")
def test_parameter_counts_equal_the_authors(setting):
    script, preset, channels, actions = setting
    args = script.Args(**script.PRESETS[preset])
    assert args.grayscale == (channels == 1)
    script.resolve_auto(args, torch.device("cpu"), discrete=preset == "atari")
    with torch.device("meta"):
        agent = script.make_agent({"image": (channels, 64, 64), "action": (actions,)}, args)
    model = agent["world_model"]
    modules = (model.encoder, model.rssm, model.decoder, model, agent["actor"], agent["critic"])
    assert tuple(sum(p.numel() for p in m.parameters()) for m in modules) == COUNTS[setting]


def test_each_head_of_dreamerv1_has_its_number_of_layers():
    x = make(dreamerv1, SHAPES, layers=5, reward_layers=1, discount_layers=3, critic_layers=4)
    model = x.world_model
    five = (model.encoder.mlp, model.decoder.mlp[0], x.actor.mlp)
    assert [len(mlp) for mlp in five] == [5, 5, 5]
    assert [len(head.mlp) for head in (model.reward, model.discount, x.critic)] == [1, 3, 4]


def shapes_through(module, x):
    """The output shape of every layer of a Sequential, without the batch."""
    shapes = []
    for layer in module:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


@both_twins
def test_the_encoder_halves_images_four_times_and_the_decoder_grows_them_from_one_pixel(script):
    model = make(script, ("image",)).world_model
    shapes = shapes_through(model.encoder.conv, torch.randn(3, C, 64, 64))
    assert shapes == [(DEPTH, 31, 31), (4, 14, 14), (8, 6, 6), (16, 2, 2)]
    assert model.encoder.size == model.decoder.linear.out_features == 32 * DEPTH
    shapes = shapes_through(model.decoder.conv, torch.randn(3, 32 * DEPTH, 1, 1))
    assert shapes == [(8, 5, 5), (4, 13, 13), (DEPTH, 30, 30), (C, 64, 64)]


@both_twins
@pytest.mark.parametrize(
    ("keys", "size"), [(("image",), 64), (("vector",), UNITS), (tuple(SHAPES), 64 + UNITS)]
)
def test_images_vectors_or_both_are_encoded_and_decoded(script, keys, size):
    x, batch = make(script, keys), make_batch(keys)
    model, feat_size = x.world_model, x.rssm.feat_size
    embed, recon = model.encoder(batch), model.decoder(torch.randn(T, B, feat_size))
    assert embed.shape == (T, B, size)
    assert model.encoder.size == size
    assert {k: v.shape[2:] for k, v in recon.items()} == {k: SHAPES[k] for k in keys}
    close(model.encoder(row_of(batch, 4)), embed[4])  # rows as well as windows
    for key in keys:  # every part is seen, by its own row only
        changed = batch | {key: batch[key].clone()}
        changed[key][2, 1] = 0
        moved = (model.encoder(changed) != embed).any(-1)
        assert moved.nonzero().tolist() == [[2, 1]]


@every_script
def test_pixels_are_centered_at_zero(script):
    image = torch.tensor([0, 51, 255], dtype=torch.uint8)
    close(script.pixels(image), torch.tensor([-0.5, -0.3, 0.5]))
    assert script.pixels(image).dtype == torch.float32


# Norms and activations

ACTIVATIONS = {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}
# Hidden dense layers: 3 of the RSSM, of encoder, decoder and actor, of the other heads.
DENSE = {dreamerv1: 3 + 3 * LAYERS + 1 + 3 + 4, dreamerv2: 3 + 3 * LAYERS + 4 * LAYERS}


@both_twins
@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize(("act", "other"), [("relu", "silu"), ("elu", "relu"), ("silu", "elu")])
def test_norm_and_activation_are_in_every_hidden_layer_and_in_no_output(script, act, other, norm):
    two = {"cnn_act": other} if script is dreamerv1 else {}  # one for convolutions
    agent = make(script, SHAPES, act=act, norm=norm, **two).agent
    kinds = {True: ACTIVATIONS[act], False: ACTIVATIONS[two.get("cnn_act", act)]}  # dense or not
    sequences = [m for m in agent.modules() if isinstance(m, nn.Sequential)]
    hidden = [m for m in sequences if isinstance(m[-1], tuple(ACTIVATIONS.values()))]
    for layer, *norms, activation in hidden:
        dense = isinstance(layer, nn.Linear)
        assert type(activation) is kinds[dense]
        assert [m.channels_first for m in norms] == ([not dense] if norm == "layer" else [])
        assert all(m.normalized_shape == layer.bias.shape for m in norms)
    assert sum(isinstance(m[0], nn.Linear) for m in hidden) == DENSE[script]
    assert len(hidden) - DENSE[script] == 4 + 3  # convolutions
    modules = list(agent.modules())
    assert sum(isinstance(m, tuple(ACTIVATIONS.values())) for m in modules) == len(hidden)
    norms = [m for m in modules if isinstance(m, nn.LayerNorm)]
    gru_norms = 1 if script is dreamerv2 else 0
    assert len(norms) == gru_norms + (len(hidden) if norm == "layer" else 0)
    for m in norms:  # the identity, with the epsilon of Keras
        assert m.eps == 1e-3
        assert (m.weight == 1).all()
        assert not m.bias.any()


@both_twins
def test_the_norm_of_a_convolution_is_over_the_channels_of_each_pixel(script):
    conv = script.block(nn.Conv2d(3, 5, 4), script.Args(norm="layer"))
    norm, x = conv[1], 4 * torch.randn(3, 5, 2, 7) + 1
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    y = norm(x)
    assert y.shape == x.shape
    for n, h, w in itertools.product(range(3), range(2), range(7)):
        pixel = x[n, :, h, w]
        scaled = (pixel - pixel.mean()) / (pixel.var(correction=0) + 1e-3).sqrt()
        close(y[n, :, h, w], scaled * norm.weight + norm.bias, atol=1e-5)


# First weights


def check_glorot(weight, fans):
    limit, slack = math.sqrt(6 / fans), 6 / math.sqrt(weight.numel())
    assert limit * (1 - slack) < weight.abs().max() <= limit
    assert abs(weight.mean()) < slack * limit
    assert abs(weight.std() * math.sqrt(3) / limit - 1) < slack


@both_twins
def test_weights_are_glorot_uniform_and_biases_zero(script):
    agent, kinds = make(script, SHAPES, norm="layer", units=60, cnn_depth=8).agent, set()
    for layer in agent.modules():
        if isinstance(layer, nn.Linear):
            fans = layer.in_features + layer.out_features
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fans = (layer.in_channels + layer.out_channels) * math.prod(layer.kernel_size)
        else:
            continue
        kinds.add(type(layer))
        check_glorot(layer.weight.detach(), fans)
        assert not layer.bias.any()
    assert kinds == {nn.Linear, nn.Conv2d, nn.ConvTranspose2d, script.PixelDeconv}


def test_the_gru_of_dreamerv1_starts_glorot_uniform_from_input_and_orthogonal_from_state():
    gru = make(dreamerv1, hidden=80, deter=50).rssm.gru
    check_glorot(gru.weight_ih.detach(), 80 + 3 * 50)  # Keras has the three gates in one matrix
    close(gru.weight_hh.T @ gru.weight_hh, torch.eye(50), atol=1e-5)
    assert gru.weight_hh.shape == (150, 50)
    assert not gru.bias_ih.any()
    assert not gru.bias_hh.any()
