"""The peak of a training step: what the layers have kept by then, and what lives only then.

Why: the peak of a step is no sum over everything that a step makes. While the last layer runs backward all layers'
keeps are there; while an early one does, most are gone, but most gradients have come. So a step is walked through:

    forward of a layer's experts    what earlier layers kept, then x, h, act, y of this one
    LM head, forward and backward   what all layers kept, a tile of logits, the head's float32 gradient
    backward of a layer's experts   what it and earlier layers kept, the gradients of later ones, then h, v, dx; where
                                    h was not kept, first the recomputed attention, and h from it
    backward of a layer's attention its kept or recomputed tensors, and their gradients
    the embedding's gradient, and the optimizer's step

How: each phase is a sum over the tensors that the code holds then, in the order of the code
(`kernels/expert_operation.py`, transformers' decoder layer, TRL's fused head). Between layers of one kind a phase
grows or shrinks linearly with the layer's number, so only the layers at the borders of the plan are computed.

Leaves out: temporaries inside kernels (there are none of note with triton; the plain paths on the CPU have more),
tensors of some bytes a token (positions, masks, labels), attention functions that make [T, T] scores.

Units: bytes. T tokens of a micro-batch, S = T * top_k rows, H hidden, F intermediate, q and kv the widths of queries
and of keys (or values), c bytes of an element in the products, r of one in the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.memory.run import MemoryItem, Run
from finetune.moe import ATTENTION_PROJECTIONS, DOWN_PROJ, GATE_UP_PROJ
from finetune.private_api import LOGIT_TILE

# float32 copies of `LOGIT_TILE` that TRL's plain path (no triton) has at once (tests/memory/test_step.py measures it).
PLAIN_TILE_COPIES = 7
# Routing of one token: three int64 and four float32 numbers a choice (indices of the router, row numbers, weights
# before and after they are normalized), one float32 probability an expert.
ROUTING_BYTES_PER_CHOICE, ROUTING_BYTES_PER_EXPERT = 3 * 8 + 4 * 4, 4
# The auxiliary losses' of one token: float32 logits and probabilities; logsumexp, and whether it is real, twice.
AUXILIARY_BYTES_PER_EXPERT, AUXILIARY_BYTES_PER_TOKEN = 2 * 4, 4 + 4 + 1
# Optimizers that make temporaries of the size of all float32 gradients.
OPTIMIZER_TEMPORARIES = {"adamw_torch": 1}
# Of one H100 (bf16 products of the experts' shapes, and copies): only the ratio of two costs matters.
PRODUCT_FLOPS, COPY_BYTES = 7e14, 3e12


@dataclass(frozen=True)
class Phase:
    """What a step holds at one time, by kind."""

    name: str
    inputs: int = 0
    attention: int = 0
    gate_up: int = 0
    routing: int = 0
    copies: int = 0
    gradients: int = 0
    workspace: int = 0
    transient: int = 0

    @property
    def bytes(self) -> int:
        kept = self.inputs + self.attention + self.gate_up + self.routing
        return kept + self.copies + self.gradients + self.workspace + self.transient


def step_peak(run: Run) -> Phase:
    return max(phases(run), key=lambda phase: phase.bytes)


def peak_items(run: Run, phase: Phase) -> list[MemoryItem]:
    """The phase as rows of a table; kinds that the run never has are left out."""
    arch, layers = run.arch, run.arch.layers
    full = 4 * run.trained
    share = "" if phase.gradients == full else f", {phase.gradients / full:.0%} of them at the peak"
    whole = f"of {arch.experts} experts" if run.backend == "grouped" else "of one expert"
    attention = f"{run.keep_attention} of {layers} layers keep them, the others recompute theirs one by one"
    gate_up = f"{run.keep_gate_up} of {layers} layers keep them"
    rows = [
        ("gradients", phase.gradients, "training", f"{run.trained:,} in float32{share}"),
        ("autocast copies", phase.copies, "step", f"{8 * run.size}-bit copies of the attention's weights"),
        ("layer inputs", phase.inputs, "step", f"{layers} layers, {run.tokens:,} x {arch.hidden} each"),
        ("routing", phase.routing, "step", "indices and weights, never recomputed"),
        ("attention activations", phase.attention, "step", attention),
        ("gate_up outputs", phase.gate_up, "step", gate_up),
        ("experts' workspace", phase.workspace, "step", f"{run.backend}: matrices {whole} in {8 * run.size} bits"),
        ("transient at the peak", phase.transient, "step", phase.name),
    ]
    return [MemoryItem(name, size, kind, detail) for name, size, kind, detail in rows if size]  # type: ignore[arg-type]


def recompute_seconds(run: Run) -> tuple[float, float]:
    """About what recomputing one layer's attention, and one layer's gate_up output, takes on an H100."""
    arch, size, tokens = run.arch, run.size, run.tokens
    q, kv = _widths(run)
    projections = arch.attention_params // arch.layers
    # Causal: half of the products of queries with keys, and of scores with values.
    flops = tokens * (2 * projections + 2 * q * run.seq_len)
    # Read and written: two norms, the sum, the projections' outputs, the rotation; then the weights.
    elements = tokens * (7 * arch.hidden + 4 * (q + kv) + 2 * q) + 2 * projections
    attention = flops / PRODUCT_FLOPS + size * elements / COPY_BYTES
    out, in_ = arch.expert_shapes()[GATE_UP_PROJ]
    rows = tokens * arch.top_k
    gate_up = 2 * rows * out * in_ / PRODUCT_FLOPS + size * (2 * rows * in_ + arch.experts * out * in_) / COPY_BYTES
    return attention, gate_up


# ---- the walk -------------------------------------------------------------------------------------------------


def phases(run: Run, *, every_layer: bool = False) -> Iterator[Phase]:
    """The phases of a step; of the layers, those that can be the largest."""
    arch, layers, sizes = run.arch, run.arch.layers, _sizes(run)
    borders = {0, layers - 1}
    for keep in (run.keep_attention, run.keep_gate_up):
        borders |= {layers - keep, layers - keep - 1} & set(range(layers))
    copy = run.size * arch.attention_params // layers if run.mixed else 0
    for layer in range(layers) if every_layer else sorted(borders):
        yield _forward(run, sizes, layer, copy)
        yield from _backward(run, sizes, layer, copy)
    yield from _lm_head(run, sizes, copy)
    if run.method == "non_moe":
        gradient = 4 * arch.vocab * arch.hidden + run.tokens * arch.hidden * run.stream
        gradients = 4 * run.trained if run.accumulates else _gradients(run, -1)
        yield Phase("the embedding's gradient", gradients=gradients, transient=gradient)
    temporaries = 4 * run.trained * OPTIMIZER_TEMPORARIES.get(run.optimizer, 0)
    yield Phase("the optimizer's step", gradients=4 * run.trained, transient=temporaries)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one layer's tensors."""

    stream: int  # [T, H] of the residual stream
    input: int  # the input of a layer that keeps its attention, as far as not among `attention`
    attention: int
    experts_input: int
    gate_up: int
    routing: int
    forward: tuple[tuple[int, int], ...]  # (workspace, rows) of the experts, one after the other
    backward: tuple[tuple[int, int], ...]
    recompute: tuple[int, int]


