"""Two gloo processes under DDP with uneven rows, each holding what it captured against a count by brute force."""

from __future__ import annotations

import torch
import torch.distributed as dist

from finetune.router.capture import RouterCapture
from tests.processes import be_processes
from tests.router.routing_models import (
    FAMILIES,
    assert_sums,
    brute_force_count,
    brute_force_sums,
    build_model,
    pad_right,
    random_rows,
)


def capture_and_count() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = build_model("olmoe").train()
    experts, top_k = FAMILIES["olmoe"]
    rows = random_rows([9, 4, 7, 1, 5])
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with RouterCapture(wrapped, num_experts=experts, top_k=top_k) as capture:
        for mine in ([rows[0:2], rows[2:3]], [rows[3:4], rows[4:5]])[rank]:
            batch = pad_right(mine)
            batch["labels"][:, :2] = -100
            wrapped(**batch).loss.backward()
        sums = capture.snapshot("train")
        again = capture.snapshot("train")
        parts = capture.snapshot_parts("train")
        alone = capture.snapshot("train", across_processes=False)
        if rank == 0:  # one process that saw nothing still joins the sum
            model.eval()
            with torch.no_grad():
                model(**pad_right(rows[:1]))
        lonely = capture.snapshot("eval")
    counts, prob_sum, tokens = brute_force_count(model, rows, experts, top_k)
    assert sums.tokens == tokens == 26, sums.tokens
    assert sums.counts.tolist() == counts
    torch.testing.assert_close(sums.prob_sum, torch.tensor(prob_sum).double(), rtol=1e-5, atol=1e-5)
    assert again.counts.tolist() == counts
    assert_sums(parts["completion"], brute_force_sums(model, rows, top_k, lambda row, token: token >= 2))
    assert_sums(parts["prompt"], brute_force_sums(model, rows, top_k, lambda row, token: token < 2))
    assert alone.tokens == (20, 6)[rank], alone.tokens
    assert lonely.tokens == 9, lonely.tokens
    dist.destroy_process_group()


if __name__ == "__main__":
    be_processes(capture_and_count, 2)
