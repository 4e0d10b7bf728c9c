"""The model against known answers: the library's attention and layers, counts by hand, and what must not leak."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from data import Refused
from model import (MAE, Attention, Block, baseline_loss, draw_masks, forward_flops, parameters, patchify,
                   rotary_table, rotate, visible_tokens)

torch.manual_seed(0)


def test_a_patch_is_one_sensor_over_consecutive_samples():
    x = torch.arange(6 * 20.0).view(1, 6, 20)                    # channel c, sample t holds 20 c + t
    tokens = patchify(x, 5)                                      # (1, 2, 4, 15)
    assert tokens.shape == (1, 2, 4, 15)
    assert tokens[0, 1, 2].tolist() == [20 * c + t for c in (3, 4, 5) for t in range(10, 15)]
    assert torch.equal(patchify(x[..., :19], 5), tokens[:, :, :3]), "a tail shorter than a patch is cut"


@pytest.mark.parametrize("masking", ["patch", "time", "span"])
def test_every_token_is_either_visible_or_masked(masking):
    keep, masked = draw_masks(50, 2, 40, 0.75, masking, torch.Generator().manual_seed(1))
    assert keep.shape == (50, 20) and masked.shape == (50, 60)
    assert torch.equal(torch.cat([keep, masked], 1).sort().values, torch.arange(80).expand(50, -1))
    hidden = torch.zeros(50, 80).scatter_(1, masked, 1).view(50, 2, 40)
    if masking == "time":
        assert torch.equal(hidden[:, 0], hidden[:, 1]), "a hidden time step is hidden in both sensors"
    neighbours = (hidden[..., 1:] == hidden[..., :-1]).float().mean()
    assert (neighbours > 0.8) == (masking == "span"), "only spans make neighbours alike"


def test_masked_patches_never_reach_the_encoder():
    model, x = MAE(32, 2, 4), torch.randn(3, 6, 200)
    for p in model.parameters():                                 # blocks start as the identity: have them mix
        torch.nn.init.normal_(p, std=0.1)
    keep, masked = draw_masks(3, 2, 40, 0.75)
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, latents: seen.append(latents))
    other = x.clone().view(3, 2, 3, 40, 5)
    for b in range(3):
        for token in masked[b]:
            other[b, token // 40, :, token % 40] = torch.randn(3, 5)
    losses = [model(window, keep, masked) for window in (x, other.view(3, 6, 200))]
    assert torch.equal(seen[0], seen[1]) and seen[0].shape == (3, 20, 32)
    assert losses[0] != losses[1], "what is masked is what is scored"


def test_attention_equals_the_library():
    attention = Attention(32, 4)
    x, context = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    turns = rotary_table(9, 8)
    turn_x, turn_context = turns[torch.randint(9, (2, 7))][:, None], turns[torch.randint(9, (2, 5))][:, None]
    split = lambda y: y.view(2, -1, 4, 8).transpose(1, 2)
    k, v = attention.key_value(context).chunk(2, -1)
    q, k = rotate(split(attention.query(x)), turn_x), rotate(split(k), turn_context)
    expected = F.scaled_dot_product_attention(q, k, split(v), scale=1.0)     # 1 / sqrt(Dh) is in the turns
    torch.testing.assert_close(attention(x, context, turn_x, turn_context),
                               attention.out(expected.transpose(1, 2).reshape(2, 7, 32)))


def test_block_equals_the_library_on_the_same_weights():
    ours = Block(32, 4)
    library = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True,
                                               bias=False)
    qkv = torch.cat([ours.attention.query.weight, ours.attention.key_value.weight])
    library.self_attn.in_proj_weight.data = qkv.detach()
    for mine, theirs in ((ours.attention.out, library.self_attn.out_proj), (ours.up, library.linear1),
                         (ours.down, library.linear2), (ours.norm1, library.norm1), (ours.norm2, library.norm2)):
        theirs.weight.data = mine.weight.detach()
    x, no_turn = torch.randn(2, 7, 32), torch.full((2, 1, 7, 4), 8 ** -0.25, dtype=torch.complex64)
    torch.testing.assert_close(ours(x, no_turn), library(x), atol=1e-5, rtol=1e-5)


def test_rotary_attention_sees_only_the_time_between_two_tokens():
    turns, q, k = rotary_table(30, 8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    score = lambda t, u: (rotate(q, turns[t]) * rotate(k, turns[u])).sum()
    torch.testing.assert_close(score(3, 7), score(20, 24))
    assert abs(score(3, 7) - score(3, 8)) > 1e-3


def test_baseline_is_the_mean_of_what_is_visible():
    x = torch.randn(1, 6, 20)
    keep, masked = torch.tensor([[0, 2]]), torch.tensor([[1, 3, 4, 5, 6, 7]])      # the gyroscope shows nothing
    seen = torch.cat([x[0, :3, 0:5], x[0, :3, 10:15]], 1).mean(1)
    errors = baseline_loss(x, keep, masked, 5)
    torch.testing.assert_close(errors[0, 0].view(3, 5), (x[0, :3, 5:10] - seen[:, None]) ** 2)
    torch.testing.assert_close(errors[0, 2].view(3, 5), x[0, 3:, 0:5] ** 2)


@pytest.mark.parametrize("width, depth, heads, patch", [(16, 1, 2, 10), (64, 3, 4, 5)])
def test_flops_and_parameters_by_formula_equal_the_count(width, depth, heads, patch):
    steps, model = 200 // patch, MAE(width, depth, heads, patch, steps=200 // patch)
    x, masks = torch.randn(2, 6, 200), draw_masks(2, 2, steps, 0.75)
    formula = forward_flops(width, depth, patch, 2, steps, 0.75, 64, 1)
    with FlopCounterMode(display=False) as forward:
        loss = model(x, *masks)
    assert forward.get_total_flops() == 2 * formula
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == pytest.approx(2 * 2 * formula, rel=0.03), "the input needs none"
    encoder = 3 * patch * width + 2 * width + depth * (12 * width ** 2 + 2 * width) + width
    assert parameters(model)[1] == encoder
    assert visible_tokens(80, 0.75) == 20


def test_features_take_windows_of_another_length():
    model = MAE(16, 1, 2)
    assert model.features(torch.randn(4, 6, 51)).shape == (4, 2, 10, 16)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(Refused, match="heads"):
        MAE(30, 1, 4)