def _sizes(run: Run) -> _Sizes:
    arch, size, tokens = run.arch, run.size, run.tokens
    rows = tokens * arch.top_k
    hidden, half, out = rows * arch.hidden * size, rows * arch.intermediate * size, tokens * arch.hidden * size
    experts = arch.experts if run.backend == "grouped" else 1
    gate_up, down = (
        experts * size * out_ * in_ for out_, in_ in (arch.expert_shapes()[name] for name in (GATE_UP_PROJ, DOWN_PROJ))
    )
    stream = tokens * arch.hidden * run.stream
    routing = tokens * (ROUTING_BYTES_PER_CHOICE * arch.top_k + ROUTING_BYTES_PER_EXPERT * arch.experts)
    if run.auxiliary:
        routing += tokens * (AUXILIARY_BYTES_PER_EXPERT * arch.experts + AUXILIARY_BYTES_PER_TOKEN)
    return _Sizes(
        stream=stream,
        # A 16-bit norm of transformers keeps a float32 copy instead.
        input=stream if run.fused_layers or run.stream == 4 else 0,
        attention=_attention(run),
        experts_input=out,
        gate_up=2 * half,
        routing=routing,
        forward=((gate_up, hidden + 2 * half), (down, 3 * half + hidden), (0, 2 * half + hidden + out)),
        backward=((down, hidden + 3 * half), (gate_up, 2 * half + hidden), (0, 2 * half + hidden + out)),
        recompute=(gate_up, hidden + 2 * half),
    )


