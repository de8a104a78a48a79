"""Every kernel against the reference, packed rows included."""

import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.model import kernels
from pretrain.model.attention import attention, choose_kernel
from pretrain.model.flex import block_mask
from tests.model.rows import KINDS, layout_of, random_qkv, values_and_gradients

WINDOWS = st.none() | st.integers(1, 40)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@st.composite
def packed_rows(draw, longest: int = 20):
    """One to three rows of up to eight documents, some of one position, and some padding."""
    rows = draw(st.lists(st.lists(st.integers(1, longest), max_size=8), min_size=1, max_size=3))
    length = max(1, *(sum(row) for row in rows)) + draw(st.integers(0, 3))
    return rows, length


def flash_attention_on_cpu(patch):
    """Replace torch's varlen_attn by what its documentation says, so that all around it runs without CUDA."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
        assert cu_q.dtype == torch.int32
        bounds = cu_q.tolist()
        assert bounds[-1] == len(q)
        out = torch.empty_like(q)
        for low, high in pairwise(bounds):
            assert high - low <= max_q == max_k
            i = torch.arange(high - low)
            left, right = (len(i) if side < 0 else side for side in window_size)
            allowed = (i[:, None] - i <= left) & (i - i[:, None] <= right)
            scores = torch.einsum("ihd,jhd->hij", q[low:high], k[low:high]) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
            out[low:high] = torch.einsum("hij,jhd->ihd", weights, v[low:high])
        return out

    patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)


@pytest.fixture(params=["masked", "re-indexed"])
def short_rows(request, monkeypatch):
    """Both ways of the sdpa kernel on rows that are short enough to be masked on the CPU."""
    if request.param == "re-indexed":
        monkeypatch.setattr(kernels, "_SHORT_ROW", 0)


@pytest.fixture(params=["sdpa masked", "sdpa re-indexed", "flex", "dense"])
def kernel(request, monkeypatch):
    """Every kernel of the CPU, sdpa in both of its ways on short rows."""
    if request.param == "sdpa re-indexed":
        monkeypatch.setattr(kernels, "_SHORT_ROW", 0)
    return request.param.split()[0]


def assert_equal(ours, reference, atol=1e-11):
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@settings(max_examples=60, deadline=None)
@given(rows=packed_rows(), kind=st.sampled_from(KINDS), window=WINDOWS, masked=st.booleans())
def test_sdpa_equals_dense_in_values_and_gradients_on_any_rows(rows, kind, window, masked):
    """Short rows both as they are computed on the CPU, masked, and re-indexed like long ones."""
    layout = layout_of(*rows[0], length=rows[1])
    inputs = random_qkv(layout)
    with pytest.MonkeyPatch.context() as patch:
        if not masked:
            patch.setattr(kernels, "_SHORT_ROW", 0)
        ours = values_and_gradients(inputs, layout, kind, "sdpa", window)
    assert_equal(ours, values_and_gradients(inputs, layout, kind, "dense", window))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 1, 64, 65, 150, 299, 300])
def test_sdpa_equals_dense_over_several_blocks_and_buckets(kind, window):
    layout = layout_of([211, 1, 88], [70, 65, 64, 3, 1, 1, 2, 40], [299], length=300)
    inputs = random_qkv(layout)
    assert_equal(*(values_and_gradients(inputs, layout, kind, kernel, window) for kernel in ("sdpa", "dense")))


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_equals_dense_where_documents_of_one_length_fill_the_rows(kind):
    layout = layout_of([40, 40], [40, 40], length=80)
    assert layout.unpacked.in_place
    inputs = random_qkv(layout)
    assert_equal(*(values_and_gradients(inputs, layout, kind, kernel) for kernel in ("sdpa", "dense")))


@settings(max_examples=8, deadline=None)
@given(rows=packed_rows(), kind=st.sampled_from(KINDS), window=WINDOWS)
def test_flex_equals_dense_on_any_rows(rows, kind, window):
    layout = layout_of(*rows[0], length=rows[1])
    with torch.no_grad():
        q, k, v = random_qkv(layout)
        assert_equal(*([attention(q, k, v, layout, kind, kernel, window)] for kernel in ("flex", "dense")))


@settings(max_examples=25, deadline=None)
@given(rows=packed_rows(longest=130), causal=st.booleans(), window=st.sampled_from([None, 1, 5, 127, 128, 129, 300]))
def test_flex_computes_exactly_the_blocks_that_torch_would_find_by_looking_at_every_pair(rows, causal, window):
    layout = layout_of(*rows[0], length=rows[1])
    ours = block_mask(layout, causal, window)
    batch, length = layout.document_ids.shape
    theirs = create_block_mask(ours.mask_mod, batch, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for blocks in ("full_kv_num_blocks", "kv_num_blocks"):
        assert torch.equal(getattr(ours, blocks), getattr(theirs, blocks)), blocks


@settings(max_examples=25, deadline=None)
@given(rows=packed_rows(), kind=st.sampled_from(KINDS), window=WINDOWS)
def test_varlen_around_its_flash_attention_equals_dense_on_any_rows(rows, kind, window):
    layout = layout_of(*rows[0], length=rows[1])
    inputs = random_qkv(layout)
    with pytest.MonkeyPatch.context() as patch:
        flash_attention_on_cpu(patch)
        out = kernels.varlen(*inputs, layout, kind, window)
    gradient = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    inside = (layout.document_ids != 0)[..., None, None]
    ours = [torch.where(inside, out, 0).detach(), *torch.autograd.grad(out, inputs, gradient * inside)]
    assert_equal(ours, values_and_gradients(inputs, layout, kind, "dense", window))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 3])
def test_no_information_crosses_documents_and_triangles_keep_their_side(kernel, kind, window):
    """Row j of the batch has another key and value at position j: no backward pass is needed."""
    length = 11
    layout = layout_of(*[[5, 1, 4]] * (length + 1), length=length)
    q, k, v = (x.detach()[:1].repeat(length + 1, 1, 1, 1) for x in random_qkv(layout, heads=1, width=4))
    for x in (k, v):
        x[range(length), range(length)] += 1.0
    with torch.no_grad():
        out = attention(q, k, v, layout, kind, kernel, window)[:, :, 0]
    changed = ((out[:-1] - out[-1]).abs() > 1e-9).transpose(0, 1)
    influences, documents = (changed[..., :2].any(dim=-1), changed[..., 2:].any(dim=-1)), layout.document_ids[0]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    near = (i - j).abs() < (window or length)
    same = (documents[:, None] == documents) & (documents != 0)
    sides = {"dual_triangle": (j <= i, j >= i), "causal": (j <= i, j <= i), "bidirectional": (same, same)}[kind]
    for influence, side in zip(influences, sides, strict=True):
        assert torch.equal(influence, same & near & side)


@pytest.mark.parametrize("kernel", ["sdpa masked", "sdpa re-indexed", "dense"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 2])
def test_the_jacobian_between_documents_is_zero(kernel, kind, window):
    layout = layout_of([3, 4], length=8)
    inputs = tuple(random_qkv(layout, heads=1, width=4))
    jacobians = torch.autograd.functional.jacobian(lambda *qkv: attention(*qkv, layout, kind, kernel, window), inputs)
    for jacobian in jacobians:
        between = jacobian[0, :, 0, :, 0, :, 0].abs().sum(dim=(1, 3))
        assert not between[:3, 3:].any()
        assert not between[3:7, :3].any()
        assert not between[:, 7:].any()
        assert not between[7:].any()
        assert between[:3, :3].any()
        assert between[3:7, 3:7].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 4])
def test_packed_rows_give_what_each_document_gives_alone(kernel, kind, window):
    lengths = [7, 1, 70, 12, 3]
    packed = layout_of(lengths, length=sum(lengths) + 2)
    q, k, v = (x.detach() for x in random_qkv(packed))
    together = attention(q, k, v, packed, kind, kernel, window)
    start = 0
    for n in lengths:
        piece = slice(start, start + n)
        alone = attention(q[:, piece], k[:, piece], v[:, piece], layout_of([n], length=n), kind, kernel, window)
        torch.testing.assert_close(together[:, piece], alone, rtol=0, atol=1e-12)
        start += n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("rows", [([], []), ([], [4, 2]), ([5], [])])
def test_rows_of_padding_give_zeros_and_finite_gradients(kernel, kind, window, rows):
    layout = layout_of(*rows, length=7)
    inputs = random_qkv(layout)
    if kernel == "flex":
        with torch.no_grad():
            results = [attention(*inputs, layout, kind, kernel, window)]
    else:
        results = values_and_gradients(inputs, layout, kind, kernel, window)
    for result in results:
        assert torch.isfinite(result).all()
        assert not result[layout.document_ids == 0].any()


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lengths", "window"), [([96], None), ([40, 33, 20], None), ([96], 16)])
def test_bf16_is_within_one_percent_of_float64(kind, lengths, window):
    layout = layout_of(lengths, length=96)
    exact = [x.detach().bfloat16().double().requires_grad_() for x in random_qkv(layout, width=32)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    reference = values_and_gradients(exact, layout, kind, "dense", window)
    ours = values_and_gradients(rounded, layout, kind, "sdpa", window)
    for one, other, limit in zip(ours, reference, (0.005, 0.01, 0.01, 0.01), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() / other.norm() < limit


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_windows_make_no_tensor_that_grows_with_the_square_of_the_length(kind):
    sizes = []
    for length in (1024, 4096):
        layout = layout_of([length // 2, length // 2], length=length)
        x = random_qkv(layout, heads=1, width=4)
        with _LargestTensor() as largest:
            attention(*x, layout, kind, "sdpa", 64).sum().backward()
        sizes.append(largest.numel)
    assert sizes[0] <= 1024 * 64 * 3
    assert sizes[1] <= 4 * sizes[0]


def test_padding_of_unpacked_documents_is_bounded_however_their_lengths_differ():
    lengths = [4000, 3999, 1000, 300, 299, 100, 64, 64, 33, 5, 1, 1]
    layout = layout_of(lengths, length=sum(lengths))
    places = [bucket.documents * bucket.longest for bucket in layout.unpacked.buckets]
    long = sum(n for n in lengths if n > 64)
    assert sum(places) <= long / 0.75 + 64 * sum(n <= 64 for n in lengths)
    assert len(places) <= 7


def test_what_kernels_need_is_built_once_for_all_layers():
    layout = layout_of([130, 170], length=300)
    q, k, v = random_qkv(layout)
    attention(q, k, v, layout, "dual_triangle", "sdpa")
    attention(q, k, v, layout, "dual_triangle", "sdpa", 8)
    unpacked, built = layout.unpacked, dict(layout._built)
    attention(q, k, v, layout, "dual_triangle", "sdpa")
    attention(q, k, v, layout, "dual_triangle", "sdpa", 8)
    assert layout.unpacked is unpacked
    assert all(layout._built[key] is value for key, value in built.items())
    assert len(layout._built) == len(built) == 2


@pytest.mark.parametrize("rows", [[[20, 30], [50]], [[50], [50]]])
def test_masks_of_short_rows_are_built_once_for_all_layers(rows):
    layout = layout_of(*rows, length=50)
    q, k, v = random_qkv(layout)
    attention(q, k, v, layout, "dual_triangle", "sdpa")
    built = dict(layout._built)
    attention(q, k, v, layout, "dual_triangle", "sdpa")
    assert built
    assert layout._built.keys() == built.keys()
    assert all(layout._built[key] is value for key, value in built.items())


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("length", [64, 300])
def test_half_precision_on_the_cpu_is_float32_inside_also_under_autocast(length, window):
    layout = layout_of([length], length=length)
    half = [x.detach().bfloat16() for x in random_qkv(layout)]
    expected = attention(*(x.float() for x in half), layout, "dual_triangle", "sdpa", window).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*half, layout, "dual_triangle", "sdpa", window), expected)


def test_auto_says_once_which_kernel_it_chose_and_why(caplog):
    layout = layout_of([4], length=4)
    choose_kernel.__globals__["_announce"].cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            attention(*random_qkv(layout), layout, "dual_triangle")
    assert [r.getMessage() for r in caplog.records] == ["attention kernel auto is sdpa: the kernel for cpu"]


def test_auto_on_cuda_takes_varlen_for_packed_rows_and_windows_in_half_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    cuda, packed, single = torch.device("cuda"), layout_of([2, 2], length=4), layout_of([4], length=4)
    half = torch.bfloat16
    assert choose_kernel(cuda, half, 64, packed, None) == "varlen"
    assert choose_kernel(cuda, half, 64, single, 2) == "varlen"
    assert choose_kernel(cuda, half, 64, single, None) == "sdpa"
    assert choose_kernel(cuda, torch.float32, 64, packed, None) == "sdpa"
    assert choose_kernel(cuda, half, 12, packed, None) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert choose_kernel(cuda, half, 64, packed, None) == "sdpa"


def test_kernels_that_cannot_run_here_are_refused():
    layout = layout_of([2, 2], length=4)
    q, k, v = random_qkv(layout)
    with pytest.raises(ValueError, match="no backward pass on CPU; use kernel sdpa"):
        attention(q, k, v, layout, "dual_triangle", "flex")
    with pytest.raises(ValueError, match="varlen runs on CUDA in bf16 or fp16, not on cpu"):
        attention(q, k, v, layout, "dual_triangle", "varlen")
    with pytest.raises(ValueError, match="no attention kernel 'flash'"):
        attention(q, k, v, layout, "dual_triangle", "flash")
    with pytest.raises(ValueError, match="no attention kind 'full'"):
        attention(q, k, v, layout, "full")
    with pytest.raises(ValueError, match="window of 0"):
        attention(q, k, v, layout, "causal", window=0)
    with pytest.raises(ValueError, match=r"layout\.to\(device\)"):
        attention(q, k, v, layout.to(torch.device("meta")), "causal")


@pytest.mark.usefixtures("short_rows")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("rows", [([], [4, 2], [5]), ([], [5])])
def test_no_call_of_torch_has_a_softmax_over_nothing(kind, window, rows, monkeypatch):
    """What that gives is up to torch: zeros in some versions, NaN in others."""
    call = kernels.F.scaled_dot_product_attention

    def checked(q, k, v, attn_mask=None, is_causal=False):
        if attn_mask is not None:
            seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
            assert seen.any(dim=-1).all()
        return call(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(kernels.F, "scaled_dot_product_attention", checked)
    layout = layout_of(*rows, length=7)
    attention(*random_qkv(layout), layout, kind, "sdpa", window)
