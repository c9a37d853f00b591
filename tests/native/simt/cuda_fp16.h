// The types of CUDA that kernels and ggml's block formats use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct uint2  { unsigned x, y; };
struct uint3  { unsigned x, y, z; };
struct int2   { int x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline float2 make_float2(float x, float y) { return { x, y }; }
inline float4 make_float4(float x, float y, float z, float w) { return { x, y, z, w }; }

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

inline float simt_half_to_float(uint16_t h) {
    const int   exponent = (h >> 10) & 0x1f;
    const int   mantissa = h & 0x3ff;
    const float sign     = h & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return mantissa ? NAN : sign*INFINITY;
    }
    return sign*(exponent ? ldexpf(1024 + mantissa, exponent - 25) : ldexpf(mantissa, -24));
}

struct half {
    uint16_t bits;
    operator float() const { return simt_half_to_float(bits); }
};

struct half2 { half x, y; };

struct nv_bfloat16 {
    uint16_t bits;
    operator float() const {
        const uint32_t word = (uint32_t) bits << 16;
        float x;
        memcpy(&x, &word, sizeof(x));
        return x;
    }
};

struct nv_bfloat162 { nv_bfloat16 x, y; };

inline float  __bfloat162float(nv_bfloat16 x) { return x; }
inline float2 __half22float2(half2 x) { return { x.x, x.y }; }
inline half   __low2half(half2 x) { return x.x; }
inline half   __high2half(half2 x) { return x.y; }

// named in ggml's templates, not used here
nv_bfloat16 __float2bfloat16(float x);
half2       __float22half2_rn(float2 x);
