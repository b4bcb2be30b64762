"""Stage 3: the velocity field u(x, t, y), a DiT, in its training form and in its inference form.

`DiT` is what is trained; its parameter names are those of published checkpoints. `TabledDiT` is the same network once
the timesteps are known: everything that depends only on (t, y) has become a table of modulations, which drops a third
of the weights and all conditioning work from the loop. It also propagates tangents, for the density scorer.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowad_fast.config import VelocityConfig
from flowad_fast.kernels import reference as ops


class Attention(nn.Module):
    """Self-attention with biased qkv; all of q first, then k, then v, heads split inside each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.proj(_merge(ops.attention(*self._split(self.qkv(x)))))

    def dual(self, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        """The same with tangents (K, B, N, D)."""
        qkv, dqkv = linear_dual(self.qkv, x, dx)
        out, dout = ops.attention_dual(*self._split(qkv), *self._split(dqkv))
        return linear_dual(self.proj, _merge(out), _merge(dout))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., N, 3D) to q, k, v of (..., heads, N, d)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in x.chunk(3, -1))
        return q, k, v


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.fc2(ops.gelu_tanh(self.fc1(x)))

    def dual(self, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        """The same with tangents (K, B, N, D)."""
        return linear_dual(self.fc2, *ops.gelu_tanh_dual(*linear_dual(self.fc1, x, dx)))


class Block(nn.Module):
    """One adaLN-zero transformer block; six modulations in the order shift, scale, gate (attention), same (MLP)."""

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        self.attn = Attention(config.hidden_size, config.num_heads)
        self.mlp = Mlp(config.hidden_size, config.mlp_hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Training form: x (B, N, D), conditioning c (B, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate_a * self.attn(ops.ln_modulate(x, shift_a, scale_a))
        return x + gate_m * self.mlp(ops.ln_modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """LayerNorm, two modulations (shift, scale), Linear(D -> p² C)."""

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.patch_size**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Training form: x (B, N, D), conditioning c (B, D)."""
        return self.linear(ops.ln_modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, -1)))


class DiT(nn.Module):
    """Training form: adaLN is computed from (t, y) at every call. Gradients flow through everything."""

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        self.config = config
        width, p = config.hidden_size, config.patch_size
        self.pos_embed = nn.Parameter(_sincos_positions(config), requires_grad=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, width, p, stride=p)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.embedding_rows, width)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def initialise(self) -> "DiT":
        """adaLN-zero initialisation for training: the network starts as the zero field."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedder in (self.t_embedder["mlp"][0], self.t_embedder["mlp"][2], self.y_embedder["embedding_table"]):
            nn.init.normal_(embedder.weight, std=0.02)
        for head in [block.adaLN_modulation[1] for block in self.blocks] + [
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ]:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        return self

    def condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Conditioning vectors (B, D) of t (B,) in the field's own time and class indices y (B,) or None."""
        half = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angles = (t.float() * self.config.t_scale)[:, None] * half
        sinusoid = torch.cat([angles.cos(), angles.sin()], -1)
        c = self.t_embedder["mlp"](sinusoid.to(self.pos_embed.dtype))
        return c if y is None else c + self.y_embedder["embedding_table"](y)

    def forward(self, tokens: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The raw network output at x = tokens (B, h*w, C), t (B,) and y (B,): (B, h*w, C)."""
        c = self.condition(t, y)
        proj = self.x_embedder["proj"]
        x = F.linear(_patchify(tokens, self.config), _token_weight(proj), proj.bias) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return _unpatchify(self.final_layer(x, c), self.config)


class TabledDiT(nn.Module):
    """Inference form of a `DiT` at fixed times: step k of a loop looks its modulations up.

    It shares the weights of the DiT that the loop needs and holds none of those that the table replaces. `table` is
    (S, Y, depth, 6, D) and `final` (S, Y, 2, D) for S times and Y classes (1 for unconditional models). The result
    equals the training form's to rounding.
    """

    weight: Tensor
    position: Tensor
    table: Tensor
    final: Tensor

    @torch.no_grad()
    def __init__(self, dit: DiT, times: tuple[float, ...]) -> None:
        super().__init__()
        self.config = config = dit.config
        self.times = times
        self.attn = nn.ModuleList(block.attn for block in dit.blocks)
        self.mlp = nn.ModuleList(block.mlp for block in dit.blocks)
        self.linear = dit.final_layer.linear
        device = dit.pos_embed.device
        classes = config.num_classes if config.use_class_labels else 1
        t = torch.tensor(times, device=device, dtype=torch.float32).repeat_interleave(classes)
        y = torch.arange(classes, device=device).repeat(len(times)) if config.use_class_labels else None
        c = dit.condition(t, y)
        rows = torch.stack([block.adaLN_modulation(c) for block in dit.blocks], 1)
        table = rows.unflatten(-1, (6, -1)).unflatten(0, (len(times), classes))
        final = dit.final_layer.adaLN_modulation(c).unflatten(-1, (2, -1)).unflatten(0, (len(times), classes))
        proj = dit.x_embedder["proj"]
        self.register_buffer("weight", _token_weight(proj), persistent=False)
        self.register_buffer("position", proj.bias + dit.pos_embed, persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("final", final, persistent=False)

    def modulations(self, step: int, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows of a step: (B or 1, depth, 6, 1, D) and (B or 1, 2, 1, D)."""
        index = slice(0, 1) if y is None else y
        return self.table[step][index].unsqueeze(-2), self.final[step][index].unsqueeze(-2)

    def forward(self, tokens: Tensor, step: int, y: Tensor | None = None) -> Tensor:
        """The raw network output for tokens (B, h*w, C) at `times[step]`, classes y (B,): (B, h*w, C)."""
        table, final = self.modulations(step, y)
        x = F.linear(_patchify(tokens, self.config), self.weight) + self.position
        o: Tensor | None = None
        gate = None
        for i, (attn, mlp) in enumerate(zip(self.attn, self.mlp, strict=True)):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table[:, i].unbind(1)
            if o is None:
                h = ops.ln_modulate(x, shift_a, scale_a)
            else:
                x, h = ops.gate_residual_ln_modulate(x, o, gate, shift_a, scale_a)
            x, h = ops.gate_residual_ln_modulate(x, attn(h), gate_a, shift_m, scale_m)
            o, gate = mlp(h), gate_m
        _, h = ops.gate_residual_ln_modulate(x, o, gate, *final.unbind(1))
        return _unpatchify(self.linear(h), self.config)

    def dual(self, tokens: Tensor, tangents: Tensor, step: int, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output and its Jacobian-vector products for tangents (K, B or 1, h*w, C): (B, h*w, C), (K, B, h*w, C)."""
        table, final = self.modulations(step, y)
        x = F.linear(_patchify(tokens, self.config), self.weight) + self.position
        dx = F.linear(_patchify(tangents, self.config), self.weight)
        if dx.shape[1] != x.shape[0]:
            dx = dx.expand(-1, x.shape[0], -1, -1)
        o = do = gate = None
        for i, (attn, mlp) in enumerate(zip(self.attn, self.mlp, strict=True)):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table[:, i].unbind(1)
            if o is None:
                h, dh = ops.ln_modulate_dual(x, dx, shift_a, scale_a)
            else:
                x, dx, h, dh = ops.gate_residual_ln_modulate_dual(x, dx, o, do, gate, shift_a, scale_a)
            o, do = attn.dual(h, dh)
            x, dx, h, dh = ops.gate_residual_ln_modulate_dual(x, dx, o, do, gate_a, shift_m, scale_m)
            (o, do), gate = mlp.dual(h, dh), gate_m
        *_, h, dh = ops.gate_residual_ln_modulate_dual(x, dx, o, do, gate, *final.unbind(1))
        out, dout = linear_dual(self.linear, h, dh)
        return _unpatchify(out, self.config), _unpatchify(dout, self.config)


def linear_dual(linear: nn.Linear, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer with tangents: the bias carries none."""
    return linear(x), F.linear(dx, linear.weight)


def _merge(x: Tensor) -> Tensor:
    """(..., heads, N, d) to (..., N, D)."""
    return x.transpose(-3, -2).flatten(-2)


def _token_weight(proj: nn.Conv2d) -> Tensor:
    """The patch convolution as a matrix (D, p·p·C), in the patch order of `_patchify`."""
    return proj.weight.permute(0, 2, 3, 1).flatten(1)


def _patchify(tokens: Tensor, config: VelocityConfig) -> Tensor:
    """(..., h*w, C) to (..., N, p·p·C)."""
    p = config.patch_size
    if p == 1:
        return tokens
    lead = tokens.shape[:-2]
    grid = tokens.reshape(*lead, config.height // p, p, config.width // p, p, config.channels)
    return grid.transpose(-4, -3).reshape(*lead, config.tokens, p * p * config.channels)


def _unpatchify(patches: Tensor, config: VelocityConfig) -> Tensor:
    """The inverse: (..., N, p·p·C) to (..., h*w, C)."""
    p = config.patch_size
    if p == 1:
        return patches
    lead = patches.shape[:-2]
    grid = patches.reshape(*lead, config.height // p, config.width // p, p, p, config.channels)
    return grid.transpose(-4, -3).reshape(*lead, config.height * config.width, config.channels)


def _sincos_positions(config: VelocityConfig) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, N, D), the usual initial value of the position table."""
    rows, cols, quarter = config.height // config.patch_size, config.width // config.patch_size, config.hidden_size // 4
    omega = 1.0 / 10000 ** (np.arange(quarter) / max(quarter, 1))
    row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    angles = [grid.reshape(-1, 1) * omega for grid in (col, row)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)
    padded = np.zeros((rows * cols, config.hidden_size))
    padded[:, : table.shape[1]] = table
    return torch.from_numpy(padded).float()[None]
