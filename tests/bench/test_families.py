"""Kernels of a step to families: by the names that libraries really give them, by shapes, and what is left over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from finetune.bench.families import (
    COPIES,
    EXPERT_GEMM,
    FAMILIES,
    GEMM,
    HEAD,
    OTHER,
    Kernel,
    classify,
    kernels_of,
    split_time,
)

NAMES = {
    "dequantize_nf4_kernel": "dequantization",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, float*, ...)": "dequantization",
    "swiglu_forward_kernel": "swiglu",
    "swiglu_backward_kernel": "swiglu",
    "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(at::TensorIteratorBase&)>": "swiglu",
    "gather_rows_kernel": "gather and combine",
    "combine_rows_kernel": "gather and combine",
    "void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel>": "gather and combine",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80": "attention",
    "_rms_norm_forward_kernel": "norm and rope",
    "_block_rms_norm_backward_kernel": "norm and rope",
    "_triton_rope": "norm and rope",
    "_forward_kernel": HEAD,
    "_backward_kernel": HEAD,
    "liger_cross_entropy_kernel": HEAD,
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, LogSoftMaxForwardEpilogue>": HEAD,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": "optimizer",
    "void at::native::(anonymous namespace)::softmax_warp_forward<float, float, float, 3, false>": "router",
    "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>": "router",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "router",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": GEMM,
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas": GEMM,
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<GroupProblemShape>>": GEMM,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": GEMM,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>": COPIES,
    "Memcpy DtoD (Device -> Device)": COPIES,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps>>": COPIES,
    "ampere_special_sauce": OTHER,
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert classify(Kernel(name, 1.0), intermediate=14336, vocab=32000) == NAMES[name]


def test_shapes_say_whose_product_it_is() -> None:
    def family(*sizes: int) -> str:
        return classify(Kernel("nvjet_tst_64x8", 1.0, frozenset(sizes)), intermediate=14336, vocab=32000)

    assert family(2048, 4096, 28672) == EXPERT_GEMM
    assert family(8, 14336, 4096) == EXPERT_GEMM
    assert family(4096, 32000) == HEAD
    assert family(8192, 4096, 16) == GEMM


def test_every_family_has_a_place() -> None:
    assert set(NAMES.values()) | {EXPERT_GEMM} == set(FAMILIES)
    assert len(set(FAMILIES)) == len(FAMILIES)


def test_the_split_adds_up() -> None:
    kernels = [
        Kernel("nvjet_a", 3000.0, frozenset((28672,))),
        Kernel("nvjet_a", 1000.0),
        *[Kernel("Memcpy DtoD", 250.0)] * 4,
        Kernel("unknown", 1000.0),
    ]
    split = split_time(kernels, steps=2, seconds_per_step=0.004, intermediate=14336, vocab=32000)
    assert [(part.family, part.milliseconds, part.share, part.launches) for part in split.shares] == [
        (EXPERT_GEMM, 1.5, 0.375, 0.5),
        (GEMM, 0.5, 0.125, 0.5),
        (COPIES, 0.5, 0.125, 2.0),
        (OTHER, 0.5, 0.125, 0.5),
    ]
    assert split.idle_milliseconds == pytest.approx(1.0)
    assert sum(part.share for part in split.shares) + split.idle_share == pytest.approx(1.0)
    assert {part.family for part in split.largest_other} == {"Memcpy DtoD", "unknown"}
    assert split.rows()[-1] == ("idle", "1.00", "25.0%", "")


def test_more_work_than_time_is_no_negative_idleness() -> None:
    split = split_time([Kernel("a", 5000.0)], steps=1, seconds_per_step=0.004, intermediate=1, vocab=1)
    assert split.idle_milliseconds == 0.0


def test_launches_of_a_profile_get_the_shapes_of_their_operation() -> None:
    def on_cpu(name: str, shapes: list[object], *kernels: tuple[str, float]) -> SimpleNamespace:
        launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
        return SimpleNamespace(device_type=DeviceType.CPU, name=name, input_shapes=shapes, kernels=launched)

    def on_gpu(name: str, duration: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            device_type=DeviceType.CUDA,
            name=name,
            is_user_annotation=annotation,
            time_range=SimpleNamespace(elapsed_us=lambda: duration),
        )

    events = [
        on_cpu("aten::mm", [[7, 64], [64, 96]], ("nvjet", 2.5)),
        on_cpu("aten::_grouped_mm", [[7, 64], [], [[8, 96, 64]]], ("nvjet", 3.5)),
        on_cpu("aten::empty", []),
        on_gpu("nvjet", 2.5),
        on_gpu("nvjet", 3.5),
        on_gpu("memset", 1.0),
        on_gpu("Optimizer.step#AdamW.step", 9.0, annotation=True),
    ]
    assert kernels_of(events) == [
        Kernel("nvjet", 2.5, frozenset((7, 64, 96))),
        Kernel("nvjet", 3.5, frozenset((7, 64, 8, 96))),
        Kernel("memset", 1.0),
    ]


def test_a_profile_of_this_torch_has_the_fields_that_are_read() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.ones(3, 5) @ torch.ones(5, 2)
    events = profiler.events()
    assert kernels_of(events) == []
    assert [[3, 5], [5, 2]] in [event.input_shapes[:2] for event in events]
    assert not any(event.is_user_annotation for event in events)