def _attention(run: Run) -> int:
    """What the attention and both norms of a layer keep, besides the layer's input."""
    arch, size, stream = run.arch, run.size, run.stream
    q, kv = _widths(run)
    qk_norm = q + kv if arch.qk_norm else 0
    masters = run.method == "non_moe"
    inputs = {name: shape[1] for name, shape in arch.attention_shapes().items()}
    outputs = {name: shape[0] for name, shape in arch.attention_shapes().items()}
    # Norms: the second one's input and a number a token each; transformers' own keep, in 16 bits, float32 copies of
    # both inputs, and where their weights train the normalized values.
    if run.fused_layers or stream == 4:
        norms = stream * arch.hidden + 4 * 2
    else:
        norms = 4 * (2 * arch.hidden + 2)
    norms += qk_norm * (size if run.fused_layers or size == 4 else 4)
    if masters and not run.fused_layers:
        norms += stream * (2 * arch.hidden) + size * qk_norm
    # The projections' input: one tensor for q, k and v; autocast makes one for each.
    if masters:
        projections = size * arch.hidden * (3 if run.mixed else 1)
    elif run.lora_dropout:
        projections = sum((size + 1) * inputs[name] for name in run.lora_targets)  # the dropped input and its mask
    else:
        projections = size * arch.hidden if set(run.lora_targets) - {"o_proj"} else 0
    if not masters:
        projections += size * run.lora_r * len(run.lora_targets)
    if run.use_dora:
        projections += 2 * size * sum(outputs[name] for name in run.lora_targets)  # both terms of its sum
    # Rotated q and k, v, the output (which is also o_proj's input), and the logarithm of each sum of exponentials.
    flash = size * (q + 2 * kv + q) + 4 * arch.heads
    return run.tokens * (norms + projections + flash)


def _forward(run: Run, sizes: _Sizes, layer: int, copy: int) -> Phase:
    keeps = layer >= run.arch.layers - run.keep_attention
    workspace, rows = max(sizes.forward, key=sum)
    # The sum that the experts' output is added to, the normed input, and its copy in the products' type.
    transient = sizes.stream * (0 if keeps and sizes.input else 1) + sizes.experts_input
    transient += sizes.stream if run.mixed else 0
    return _at(
        run,
        sizes,
        f"forward of the experts in layer {layer}",
        layer,
        attention=sizes.attention if keeps else 0,
        copies=(layer + 1) * copy,
        workspace=workspace,
        transient=transient + rows,
    )


def _backward(run: Run, sizes: _Sizes, layer: int, copy: int) -> Iterator[Phase]:
    arch, layers = run.arch, run.arch.layers
    keeps_attention, keeps_gate_up = layer >= layers - run.keep_attention, layer >= layers - run.keep_gate_up
    kept_copies = copy * max(0, layer + 1 - (layers - run.keep_attention))
    gradients = _gradients(run, layer)
    there = keeps_attention or not keeps_gate_up  # recomputed when the experts ask for their input
    gradient = sizes.stream + (sizes.experts_input if run.mixed else 0)
    workspace, rows = max(sizes.backward if keeps_gate_up else (sizes.recompute, *sizes.backward), key=sum)
    yield _at(
        run,
        sizes,
        f"backward of the experts in layer {layer}",
        layer,
        attention=sizes.attention if there else 0,
        experts_input=_block_inputs(run, 1 if there else 0, 0 if keeps_gate_up else 1) * sizes.experts_input,
        copies=kept_copies + (copy if there and not keeps_attention else 0),
        gradients=gradients,
        workspace=workspace,
        transient=gradient + rows,
    )
    q, kv = _widths(run)
    # Of the stream and of the norm's input; of the output, q, k and v; flash attention's float32 sum for q, and its k
    # and v for every query head; one dequantized matrix, and its gradient where it trains.
    matrix = max(out * in_ for out, in_ in arch.attention_shapes().values())
    transient = 2 * sizes.stream + run.tokens * (run.size * (4 * q + 2 * kv) + 4 * (q + arch.heads))
    transient += (run.size + (4 if run.method == "non_moe" else 0)) * matrix
    yield _at(
        run,
        sizes,
        f"backward of the attention in layer {layer}",
        layer,
        attention=sizes.attention,
        copies=kept_copies + (0 if keeps_attention else copy),
        gradients=gradients,
        transient=transient,
    )


