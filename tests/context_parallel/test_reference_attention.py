"""The reference attention pair against torch's own attention and autograd."""

import torch
from torch.nn import functional as F

from megatron_eagle.context_parallel.layout import Segment, zigzag
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention


def test_forward_and_backward_equal_masked_attention():
    torch.manual_seed(0)
    length, heads, groups, size = 24, 6, 2, 8
    bounds = [0, 1, 10, 24]
    q, k, v = (torch.randn(length, n, size, requires_grad=True) for n in (heads, groups, groups))
    document = torch.bucketize(torch.arange(length), torch.tensor(bounds[1:]), right=True)
    mask = (document[:, None] == document[None]).tril()
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)

    backend, segments, scale = ReferenceAttention(), zigzag(length, 1).segments(0, bounds), size**-0.5
    with torch.no_grad():
        out, lse = backend.forward(q, k, v, segments, scale, causal=True)
        grads = backend.backward(grad, q, k, v, out, lse, segments, scale, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(heads // groups, 1)) * scale
    torch.testing.assert_close(lse, scores.masked_fill(~mask, float("-inf")).logsumexp(-1))


def test_parts_of_the_keys_add_up_to_all_of_them():
    """Blocks without a mask, one of which some queries do not see: with the whole's statistics their
    gradients are shares of the whole's."""
    torch.manual_seed(0)
    q, grad = (torch.randn(6, 4, 8) for _ in range(2))
    k, v = (torch.randn(10, 2, 8) for _ in range(2))
    backend, scale = ReferenceAttention(), 8**-0.5
    whole = (Segment(0, 2, 0, 3), Segment(2, 6, 3, 10))
    out, lse = backend.forward(q, k, v, whole, scale, causal=False)
    grads = backend.backward(grad, q, k, v, out, lse, whole, scale, causal=False)
    # Of the first document the second part has nothing.
    parts = [
        ([0, 1, 2, 3, 4], (Segment(0, 2, 0, 3), Segment(2, 6, 3, 5))),
        ([5, 6, 7, 8, 9], (Segment(0, 2, 0, 0), Segment(2, 6, 0, 5))),
    ]
    total, sums = torch.zeros_like(out), [torch.zeros_like(x) for x in (q, k, v)]
    for keys, segments in parts:
        part, part_lse = backend.forward(q, k[keys], v[keys], segments, scale, causal=False)
        assert not part_lse.isnan().any()
        total += part * (part_lse - lse).exp().t()[..., None]
        shares = backend.backward(grad, q, k[keys], v[keys], out, lse, segments, scale, causal=False)
        for place, rows, share in zip(sums, (slice(None), keys, keys), shares, strict=True):
            place[rows] += share
    assert part_lse[:, :2].isneginf().all() and not part[:2].any()
    torch.testing.assert_close(total, out)
    for found, wanted in zip(sums, grads, strict=True):
        torch.testing.assert_close(found, wanted)
