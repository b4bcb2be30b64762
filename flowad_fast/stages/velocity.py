"""Stage 3: the velocity field u(x, t, y), a DiT, in its training form and in its inference form.

`DiT` is what is trained; its parameter names are those of published checkpoints. `TabledDiT` is the same network once
the timesteps are known: everything that depends only on (t, y) has become a table of modulations, which drops a third
of the weights and all conditioning work from the loop. It also propagates tangents, for the density scorer, and takes
the precision of its matrix products and the operators that it is built on.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowad_fast.config import Precision, VelocityConfig
from flowad_fast.kernels import operators, reference
from flowad_fast.kernels.account import VelocityShape
from flowad_fast.kernels.operators import Ceiling, Heads, Rows
from flowad_fast.stages.arithmetic import FP32, NUMBERS, Arithmetic
from flowad_fast.stages.linear import Fp8Linear, Layer, make_linear
from flowad_fast.stages.plan import Plan


class Attention(nn.Module):
    """Self-attention with biased qkv; all of q first, then k, then v, heads split inside each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.proj(operators.merge(reference.attention(*_split(self.qkv(x), self.heads))))


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.fc2(reference.gelu_tanh(self.fc1(x)))


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
        x = x + gate_a * self.attn(reference.ln_modulate(x, shift_a, scale_a))
        return x + gate_m * self.mlp(reference.ln_modulate(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """LayerNorm, two modulations (shift, scale), Linear(D -> p² C)."""

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.patch_size**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Training form: x (B, N, D), conditioning c (B, D)."""
        return self.linear(reference.ln_modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, -1)))


class PatchEmbedding(nn.Module):
    """The patch convolution, C -> D; patch size 1 in published models."""

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.channels, config.hidden_size, p, stride=p)


class TimeEmbedding(nn.Module):
    """Linear, SiLU, linear on a sinusoid of 256 dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))


class ClassEmbedding(nn.Module):
    """One row per class, and the dropout row where there is one."""

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.embedding_rows, config.hidden_size)


