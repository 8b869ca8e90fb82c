"""`group_tokens` and `ungroup_tokens`: the order of torch's unfold, every number of axes, and what is refused."""

import einops
import pytest
import torch
import torch.nn.functional as F

from npp_kernels import group_mean, group_tokens, ungroup_tokens


@pytest.mark.parametrize(
    ("shape", "patch"),
    [
        ((2, 8, 8), 1),  # the last stage
        ((2, 8, 8), 2),
        ((2, 8, 8), 8),  # one group
        ((8, 6), (4, 3)),  # no batch, an oblong patch
        ((2, 3, 4, 6), (2, 3)),  # two leading axes
        ((0, 4, 4), 2),  # an empty batch
    ],
)
def test_equals_unfold(shape, patch):
    tokens = torch.randint(1000, shape)
    groups = group_tokens(tokens, patch)
    images = tokens.reshape(-1, 1, *shape[-2:]).double()
    if images.numel():
        kernel = (patch, patch) if isinstance(patch, int) else patch
        expected = F.unfold(images, kernel, stride=kernel).transpose(1, 2).long()
        assert torch.equal(groups.reshape(expected.shape), expected)
    assert torch.equal(ungroup_tokens(groups, patch, grid=shape[-2:]), tokens)


def test_three_axes_and_one():
    video = torch.randint(1000, (2, 4, 6, 8))
    groups = group_tokens(video, (2, 3, 4))
    assert torch.equal(groups, einops.rearrange(video, "b (t a) (h c) (w d) -> b (t h w) (a c d)", a=2, c=3, d=4))
    assert torch.equal(ungroup_tokens(groups, (2, 3, 4), grid=(4, 6, 8)), video)
    text = torch.randint(1000, (2, 12))
    assert torch.equal(group_tokens(text, (4,)), text.view(2, 3, 4))
    assert torch.equal(ungroup_tokens(text.view(2, 3, 4), 4, grid=(12,)), text)


def test_flat_tokens_need_a_grid():
    tokens = torch.randint(1000, (3, 4, 6))
    assert torch.equal(group_tokens(tokens.flatten(1), 2, grid=(4, 6)), group_tokens(tokens, 2))
    assert torch.equal(group_tokens(tokens, 2, grid=(4, 6)), group_tokens(tokens, 2))
    assert torch.equal(group_tokens(torch.arange(8), 4, grid=(8,)), torch.arange(8).view(2, 4))


def test_an_int_is_that_size_on_every_axis_of_the_grid():
    text, images = torch.randint(1000, (8, 64)), torch.randint(1000, (8, 6, 4))
    assert torch.equal(group_tokens(text, 4, grid=(64,)), text.view(8, 16, 4))
    assert torch.equal(group_tokens(text, (4,), grid=text.shape[-1:]), text.view(8, 16, 4))
    assert torch.equal(group_tokens(images, 2), group_tokens(images, (2, 2)))  # three axes: a batch of images
    assert torch.equal(group_tokens(images[0], 2, grid=(6, 4)), group_tokens(images, 2)[0])
    video = torch.randint(1000, (3, 2, 4, 6, 8))
    assert torch.equal(group_tokens(video, 2), group_tokens(video, (2, 2)))
    assert torch.equal(group_tokens(video, 2, grid=(4, 6, 8)), group_tokens(video, (2, 2, 2)))


