// The table of one instruction set: included last by each isa_*.cpp, after its simd header.
#pragma once

#include "attention/attention.h"
#include "isa/kernels.h"
#include "matmul/matmul.h"
#include "matmul/matmul_float.h"
#include "matmul/matmul_trellis.h"
#include "program/recurrence_kernel.h"
#include "program/rows.h"
#include "rounding/descent_kernel.h"
#include "rounding/nested_descent_kernel.h"
#include "rounding/rounding_kernel.h"
#include "rounding/trellis_kernel.h"
#include "sampling/sampling_kernel.h"
#include "simd/trace.h"

// The table kbit::kernels_<set>, with this matmul where it is the set's own.
#define KBIT_DEFINE_KERNELS_WITH(set, matmul_int8)                                                                     \
  namespace kbit {                                                                                                     \
  extern const Kernels kernels_##set;                                                                                  \
  const Kernels kernels_##set = {#set,         ::matmul_int8,   ::matmul_bf16,     ::matmul_fp32,      ::matmul_trellis_int8, \
                                 ::quantize_row, ::rotate_row,  ::bfloat_row,      ::rms_norm,         ::add_row,      \
                                 ::activate_row, ::soft_cap_row, ::decode_row,     ::gated_delta,      ::state_space,  \
                                 kAttentionKernels, ::round_rows, ::descend_rows,  ::descend_nested_rows,              \
                                 ::trellis_search, ::block_maxima, ::block_weights, ::trace};                          \
  }
#define KBIT_DEFINE_KERNELS(set) KBIT_DEFINE_KERNELS_WITH(set, matmul_int8)
