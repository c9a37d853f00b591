// Stands in for the common.cuh of ggml-cuda: only what our kernel and dequantize.cuh take from it, on the CPU.
#pragma once

#include "ggml.h"
#include "ggml-impl.h"

#include "simt.h"

#define GGML_COMMON_DECL_CUDA
#define GGML_COMMON_IMPL_CUDA
#include "ggml-common.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define WARP_SIZE 32

using std::max;
using std::min;

typedef void * cudaStream_t;
typedef void (*dequantize_kernel_t)(const void * vx, const int64_t ib, const int iqs, float2 & v);

template <typename dst_t>
using dequantize_kq_t = void (*)(const void * vx, const int64_t ib, dst_t * yy, const int tid);

// with -use_fast_math off by up to 2 ulp: here, too, in a direction that depends on the argument
inline float rsqrtf(float x) {
    const uint32_t hash = __float_as_uint(x)*2654435761u >> 30;
    return 1.0f/sqrtf(x)*(1.0f + ((int) hash - 1)*0x1p-23f);
}

inline void ggml_cuda_pdl_lc() {}

inline void ggml_cuda_pdl_sync() {}

float ggml_cuda_e8m0_to_fp32(uint8_t x); // named in dequantize.cuh, not used here

template <int width> float warp_reduce_sum(float x) {
    for (int offset = width/2; offset > 0; offset >>= 1) {
        x += __shfl_xor_sync(0xffffffff, x, offset, width);
    }
    return x;
}

struct ggml_cuda_pool {};

template <typename T> struct ggml_cuda_pool_alloc {
    simt::memory memory;

    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t size) : memory(size*sizeof(T)) {}

    T * get() { return (T *) memory.data; }
};

struct ggml_backend_cuda_context {
    ggml_cuda_pool the_pool;

    ggml_cuda_pool & pool() { return the_pool; }
    cudaStream_t stream() { return nullptr; }
};

struct ggml_cuda_kernel_launch_params {
    dim3 grid;
    dim3 block;

    ggml_cuda_kernel_launch_params(dim3 grid, dim3 block, size_t, cudaStream_t) : grid(grid), block(block) {}
};

template <typename... Params, typename... Args>
void ggml_cuda_kernel_launch(void (*kernel)(Params...), const ggml_cuda_kernel_launch_params & p, Args... args) {
    simt::launch(p.grid, p.block, [=] { kernel(args...); });
}
