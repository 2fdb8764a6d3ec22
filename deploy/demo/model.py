"""The memory-augmented Llama, for training. Module names give the tensor names of the published implementation."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from product_key_memory import lookup


@dataclass
class ModelConfig:
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    vocab_size: int
    memory_layers: tuple = ()  # empty: the dense twin
    mem_n_keys: int = 128
    mem_heads: int = 4
    mem_knn: int = 8
    mem_k_dim: int = 32
    mem_v_dim: int = 64
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_seqlen: int = 256

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    def as_checkpoint_config(self):
        """config.json: the published implementation's spelling, flat. multiple_of is chosen so that its width rule gives ffn_dim."""
        assert int(2 * 4 * self.dim / 3) <= self.ffn_dim
        return {
            "model_type": "memory_llama",
            "dim": self.dim,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_heads,
            "head_dim": self.head_dim,
            "ffn_dim_multiplier": None,
            "multiple_of": self.ffn_dim,
            "norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "init_base_std": None,
            "init_std_factor": "disabled",
            "max_seqlen": self.max_seqlen,
            "productkey_args": {
                "is_enabled": bool(self.memory_layers),
                "layers": ",".join(str(layer) for layer in self.memory_layers),
                "mem_n_keys": self.mem_n_keys,
                "mem_heads": self.mem_heads,
                "mem_knn": self.mem_knn,
                "mem_share_values": True,
                "mem_k_dim": self.mem_k_dim,
                "mem_v_dim": self.mem_v_dim,
                "swilu_projection": True,
                "value_fixed_lr": None,
                "mem_gated": False,
                "peer_variant": False,
            },
            "seed": 0,
            "vocab_size": self.vocab_size,
            "weight_tying": False,
            "sliding_window": None,
            "tokenizer": "sentencepiece",
        }

    def flops_per_token(self):
        """Forward multiply-adds × 2 per token with the output head, without attention scores."""
        attention = 4 * self.dim * self.dim
        feed_forward = 3 * self.dim * self.ffn_dim
        key_width = self.mem_heads * self.mem_k_dim
        memory = (self.dim * key_width + key_width * self.mem_n_keys + self.mem_heads * self.mem_knn * self.mem_v_dim
                  + 2 * self.dim * self.mem_v_dim)
        n_memory = len(self.memory_layers)
        layers = self.n_layers * attention + (self.n_layers - n_memory) * feed_forward + n_memory * memory
        return 2 * (layers + self.dim * self.vocab_size)


class RmsNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(n_in, n_out, bias=False):
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=n_in**-0.5, a=-3 * n_in**-0.5, b=3 * n_in**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def rope_table(config):
    """The rotation of each position and pair as a complex number: [max_seqlen, head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angle = torch.outer(torch.arange(config.max_seqlen).float(), config.rope_theta**-exponent)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, rope):
    """x [batch, time, any, heads, head_dim], pairs (2i, 2i+1)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[: x.shape[1], None, None]).flatten(-2)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.wq, self.wk, self.wv, self.wo = (linear(config.dim, config.dim) for _ in range(4))

    def forward(self, x, rope):
        batch, time, dim = x.shape
        qkv = F.linear(x, torch.cat((self.wq.weight, self.wk.weight, self.wv.weight))).view(batch, time, 3, self.n_heads, -1)
        q, k = rotate(qkv[:, :, :2], rope).unbind(2)
        v = qkv[:, :, 2]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, time, dim))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1, self.w3 = linear(config.dim, config.ffn_dim), linear(config.dim, config.ffn_dim)
        self.w2 = linear(config.ffn_dim, config.dim)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class QueryNorm(nn.Module):
    """Normalises each query dimension by running statistics, in training as in use; keeps the queries spread over the table.

    Not by the batch's own statistics, as a BatchNorm would: documents of one length go together, so that batches differ, and a model that leans
    on that fails on short prompts in use. At export it is folded into query_proj, so the checkpoint knows nothing of it.
    """

    def __init__(self, width, momentum=0.02, eps=1e-5):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.momentum, self.eps = momentum, eps

    def scale_and_shift(self):
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return scale, self.bias - self.running_mean * scale

    def track(self, x):
        self.num_batches_tracked += 1
        momentum = max(self.momentum, 1 / self.num_batches_tracked.item())
        self.running_mean.lerp_(x.mean(0), momentum)
        self.running_var.lerp_(x.var(0), momentum)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.track(x)
        scale, shift = self.scale_and_shift()
        return torch.addcmul(shift, x, scale)


