"""Pre-trains tiny-mixtral, the small real Mixtral that the repository carries, and writes its model card.

Why: router metrics, 4-bit experts and exact merges mean nothing on random weights, and a real Mixtral does not fit a
test. How: `tiny_corpus.py` gives token ids of seven domains; rows are drawn from a tempered mixture of them; bf16
weights follow fp32 masters under AdamW with warm-up and cosine decay. The balance loss is taken layer by layer
(transformers pools its own over all layers, where opposite collapses cancel) and over the whole batch, all domains
together, so that experts stay alive and may still specialise. At this size every expert on every token is faster
than sorting tokens, so that is how the experts run here: the same function, with zero weight for those not chosen.

A time limit (`--max-seconds`) shortens the schedule instead of cutting it off; a killed run leaves its last save.
Leaves out resuming: the whole run takes minutes on a GPU. One CPU thread does about 1,000 tokens/s, so that
`--steps 2500 --rows 4` is three hours of it, for a model that has seen a twentieth of the tokens.

    python scripts/tiny_corpus.py --cache /tmp/text-packages --output corpus.npz --probe probe.jsonl
    python scripts/pretrain_tiny_mixtral.py --corpus corpus.npz --output recipes/tiny-mixtral/model
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from text_packages import DOMAINS
from tiny_card import FACTS, write_card
from tiny_measure import BOS, measure
from torch.nn import functional as F
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


def tiny_config() -> MixtralConfig:
    """Eight experts, top-2, 7.94 M parameters: 15.9 MB in bf16. Every quantized dimension is a multiple of 64."""
    return MixtralConfig(
        vocab_size=32000,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
    )


def every_expert(self: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """The mixture of experts as two dense products over all experts; those not chosen get weight zero."""
    experts, inter = self.num_experts, self.intermediate_dim
    weights_TE = hidden_TH.new_zeros(hidden_TH.shape[0], experts).scatter(1, index_TK, weights_TK.to(hidden_TH.dtype))
    gate_TEI, up_TEI = (
        F.linear(hidden_TH, self.gate_up_proj.flatten(0, 1)).unflatten(1, (experts, 2 * inter)).chunk(2, dim=-1)
    )
    inner_TEI = F.silu(gate_TEI) * up_TEI * weights_TE.unsqueeze(-1)
    return F.linear(inner_TEI.flatten(1), self.down_proj.permute(1, 0, 2).flatten(1))


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of E * sum_i f_i P_i (f: share of assignments, P: mean probability); 1 when uniform."""
    probs_LTE = torch.stack(router_logits).float().softmax(-1)
    chosen_LTE = torch.zeros_like(probs_LTE).scatter(2, probs_LTE.topk(top_k, dim=-1).indices, 1.0 / top_k)
    return probs_LTE.shape[-1] * (chosen_LTE.mean(1) * probs_LTE.mean(1)).sum(-1).mean()


class Mixture:
    """Rows of `<s>` and `length` tokens from anywhere in the training text, domains drawn by size to a power."""

    def __init__(self, corpus: Any, length: int, temper: float, seed: int, device: torch.device):
        streams = [corpus[f"{domain}/train"] for domain in DOMAINS]
        self.sizes = np.array([stream.size for stream in streams])
        self.starts = np.cumsum([0, *self.sizes[:-1]])
        self.weights = self.sizes**temper / (self.sizes**temper).sum()
        self.tokens = torch.from_numpy(np.concatenate(streams).astype(np.int32)).to(device)
        self.window = torch.arange(length, device=device)
        self.random = np.random.default_rng(seed)

    def passes(self, tokens: int) -> list[float]:
        """How often each domain was seen, on average, after so many tokens."""
        return [round(float(tokens * w / size), 1) for w, size in zip(self.weights, self.sizes, strict=True)]

    def rows(self, count: int) -> torch.Tensor:
        domain = self.random.choice(len(DOMAINS), size=count, p=self.weights)
        start = self.starts[domain] + self.random.integers(0, self.sizes[domain] - len(self.window))
        ids = self.tokens[torch.from_numpy(start).to(self.window.device)[:, None] + self.window].long()
        return F.pad(ids, (1, 0), value=BOS)


def train(model: Any, corpus: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Trains in place; returns what the card says about the run."""
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    groups = [
        {"params": [m for m in masters if m.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [m for m in masters if m.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=BETAS, fused=True)
    mixture = Mixture(corpus, args.length, args.temper, args.seed, device)
    began, step, progress = time.monotonic(), 0, 0.0
    model.train()
    while progress < 1.0:
        for group in optimizer.param_groups:
            warm_up = min(1.0, (step + 1) / args.warmup_steps)
            group["lr"] = args.learning_rate * warm_up * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        ids_BT = mixture.rows(args.rows)
        out = model.model(input_ids=ids_BT[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        balance = balance_loss(out.router_logits, model.config.num_experts_per_tok)
        model.zero_grad()
        (loss + args.balance * balance).backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        step += 1
        elapsed = time.monotonic() - began
        progress = max(step / args.steps, elapsed / args.max_seconds)
        if step % args.log_every == 0 or progress >= 1.0:
            speed = step * args.rows * args.length / elapsed
            print(
                f"step {step} loss {loss.item():.3f} balance {balance.item():.3f} lr {group['lr']:.1e} "
                f"{speed / 1e3:,.0f} k tokens/s {elapsed:.0f} s",
                flush=True,
            )
        if step % args.save_every == 0:
            report(model, corpus, args.length, args.output)
            model.train()
    return {
        "steps": step,
        "tokens": step * args.rows * args.length,
        "seconds": round(time.monotonic() - began),
        "passes": dict(zip(DOMAINS, mixture.passes(step * args.rows * args.length), strict=True)),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(model: Any, corpus: Any, length: int, output: Path) -> None:
    """Saves the model in bf16 and the hub's layout, and measures those weights on the held-out documents."""
    model.eval()
    dtype = model.dtype
    model.to(torch.bfloat16).save_pretrained(output)
    model.to(dtype)
    reports = measure(model, corpus, length)
    print("  " + "  ".join(f"{r.domain} {r.loss:.2f}/{r.unigram:.2f}" for r in reports), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the .npz that tiny_corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="the schedule ends here at the latest")
    parser.add_argument("--rows", type=int, default=32, help="rows a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--temper", type=float, default=0.6, help="a domain is drawn by its size to this power")
    parser.add_argument("--balance", type=float, default=0.05, help="coefficient of the mean over layers")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=1000)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    ALL_EXPERTS_FUNCTIONS.register("every_expert", every_expert)
    # Masters in fp32 either way; a CPU has no fast bf16, so there the weights are rounded once, on saving.
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model: Any = MixtralForCausalLM(tiny_config())
    model.to(device, dtype)
    model.set_experts_implementation("every_expert")
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with np.load(args.corpus) as loaded:
        corpus = {name: loaded[name] for name in loaded.files}
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    run = train(model, corpus, args, device)
    report(model, corpus, args.length, args.output)
    arguments = {name: str(value) for name, value in vars(args).items() if name not in ("corpus", "output")}
    facts = {"arguments": arguments, "corpus": json.loads(str(corpus["about"])), "run": run}
    (args.output / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    write_card(args.output, corpus, args.device)


if __name__ == "__main__":
    main()
