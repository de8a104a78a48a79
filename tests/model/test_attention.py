"""Attention against its definition, in float64."""

import math

import pytest
import torch

from pretrain.batch import Batch
from pretrain.model.attention import attention
from pretrain.model.kernels import reverse
from pretrain.model.layout import AttentionLayout
from tests.model.rows import KINDS, layout_of, random_qkv, values_and_gradients


def literal_attention(q, k, v, documents, may_attend):
    """One softmax per query, element by element, from the definition."""
    out = torch.zeros_like(v)
    rows, length, heads, width = q.shape
    for b in range(rows):
        for i in range(length):
            seen = [
                j for j in range(length) if documents[b, i] and documents[b, i] == documents[b, j] and may_attend(i, j)
            ]
            for h in range(heads):
                weights = [math.exp(float(q[b, i, h] @ k[b, j, h]) / math.sqrt(width)) for j in seen]
                for weight, j in zip(weights, seen, strict=True):
                    out[b, i, h] += weight / sum(weights) * v[b, j, h]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 8, 9])
def test_dense_dual_triangle_is_two_softmaxes_over_past_and_future(window):
    layout, reach = layout_of([5, 1, 3], [7], [9], length=9), window or 9
    q, k, v = (t.detach() for t in random_qkv(layout))
    halves = [t.chunk(2, dim=-1) for t in (q, k, v)]
    past = literal_attention(*(half[0] for half in halves), layout.document_ids, lambda i, j: i - reach < j <= i)
    future = literal_attention(*(half[1] for half in halves), layout.document_ids, lambda i, j: i <= j < i + reach)
    torch.testing.assert_close(
        attention(q, k, v, layout, "dual_triangle", "dense", window),
        torch.cat((past, future), dim=-1),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("kind", "window", "may_attend"),
    [
        ("causal", None, lambda i, j: j <= i),
        ("causal", 2, lambda i, j: i - 2 < j <= i),
        ("bidirectional", None, lambda *_: True),
        ("bidirectional", 2, lambda i, j: abs(i - j) < 2),
    ],
)
def test_dense_causal_and_bidirectional_are_their_definitions(kind, window, may_attend):
    layout = layout_of([4, 2], [6], length=7)
    q, k, v = (t.detach() for t in random_qkv(layout))
    expected = literal_attention(q, k, v, layout.document_ids, may_attend)
    torch.testing.assert_close(attention(q, k, v, layout, kind, "dense", window), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[9, 9], [1, 9], [4, 7], [0, 3]])
def test_sdpa_equals_dense_in_values_and_gradients(kind, lengths):
    layout = layout_of(*([n] if n else [] for n in lengths), length=9)
    inputs = random_qkv(layout)
    results = (values_and_gradients(inputs, layout, kind, kernel) for kernel in ("sdpa", "dense"))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["sdpa", "dense"])
def test_the_lower_half_never_sees_the_future_nor_the_upper_half_the_past(kernel):
    layout = layout_of([6], length=6)
    q, k, v = random_qkv(layout, heads=1, width=4)
    jacobian = torch.autograd.functional.jacobian(
        lambda value: attention(q, k, value, layout, "dual_triangle", kernel), v
    )[0, :, 0, :, 0, :, 0].abs()
    lower, upper = jacobian[:, :2, :, :2].sum(dim=(1, 3)), jacobian[:, 2:, :, 2:].sum(dim=(1, 3))
    assert torch.equal(lower != 0, torch.ones(6, 6, dtype=torch.bool).tril())
    assert torch.equal(upper != 0, torch.ones(6, 6, dtype=torch.bool).triu())
    assert not jacobian[:, :2, :, 2:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_gives_zeros_and_changes_nothing(kind):
    padded, bare = layout_of([5], length=8), layout_of([5], length=5)
    q, k, v = random_qkv(padded)
    out = attention(q, k, v, padded, kind)
    assert not out[:, 5:].any()
    torch.testing.assert_close(out[:, :5], attention(q[:, :5], k[:, :5], v[:, :5], bare, kind), rtol=0, atol=1e-14)


def test_reversal_mirrors_each_document_and_is_its_own_inverse():
    layout = layout_of([3, 1, 2], [6], length=7)
    assert layout.reversal.tolist() == [[2, 1, 0, 3, 5, 4, 6], [5, 4, 3, 2, 1, 0, 6]]
    (x, _, _) = random_qkv(layout)
    assert torch.equal(reverse(reverse(x, layout), layout), x)


def test_a_document_that_does_not_begin_its_row_is_not_the_one_document_of_its_row():
    assert layout_of([2], [3], length=3).one_document_per_row
    documents, positions = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([[0, 0, 1], [0, 1, 2]])
    layout = AttentionLayout.from_batch(Batch(documents, documents, documents, positions))
    assert not layout.one_document_per_row
    assert not layout_of([1, 2], [3], length=3).one_document_per_row


def test_a_document_joins_a_bucket_from_three_quarters_of_the_longest_on():
    lengths = ([100, 75], [100, 74], [64, 1], [200, 150, 149, 112, 111])
    buckets = [layout_of(documents, length=1000).unpacked.buckets for documents in lengths]
    assert [[b.documents for b in found] for found in buckets] == [[2], [1, 1], [2], [2, 2, 1]]


def test_the_layout_refuses_positions_that_do_not_restart_with_the_document():
    documents = torch.tensor([[1, 1, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 3]])
    with pytest.raises(ValueError, match="count up from 0"):
        AttentionLayout.from_batch(Batch(documents, documents, documents, positions))


def test_unfitting_shapes_and_odd_heads_are_refused():
    layout = layout_of([4], length=4)
    q, k, v = random_qkv(layout, width=4)
    with pytest.raises(ValueError, match="layout's"):
        attention(q[:, :3], k, v, layout, "causal")
    with pytest.raises(ValueError, match="two sub-heads"):
        attention(q[..., :3], k[..., :3], v[..., :3], layout, "dual_triangle")