class MemoryLayer(nn.Module):
    """Memory+: query → product keys → knn rows → weighted sum, gated by silu of a projection of the input."""

    def __init__(self, config, values, helper):
        super().__init__()
        half_dim = config.mem_k_dim // 2
        self.shape = (config.mem_heads, 2, config.mem_n_keys, half_dim)
        self.knn, self.helper = config.mem_knn, helper
        self.values = values  # shared by all memory layers
        self.keys = nn.Parameter(torch.empty(2 * config.mem_heads * config.mem_n_keys, half_dim).uniform_(-1, 1) * half_dim**-0.5)
        self.query_proj = linear(config.dim, config.mem_heads * config.mem_k_dim, bias=True)
        self.query_norm = QueryNorm(config.mem_heads * config.mem_k_dim)
        self.swilu_projection = linear(config.dim, config.mem_v_dim, bias=True)
        self.value_proj = linear(config.mem_v_dim, config.dim, bias=True)

    def forward(self, x, memory_on=None):
        mem_heads, _, _, half_dim = self.shape
        flat = x.flatten(0, 1)
        query = self.query_norm(self.query_proj(flat).float()).view(-1, mem_heads, 2, half_dim)
        pooled = lookup(query, self.keys.view(self.shape), self.values.weight, self.knn, self.helper)
        out = self.value_proj(pooled * F.silu(self.swilu_projection(flat))).view_as(x)
        return out if memory_on is None else out * memory_on[:, None, None]

    def folded_query_proj(self):
        """query_proj with the query norm folded in: weight, bias."""
        scale, shift = self.query_norm.scale_and_shift()
        return self.query_proj.weight * scale[:, None], self.query_proj.bias * scale + shift


class Layer(nn.Module):
    def __init__(self, config, feed_forward):
        super().__init__()
        self.attention_norm, self.ffn_norm = RmsNorm(config.dim, config.norm_eps), RmsNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward = feed_forward

    def forward(self, x, rope, memory_on):
        x = x + self.attention(self.attention_norm(x), rope)
        y = self.ffn_norm(x)
        return x + (self.feed_forward(y, memory_on) if isinstance(self.feed_forward, MemoryLayer) else self.feed_forward(y))


class Transformer(nn.Module):
    def __init__(self, config, helper=None):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.tok_embeddings.weight, std=config.dim**-0.5)
        values = None
        if config.memory_layers:
            values = nn.Embedding(config.mem_n_keys**2, config.mem_v_dim)
            nn.init.normal_(values.weight, std=config.mem_v_dim**-0.5)
        self.layers = nn.ModuleList(
            Layer(config, MemoryLayer(config, values, helper) if i in config.memory_layers else FeedForward(config))
            for i in range(config.n_layers))
        self.norm = RmsNorm(config.dim, config.norm_eps)
        self.output = linear(config.dim, config.vocab_size)
        self.register_buffer("rope", rope_table(config), persistent=False)

    def value_table(self):
        return self.layers[self.config.memory_layers[0]].feed_forward.values.weight if self.config.memory_layers else None

    def forward(self, tokens, wanted, memory_on=None):
        """Logits at the wanted positions (indices into the flattened [batch, time]); memory_on [batch]: false where the memory layers add nothing."""
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.rope, memory_on)
        return self.output(self.norm(x.flatten(0, 1)[wanted]))

    def checkpoint_tensors(self):
        """name → tensor as the published implementation names them: the table once, the query norm folded."""
        tensors = {}
        for name, tensor in self.named_parameters():  # lists the shared table once, under its first owner
            if "query_norm" not in name and "query_proj" not in name:
                tensors[name] = tensor.detach()
        for i in self.config.memory_layers:
            weight, bias = self.layers[i].feed_forward.folded_query_proj()
            prefix = f"layers.{i}.feed_forward.query_proj.query_mlps.0."
            tensors[prefix + "weight"], tensors[prefix + "bias"] = weight.detach(), bias.detach()
        return tensors

    def trunk_parameters(self):
        return sum(p.numel() for n, p in self.named_parameters() if "values" not in n)
