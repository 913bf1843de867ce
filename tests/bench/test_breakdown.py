"""What kernels are for, by names as profilers give them: of m2gen, torch, torch.compile, and other packages."""

from __future__ import annotations

import pytest
from support import ROOT

from m2gen.bench.layers.breakdown import KernelTime, part_of, parts_ms
from m2gen.bench.layers.document import load_layers
from m2gen.bench.layers.kinds import Part

NAMES = {
    Part.RECURRENCE: (
        "m2rnn_forward_kernel",
        "m2rnn_backward_kernel",
        "m2rnn_step_kernel",
        "m2rnn_sum_kernel",
        "_m2rnn_forward_triton_kernel",
        "m2rnn_backward_triton_kernel",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t, "
        "Flash_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t> >, false, true>(pytorch_flash::Flash_fwd_params)",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<128, 64, 128, 8, 2, 4, 2> >",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3i_128x128x128_4x1x1_cga1x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
        "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
        "chunk_gated_delta_rule_fwd_kkt_solve_kernel",
        "chunk_fwd_kernel_o",
        "chunk_bwd_kernel_dqkwg",
        "chunk_bwd_kernel_dv_local",
        "chunk_local_cumsum_scalar_kernel",
        "gdn_gate_chunk_cumsum_scalar_kernel",
        "prepare_wy_repr_bwd_kernel",
        "recompute_w_u_fwd_kernel",
        "merge_16x16_to_64x64_inverse_kernel",
        "fused_recurrent_gated_delta_rule_fwd_kernel",
    ),
    Part.PROJECTIONS: (
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x64_32x4_nn_align2>(Params)",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false>(...)",
        "void gemmSN_TN_kernel<float, 128, 16, 2, 4, 8, 9, false>(...)",
        "std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16>",
        "triton_tem_fused_mm_t_3",
        "triton_tem_fused_addmm_0",
    ),
    Part.REST: (
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<CUDAFunctor_add<float> >",
        "void at::native::vectorized_elementwise_kernel<8, at::native::silu_kernel(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 3>",
        "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<4, float>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float> > >",
        "triton_poi_fused__to_copy_mul_silu_4",
        "triton_red_fused__scaled_dot_product_flash_attention_backward_mm_mul_sum_7",
        "triton_per_fused_addmm_native_layer_norm_2",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "causal_conv1d_fwd_kernel",
        "layer_norm_gated_fwd_kernel",
        "l2norm_bwd_kernel",
        "m2rnn_epilogue_kernel",
        "m2rnn_convolution_kernel",
    ),
}
"""Names in the forms that profilers give them, with what they are for."""


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in NAMES.items() for name in names])
def test_parts_of_kernels(part: Part, name: str) -> None:
    """The rule knows attention that has cutlass in its name, and fused elementwise kernels that name products."""
    assert part_of(name) is part


def test_parts_add_up() -> None:
    """Every kernel counts once; a step of which no kernel was seen has no parts."""
    kernels = [KernelTime(names[i], 2.0**i, 1) for names in NAMES.values() for i in (0, 1)]
    assert parts_ms(kernels) == dict.fromkeys(Part, 3.0)
    assert parts_ms([]) == {}


def test_names_that_a_profiler_recorded() -> None:
    """In a run on an H200, every kernel of m2gen, cuBLAS and cuDNN counts to the part that it is of."""
    document = load_layers(ROOT / "docs" / "data" / "layers_h200.json")
    assert document is not None
    names = {kernel.name for row in document.layer_rows for kernel in row.kernels}
    parts = {part: {name for name in names if part_of(name) is part} for part in Part}
    ours = {name for name in names if name.startswith("m2rnn_")}
    assert {f"m2rnn_{name}_kernel" for name in ("forward", "backward", "decode")} <= parts[Part.RECURRENCE]
    around = {
        f"m2rnn_{name}_kernel" for name in ("convolve", "convolve_backward", "decay", "finish", "finish_backward")
    }
    assert around <= ours & parts[Part.REST]
    assert {name for name in names if "nvjet" in name or "cutlass_80" in name} <= parts[Part.PROJECTIONS]
    assert {name for name in names if "cudnn" in name} <= parts[Part.RECURRENCE]
    assert {name for name in names if "at::native" in name or "triton_poi" in name} <= parts[Part.REST]
