"""The product-key memory lookup as one differentiable operation, and its C++ helper (see product_key_memory.cc for the maths).

The helper is compiled on first use. Without a compiler or AVX-512 the same thing is computed with plain torch, ten times slower.
"""
import ctypes
import hashlib
import os
import subprocess
import tempfile

import torch

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "product_key_memory.cc")


def load_helper(cache_dir):
    """The compiled helper, or None where it cannot be built or this processor has no AVX-512."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return None
    digest = hashlib.sha256(open(SOURCE, "rb").read()).hexdigest()[:16]
    library = os.path.join(cache_dir, f"product_key_memory-{digest}.so")
    if not os.path.exists(library):
        os.makedirs(cache_dir, exist_ok=True)
        partial = tempfile.mktemp(suffix=".so", dir=cache_dir)
        command = ["g++", "-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-o", partial, SOURCE]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"product_key_memory: no C++ helper ({error}); plain torch is about ten times slower")
            return None
        os.replace(partial, library)
    return ctypes.CDLL(library)


def pointer(tensor):
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


class MemoryLookup(torch.autograd.Function):
    """pooled [num_tokens, v_dim] of query [num_tokens, mem_heads, 2, half_dim].

    The table's gradient is added straight to table.grad (several layers share the table; a dense gradient per layer would cost more
    than the lookup), so table.grad must exist before the backward pass.
    """

    @staticmethod
    def forward(ctx, query, half_keys, table, knn, helper):
        num_tokens, mem_heads, _, half_dim = query.shape
        n_keys, v_dim = half_keys.shape[2], table.shape[1]
        query, half_keys = query.contiguous(), half_keys.contiguous()
        half_keys_t = half_keys.transpose(2, 3).contiguous()
        pairs = torch.empty(num_tokens, mem_heads, knn, 2, dtype=torch.int32)
        weights = torch.empty(num_tokens, mem_heads, knn)
        pooled = torch.empty(num_tokens, v_dim)
        helper.MemoryForward(pointer(query), pointer(half_keys_t), pointer(table), num_tokens, mem_heads, half_dim, n_keys, knn, v_dim,
                             pointer(pairs), pointer(weights), pointer(pooled))
        ctx.save_for_backward(query, half_keys, pairs, weights)
        ctx.table, ctx.helper = table, helper
        return pooled

    @staticmethod
    def backward(ctx, pooled_grad):
        query, half_keys, pairs, weights = ctx.saved_tensors
        num_tokens, mem_heads, knn, _ = pairs.shape
        table = ctx.table
        pooled_grad = pooled_grad.contiguous()
        query_grad, half_keys_grad = torch.zeros_like(query), torch.zeros_like(half_keys)
        ctx.helper.MemoryBackward(pointer(query), pointer(half_keys), pointer(table), num_tokens, mem_heads, query.shape[3],
                                  half_keys.shape[2], knn, table.shape[1], pointer(pairs), pointer(weights), pointer(pooled_grad),
                                  pointer(query_grad), pointer(half_keys_grad), pointer(table.grad))
        return query_grad, half_keys_grad, None, None, None


def search_with_torch(query, half_keys, knn):
    """rows and softmax weights [num_tokens, mem_heads, knn]: the maths, plainly."""
    n_keys = half_keys.shape[2]
    half_score = torch.einsum("thsd,hsid->thsi", query, half_keys)
    best, index = half_score.topk(knn, dim=-1)
    sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
    score, chosen = sums.topk(knn, dim=-1)
    i = index[:, :, 0].gather(-1, chosen // knn)
    j = index[:, :, 1].gather(-1, chosen % knn)
    return i * n_keys + j, score.softmax(-1)


def lookup_with_torch(query, half_keys, table, knn):
    rows, weights = search_with_torch(query, half_keys, knn)
    return (table[rows.flatten(1)] * weights.flatten(1)[..., None]).sum(1)


def lookup(query, half_keys, table, knn, helper):
    if helper is None:
        return lookup_with_torch(query, half_keys, table, knn)
    return MemoryLookup.apply(query, half_keys, table, knn, helper)


def clear_cases(query, half_keys, knn, margin=1e-3):
    """The tokens whose selection does not hang on scores closer than the margin: the helper takes close scores for equal."""
    best = torch.einsum("thsd,hsid->thsi", query, half_keys).topk(knn + 1, dim=-1).values
    sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2).topk(knn + 1, dim=-1).values
    gaps = torch.cat([-best.diff(dim=-1).flatten(1), -sums.diff(dim=-1).flatten(1)], 1)
    return query[gaps.min(1).values > margin]


def check_helper(helper):
    """Compares the helper with plain torch: values and all gradients. Returns the largest difference relative to the largest element."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for mem_heads, half_dim, n_keys, knn, v_dim in ((4, 16, 160, 8, 64), (4, 8, 128, 8, 64), (2, 12, 48, 5, 128)):
        query = torch.randn(400, mem_heads, 2, half_dim, generator=generator)
        half_keys = torch.randn(mem_heads, 2, n_keys, half_dim, generator=generator)
        query = clear_cases(query, half_keys, knn)
        assert len(query) > 50
        table = torch.randn(n_keys**2, v_dim, generator=generator)
        upstream = torch.randn(len(query), v_dim, generator=generator)
        results = []
        for use in (helper, None):
            leaves = [x.clone().requires_grad_() for x in (query, half_keys, table)]
            leaves[2].grad = torch.zeros_like(table)
            pooled = lookup(*leaves, knn, use)
            pooled.backward(upstream)
            results.append([pooled.detach()] + [x.grad for x in leaves])
        worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results)))
    return worst