class DiT(nn.Module):
    """Training form: adaLN is computed from (t, y) at every call. Gradients flow through everything."""

    blocks: Sequence[Block]

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_embed = nn.Parameter(_sincos_positions(config), requires_grad=False)
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = TimeEmbedding(config.hidden_size)
        self.y_embedder = ClassEmbedding(config)
        self.blocks = cast(Sequence[Block], nn.ModuleList(Block(config) for _ in range(config.depth)))
        self.final_layer = FinalLayer(config)

    def initialise(self) -> "DiT":
        """adaLN-zero initialisation for training: the network starts as the zero field."""
        linears = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        for linear in linears.values():
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for name, linear in linears.items():
            if name.startswith("t_embedder"):
                nn.init.normal_(linear.weight, std=0.02)
            elif "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(linear.weight)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        return self

    def condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Conditioning vectors (B, D) of t (B,) in the field's own time and class indices y (B,) or None."""
        half = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angles = (t.float() * self.config.t_scale)[:, None] * half
        sinusoid = torch.cat([angles.cos(), angles.sin()], -1)
        c = self.t_embedder.mlp(sinusoid.to(self.pos_embed.dtype))
        return c if y is None else c + self.y_embedder.embedding_table(y)

    def forward(self, tokens: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The raw network output at x = tokens (B, h*w, C), t (B,) and y (B,): (B, h*w, C)."""
        c = self.condition(t, y)
        proj = self.x_embedder.proj
        x = F.linear(_patchify(tokens, self.config), _token_weight(proj), proj.bias) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return _unpatchify(self.final_layer(x, c), self.config)


class TabledBlock(nn.Module):
    """The four linear layers of a block; what happens between them is `TabledDiT`'s."""

    values: Tensor | None

    def __init__(self, block: Block, name: str, precision: Precision, keep_bf16: tuple[str, ...]) -> None:
        super().__init__()

        def make(part: str, linear: nn.Linear) -> Layer:
            return make_linear(f"{name}.{part}", linear.weight, linear.bias, precision, keep_bf16)

        self.qkv, self.proj = make("qkv", block.attn.qkv), make("proj", block.attn.proj)
        self.fc1, self.fc2 = make("fc1", block.mlp.fc1), make("fc2", block.mlp.fc2)

        # Of the rows of qkv that make v; None where attention's result cannot be quantised before it is there.
        values = None
        if isinstance(self.qkv, Fp8Linear) and isinstance(self.proj, Fp8Linear):
            values = self.qkv.reach(2 * self.qkv.out_features // 3)
        self.register_buffer("values", values, persistent=False)

    def ceiling(self, h: Rows) -> Ceiling | None:
        """What bounds the values of attention on h (B, N, D), where it may quantise its result."""
        return Ceiling(h[1], self.values) if self.values is not None and isinstance(h, tuple) else None

    @property
    def layers(self) -> dict[str, Layer]:
        """By name, in the order in which they run."""
        return {"qkv": self.qkv, "proj": self.proj, "fc1": self.fc1, "fc2": self.fc2}


class TabledDiT(nn.Module):
    """Inference form of a `DiT` at fixed times: step k of a loop looks its modulations up.

    It holds the weights of the DiT that the loop needs (in float32 it shares them) and none of those that the table
    replaces. `table` is (S, Y, depth, 6, D) and `final` (S, Y, 2, D) for S times and Y classes (1 for unconditional
    models). In float32 the result equals the training form's to rounding. In every precision the tokens, the table, the
    statistics and the output are float32; `precision` is that of the matrix products and of the activations between
    them, and `NUMBERS` says what the residual stream is.

    `ops` is the namespace of operators: `kernels.reference`, or `kernels.fused` with the same names. The linear layers
    are named embed, blocks.<i>.{qkv,proj,fc1,fc2} and head, which is what `VelocityConfig.keep_bf16` matches in fp8.
    `plan` says what runs their products, see `use`.
    """

    position: Tensor
    table: Tensor
    final: Tensor
    blocks: Sequence[TabledBlock]

    @torch.no_grad()
    def __init__(self, dit: DiT, times: tuple[float, ...], how: Arithmetic = FP32) -> None:
        super().__init__()
        self.config = config = dit.config
        precision = how.precision
        self.times, self.precision, self.ops, self.plan = times, precision, how.ops, Plan()
        keep = config.keep_bf16
        proj, last = dit.x_embedder.proj, dit.final_layer.linear
        self.embed = make_linear("embed", _token_weight(proj), None, precision, keep)
        blocks = (TabledBlock(block, f"blocks.{i}", precision, keep) for i, block in enumerate(dit.blocks))
        self.blocks = cast(Sequence[TabledBlock], nn.ModuleList(blocks))
        self.head = make_linear("head", last.weight, last.bias, precision, keep)
        device = dit.pos_embed.device
        classes = config.num_classes if config.use_class_labels else 1
        t = torch.tensor(times, device=device, dtype=torch.float32).repeat_interleave(classes)
        y = torch.arange(classes, device=device).repeat(len(times)) if config.use_class_labels else None
        c = dit.condition(t, y)
        rows = torch.stack([block.adaLN_modulation(c) for block in dit.blocks], 1)
        table = rows.unflatten(-1, (6, -1)).unflatten(0, (len(times), classes))
        final = dit.final_layer.adaLN_modulation(c).unflatten(-1, (2, -1)).unflatten(0, (len(times), classes))
        assert proj.bias is not None, "the patch embedding has a bias"
        self.register_buffer("position", proj.bias + dit.pos_embed, persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("final", final, persistent=False)

    def modulations(self, step: int, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows of a step: (B or 1, depth, 6, 1, D) and (B or 1, 2, 1, D)."""
        index = slice(0, 1) if y is None else y
        return self.table[step][index].unsqueeze(-2), self.final[step][index].unsqueeze(-2)

    def use(self, plan: Plan) -> None:
        """Let the blocks' products run as a plan says."""
        self.plan = plan
        for block in self.blocks:
            for part, layer in block.layers.items():
                layer.products = plan.of(part)

    @property
    def quantises_attention(self) -> bool:
        """Whether attention's result may come quantised, in some block."""
        return any(block.values is not None for block in self.blocks)

    def forward(self, tokens: Tensor, step: int, y: Tensor | None = None) -> Tensor:
        """The raw network output for tokens (B, h*w, C) at `times[step]`, classes y (B,): (B, h*w, C) float32."""
        out, _ = self._walk(tokens, step, y)
        return _unpatchify(out, self.config).to(tokens.dtype)

    def dual(
        self, tokens: Tensor, tangents: Tensor, step: int, y: Tensor | None = None, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output and its Jacobian-vector products for tangents (K, B or 1, h*w, C): (B, h*w, C), (K, B, h*w, C).

        The wide activations of `chunk` tangents exist at a time (None: of all); the primal's linear layers run once.
        """
        out, chunks = self._walk(tokens, step, y, tangents.split(chunk or len(tangents)))
        dout = torch.cat(list(chunks))
        return _unpatchify(out, self.config).to(tokens.dtype), _unpatchify(dout, self.config).to(tokens.dtype)

    def _walk(
        self, tokens: Tensor, step: int, y: Tensor | None, tangents: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """The network's output (B, N, p² C), and its derivative along each chunk of tangents (k, B or 1, h*w, C).

        Shapes on the lines are the primal's, and a chunk has k of them: N tokens, D wide, d per head, M in the MLP.
        """
        ops, config = self.ops, self.config
        table, final = self.modulations(step, y)
        blocks = [(block, table[:, i].unbind(1)) for i, block in enumerate(self.blocks)]  # each with 6 x (B or 1, 1, D)
        # What reads the residual stream next, with its shift and scale: every block's attention, then the head.
        shift, scale = final.unbind(1)
        readers = [*((block.qkv, row[0], row[1]) for block, row in blocks), (self.head, shift, scale)]
        split: Callable[[Tensor], Heads] = partial(_split, heads=config.num_heads)

        x, dembedded = self._run(self.embed, _patchify(tokens, config), (_patchify(z, config) for z in tangents))
        x = (x + self.position).to(NUMBERS[self.precision].residual)  # (B, N, D)
        dx = [one.to(x.dtype).expand(-1, x.shape[0], -1, -1) for one in dembedded]
        reader, shift, scale = readers[0]
        h, dh = operators.ln_modulate(ops, x, shift, scale, reader.takes, dx)  # (B, N, D)
        for (block, modulations), (reader, shift, scale) in zip(blocks, readers[1:], strict=True):
            _, _, gate_a, shift_m, scale_m, gate_m = modulations
            qkv, dqkv = self._run(block.qkv, h, dh)  # (B, N, 3 D)
            o, do = operators.attention(ops, split(qkv), map(split, dqkv), block.ceiling(h))  # (B, N, D)
            o, do = self._run(block.proj, o, do)  # (B, N, D)
            x, dx, h, dh = operators.gate_residual_ln_modulate(
                ops, x, o, gate_a, shift_m, scale_m, block.fc1.takes, zip(dx, do, strict=True)
            )
            wide, dwide = self.activated(block, h, dh)  # (B, N, M)
            o, do = self._run(block.fc2, wide, dwide)  # (B, N, D)
            x, dx, h, dh = operators.gate_residual_ln_modulate(
                ops, x, o, gate_m, shift, scale, reader.takes, zip(dx, do, strict=True)
            )
        return self._run(self.head, h, dh)  # (B, N, p² C)

    def activated(self, block: TabledBlock, h: Rows, dh: Sequence[Rows] = ()) -> tuple[Rows, Iterable[Rows]]:
        """The MLP of a block up to its second layer, in what that layer takes: (B, N, D) to (B, N, M)."""
        if not dh and block.fc1.fuses_gelu(h):
            return block.fc1.gelu_tanh(h), ()
        wide, dwide = self._run(block.fc1, h, dh)
        return operators.gelu_tanh(self.ops, wide, block.fc2.takes, dwide)

    def _run(self, layer: Layer, x: Rows, tangents: Iterable[Rows] = ()) -> tuple[Tensor, Iterator[Tensor]]:
        """A layer on x, and without its bias on each chunk when that is asked for; all in what the layer takes."""

        def take(rows: Rows) -> Rows:
            return operators.quantise(self.ops, rows, layer.takes)

        return layer(take(x)), map(layer.tangent, map(take, tangents))


def sizes(config: VelocityConfig, image: int = 256) -> VelocityShape:
    """A field's sizes as the account of bytes and operations has them, for maps of `image` pixels a side."""
    return VelocityShape(
        hidden=config.hidden_size,
        depth=config.depth,
        heads=config.num_heads,
        tokens=config.tokens,
        channels=config.channels * config.patch_size**2,
        mlp=config.mlp_hidden,
        image=image,
    )


def _split(x: Tensor, heads: int) -> Heads:
    """(..., N, 3D) to q, k, v of (..., heads, N, d)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in x.chunk(3, -1))
    return q, k, v


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
