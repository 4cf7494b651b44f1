"""The reference attention pair against torch's own attention and autograd."""

import torch
from torch.nn import functional as F

from megatron_eagle.context_parallel.layout import zigzag
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
        out, lse = backend.forward(q, k, v, segments, scale)
        grads = backend.backward(grad, q, k, v, out, lse, segments, scale)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(heads // groups, 1)) * scale
    torch.testing.assert_close(lse, scores.masked_fill(~mask, float("-inf")).logsumexp(-1))
