"""The model against known answers: the library's attention and layers, counts by hand, no leak."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as module
from model import (MAE, Attention, Block, draw_masks, forward_flops, parameters, patchify, rotary,
                   unpatchify)

torch.manual_seed(0)

def mixing(model):
    """The same model with random weights: blocks start as the identity, which mixes nothing."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model

def test_a_patch_is_one_sensor_over_consecutive_samples():
    x = torch.arange(6 * 20.0).view(1, 6, 20)                    # channel c, sample t: 20 c + t
    tokens = patchify(x, 5)                                      # (1, 2, 4, 15)
    assert tokens[0, 1, 2].tolist() == [20 * c + t for c in (3, 4, 5) for t in range(10, 15)]
    assert torch.equal(patchify(x[..., :19], 5), tokens[:, :, :3]), "a shorter tail is cut"
    assert torch.equal(unpatchify(tokens, 5), x)

def test_every_token_is_either_visible_or_masked():
    keep, masked = draw_masks(50, 80, 0.75, torch.Generator().manual_seed(1))
    assert keep.shape == (50, 20) and masked.shape == (50, 60)
    assert torch.equal(torch.cat([keep, masked], 1).sort().values, torch.arange(80).expand(50, -1))

def test_masked_patches_never_reach_the_encoder():
    model, x, seen = mixing(MAE(32, 2, 4)), torch.randn(3, 6, 200), []
    model.norm.register_forward_hook(lambda module, inputs, latents: seen.append(latents))
    keep, masked = draw_masks(3, 80, 0.75)
    other = patchify(x, 5).flatten(1, 2)
    other[torch.arange(3)[:, None], masked] = torch.randn(3, 60, 15)
    other = unpatchify(other.view(3, 2, 40, 15), 5)
    losses = [model(windows, keep, masked) for windows in (x, other)]
    assert torch.equal(seen[0], seen[1]) and seen[0].shape == (3, 20, 32)
    assert losses[0].shape == (3,) and (losses[0] != losses[1]).all(), "masked patches are scored"

@pytest.mark.parametrize("target", ["raw", "window"])
def test_a_reconstruction_predicts_what_is_hidden_in_the_units_of_the_signal(target):
    model, x = mixing(MAE(16, 1, 2, target=target)), 3 * torch.randn(4, 6, 200) + 5
    keep, masked = draw_masks(4, 80, 0.75)
    again, batch = model.reconstruct(x, keep, masked), torch.arange(4)[:, None]
    assert patchify(again, 5).flatten(1, 2)[batch, keep].isnan().all()
    scale = x.std(2, keepdim=True) + 0.1 if target == "window" else 1
    error = patchify(((again - x) / scale).square(), 5).flatten(1, 2)[batch, masked].mean((1, 2))
    torch.testing.assert_close(error, model(x, keep, masked))

def test_a_block_equals_the_library_on_the_same_weights():
    ours = mixing(Block(32, 4))
    library = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True,
                                               norm_first=True, bias=False)
    inputs = [ours.attention.query.weight, ours.attention.key_value.weight]
    library.self_attn.in_proj_weight.data = torch.cat(inputs)
    for same, name in {"self_attn.out_proj": "attention.out", "linear1": "up", "linear2": "down",
                       "norm1": "norm1", "norm2": "norm2"}.items():
        library.get_submodule(same).weight.data = ours.get_submodule(name).weight
    x, no_time = torch.randn(2, 7, 32), rotary(torch.zeros(2, 7), 8)
    torch.testing.assert_close(ours(x, no_time), library(x), atol=1e-5, rtol=1e-5)

def test_attention_depends_only_on_the_time_between_two_tokens():
    attention, x, context = mixing(Attention(32, 4)), torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    t, u = torch.randint(9, (2, 7)), torch.randint(9, (2, 5))
    now, both_later, one_later = (
        attention(x, context, rotary(t + later, 8), rotary(u + context_later, 8))
        for later, context_later in ((0, 0), (13, 13), (0, 1)))
    torch.testing.assert_close(both_later, now, atol=1e-4, rtol=1e-4)
    assert (one_later - now).abs().max() > 1e-3

@pytest.mark.parametrize("target", ["raw", "window"])
def test_the_baseline_is_the_mean_of_what_is_visible_of_the_same_target(target):
    x, keep = torch.randn(1, 6, 20), torch.tensor([[0, 2]])      # the gyroscope shows nothing
    model, masked = MAE(16, 1, 2, target=target), torch.tensor([[1, 3, 4, 5, 6, 7]])
    y = model.target_of(x)[0]
    assert target == "raw" or y.mean(1).abs().max() < 1e-6, "each channel less its mean"
    accelerometer = y[:3].view(3, 4, 5)                          # (axes, patches, samples)
    mean = accelerometer[:, [0, 2]].mean((1, 2), keepdim=True)
    errors = [(accelerometer[:, [1, 3]] - mean).square().flatten(), y[3:].square().flatten()]
    torch.testing.assert_close(model.baseline(x, keep, masked)[0], torch.cat(errors).mean())

@pytest.mark.parametrize("width, depth, heads, patch", [(16, 1, 2, 10), (64, 3, 4, 5)])
def test_flops_and_parameters_by_formula_equal_the_count(width, depth, heads, patch):
    model, x = MAE(width, depth, heads, patch), torch.randn(2, 6, 200)
    formula = 2 * forward_flops(model, 200, 0.75)
    with FlopCounterMode(display=False) as forward:
        loss = model(x, *draw_masks(2, 400 // patch, 0.75)).mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == formula
    assert backward.get_total_flops() == pytest.approx(2 * formula, rel=0.03), "input: none"
    encoder = 3 * patch * width + 2 * width + depth * (12 * width ** 2 + 2 * width) + width
    assert parameters(model)[1] == encoder

def test_features_take_windows_of_another_length_and_one_sensor_alone():
    model, x = MAE(16, 1, 2), torch.randn(4, 6, 51)
    both, gyroscope = model.features(x), model.features(x[:, 3:], sensors=[1])
    assert both.shape == (4, 2, 10, 32)
    torch.testing.assert_close(gyroscope, both[:, 1:])                         # blocks don't mix

def test_the_usage_that_the_file_opens_with_runs_and_says_true_shapes():
    lines = [line.strip() for line in module.__doc__.splitlines() if " = " in line and "(" in line]
    exec("\n".join(lines[:4]), names := vars(module).copy())
    assert names["loss"].shape == (8,) and names["features"].shape == (8, 2, 40, 128)
    total, encoder = parameters(MAE(16, 2, 2))
    assert round(total, -3) == 58_000 and round(total - encoder, -3) == 51_000