def _lm_head(run: Run, sizes: _Sizes, copy: int) -> Iterator[Phase]:
    """TRL's fused head: a tile of logits at a time, the hidden states' gradient in float32."""
    arch, size, (rows, columns) = run.arch, run.size, LOGIT_TILE
    tokens = math.ceil(run.tokens * run.supervised(run.tokens))  # the others' logits are not computed
    tile = min(tokens, rows) * columns * size
    if run.device == "cpu":
        tile += PLAIN_TILE_COPIES * min(tokens, rows) * min(columns, arch.vocab) * 4
    if run.mixed:
        tile += size * arch.hidden * (min(tokens, rows) + min(arch.vocab, columns))
    norm = sizes.stream if sizes.input else 4 * run.tokens * arch.hidden  # what the last norm keeps
    layers, kept = arch.layers, run.keep_attention * copy
    yield _at(
        run,
        sizes,
        "forward of the LM head",
        layers,
        copies=layers * copy,
        transient=norm + 2 * sizes.stream + tile,
    )
    yield _at(
        run,
        sizes,
        "backward of the LM head",
        layers,
        copies=kept,
        gradients=_gradients(run, layers),
        transient=norm + sizes.stream + 4 * tokens * arch.hidden + tile,
    )


def _at(
    run: Run,
    sizes: _Sizes,
    name: str,
    layer: int,
    *,
    attention: int = 0,
    experts_input: int = 0,
    copies: int = 0,
    gradients: int = 0,
    workspace: int = 0,
    transient: int = 0,
) -> Phase:
    """A phase while `layer` runs: what the layers before it keep, and what is given; past the last, all keep."""
    layers = run.arch.layers
    whole = max(0, layer - (layers - run.keep_attention))
    gate_up = max(0, layer - (layers - run.keep_gate_up))
    own = 0 if layer == layers else 1
    # Attention that is kept without the gate_up output keeps the experts' input for it.
    inputs_kept = _block_inputs(run, whole, max(0, whole - gate_up))
    own_input = sizes.stream if layer < layers - run.keep_attention else sizes.input
    before = sizes.stream * (layer - whole) + sizes.input * whole
    return Phase(
        name,
        inputs=before + own * own_input,
        attention=whole * sizes.attention + inputs_kept * sizes.experts_input + attention + experts_input,
        gate_up=gate_up * sizes.gate_up,
        routing=(layer + own) * sizes.routing,
        copies=copies,
        gradients=4 * run.trained if run.accumulates else gradients,
        workspace=workspace,
        transient=transient,
    )


def _block_inputs(run: Run, router: int, experts: int) -> int:
    """How many inputs of layers' sparse blocks are there, when so many routers (should they train) and experts keep it.

    Both keep the same tensor, except that autocast makes a copy for each.
    """
    if not run.router:
        return experts
    return router + experts if run.mixed else max(router, experts)


def _gradients(run: Run, layer: int) -> int:
    """Bytes of the gradients that are there once the backward pass has come to `layer`; -1: the embedding."""
    arch = run.arch
    outside = arch.vocab * arch.hidden + arch.hidden if run.method == "non_moe" else 0  # head and last norm
    in_layers = run.trained - (arch.embedding_params + arch.hidden if run.method == "non_moe" else 0)
    return 4 * (outside + in_layers * max(0, arch.layers - 1 - layer) // arch.layers)


def _widths(run: Run) -> tuple[int, int]:
    arch = run.arch
    assert set(run.lora_targets) <= set(ATTENTION_PROJECTIONS)
    return arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