def test_small_ids_are_grouped_and_the_operations_say_what_they_need():
    groups = group_tokens(torch.arange(16, dtype=torch.uint8).view(1, 4, 4), 2)
    table = torch.randn(16, 3)
    with pytest.raises(TypeError, match=r"groups: expected int32 or int64, got .* uint8 on cpu: pass groups.long\(\)"):
        group_mean(table, groups)
    assert group_mean(table, groups.long()).shape == (1, 4, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_keeps_the_dtype(dtype):
    tokens = torch.arange(16).view(4, 4).to(dtype)
    groups = group_tokens(tokens, (2, 2))
    assert groups.dtype == dtype
    assert ungroup_tokens(groups, 2, grid=(4, 4)).dtype == dtype


def test_transposed_tokens():
    tokens = torch.randint(1000, (4, 6)).t()
    assert torch.equal(group_tokens(tokens, (3, 2)), group_tokens(tokens.contiguous(), (3, 2)))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (((1, 4, 6), 4), {}, ValueError, r"patch: .*\(4, 6\).*4 does not divide 6 on axis 1"),
        (((4, 6), (2, 2, 2)), {}, ValueError, "tokens: expected at least 3 axes"),
        (((24,), (2, 2)), {}, ValueError, "tokens: expected at least 2 axes.*grid="),
        (((8, 64), 4), {}, ValueError, r"patch: expected a tuple, or grid=.*got 4.*\(4,\).*\(4, 4\).*grid=\(H, W\)"),
        (((8, 64), 1), {}, ValueError, "patch: expected a tuple, or grid="),  # it would drop the axis of the batch
        (((24,), 2), {}, ValueError, "patch: expected a tuple, or grid="),
        (((25,), 2), {"grid": (4, 6)}, ValueError, r"grid: expected tokens to end in \(4, 6\) or in 24 flat"),
        (((4, 6), (2,)), {"grid": (4, 6)}, ValueError, "patch: expected one size per grid axis, 2"),
        (((4, 6), 0), {}, ValueError, "patch: expected sizes of at least 1, got 0"),
        (((4, 6), 2.0), {}, TypeError, "patch: expected an int or a tuple of ints, got 2.0"),
        (((4, 6), (1, 1, 1, 1)), {}, ValueError, "patch: expected 1 to 3 axes, got 4"),
    ],
)
def test_errors_name_what_came(arguments, options, error, words):
    shape, patch = arguments
    with pytest.raises(error, match=words):
        group_tokens(torch.zeros(shape, dtype=torch.int64), patch, **options)


def test_other_errors():
    with pytest.raises(TypeError, match=r"tokens: expected an integer dtype, got .*float32"):
        group_tokens(torch.zeros(1, 4, 4), 2)
    with pytest.raises(TypeError, match=r"tokens: expected a torch.Tensor, got list"):
        group_tokens([[1]], 1)
    with pytest.raises(ValueError, match=r"groups: expected \[..., 4, 4\].*got \(4, 3\)"):
        ungroup_tokens(torch.zeros(4, 3, dtype=torch.int64), 2, grid=(4, 4))
    with pytest.raises(ValueError, match="does not divide"):
        ungroup_tokens(torch.zeros(4, 4, dtype=torch.int64), 2, grid=(4, 5))


def test_one_flat_image_without_a_batch():
    tokens = torch.arange(16)
    groups = group_tokens(tokens, 2, grid=(4, 4))
    assert torch.equal(groups, group_tokens(tokens.view(1, 4, 4), 2)[0])
    with pytest.raises(
        ValueError, match=r"grid: expected tokens to end in \(4, 4\) or in 16 flat tokens, got shape \(\)"
    ):
        group_tokens(torch.tensor(3), 2, grid=(4, 4))


def test_a_grid_without_tokens_has_groups_of_none():
    assert group_tokens(torch.zeros(2, 0, 4, dtype=torch.int64), 2, grid=(0, 4)).shape == (2, 0, 4)


def test_tokens_that_only_look_like_the_grid_are_refused():
    """Three axes more than the grid's, and sizes that are larger: neither ends in the grid."""
    with pytest.raises(ValueError, match=r"grid: expected tokens to end in \(2, 4\) or in 8 flat tokens"):
        group_tokens(torch.zeros(1, 4, 4, dtype=torch.int64), 2, grid=(2, 4))
    tokens = torch.arange(2 * 3 * 2 * 16).view(2, 3, 2, 4, 4)
    groups = group_tokens(tokens, 2, grid=(4, 4))
    assert groups.shape == (2, 3, 2, 4, 4)
    assert torch.equal(groups[1, 2, 1], group_tokens(tokens[1, 2, 1][None], 2)[0])


def test_a_patch_of_no_axis_is_refused():
    with pytest.raises(ValueError, match=r"patch: expected 1 to 3 axes, got 0: \(\)"):
        group_tokens(torch.zeros(1, 4, 4, dtype=torch.int64), ())


def test_large_grids_of_flat_tokens():
    """Their size is no small number, which Python has only one of."""
    assert group_tokens(torch.arange(1024).view(1, -1), 2, grid=(32, 32)).shape == (1, 256, 4)
