// Numbers in fp64 with the bits of the law, see `qkit.reference.products`. The compiler contracts nothing: a product is fused with a sum
// only by `fused`, where both are exact.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;

constexpr u32 ROWS = 32, THREADS = 128;  // threads of a program, alone and in teams

#ifndef LANES
#define LANES 32  // threads of a team
#endif

#ifndef HOST
#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define ENTRY extern "C" __global__ void
DEVICE u64 bits(double x) { return __double_as_longlong(x); }
DEVICE double number(u64 u) { return __longlong_as_double(u); }
DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE double to_bfloat16(double x) {
    u32 u = __float_as_uint(__double2float_rn(x));
    return __uint_as_float((u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000);
}

// Of the threads of a team, which ask together: the number of one, that of the one whose place differs by the bit `by`, the largest.
// `raise` makes a number at least `x`, whatever other threads do.
DEVICE u32 team_mask() { return LANES == 32 ? ~0u : ((1u << LANES % 32) - 1) << (threadIdx.x & 31 & ~(LANES - 1)); }
DEVICE void together() { __syncwarp(team_mask()); }
DEVICE double of_lane(double x, u32 lane) { return __shfl_sync(team_mask(), x, lane, LANES); }
DEVICE double of_neighbor(double x, u32 by) { return __shfl_xor_sync(team_mask(), x, by, LANES); }
DEVICE void raise(int *place, int x) { atomicMax(place, x); }
DEVICE int highest(int x) {
#pragma unroll
    for (u32 by = LANES / 2; by; by /= 2) x = max(x, __shfl_xor_sync(team_mask(), x, by, LANES));
    return x;
}
#endif

// Two numbers that are read at once.
struct alignas(16) Pair {
    double first, second;
};

// An even count of numbers from an address that is aligned as pairs are.
template <u32 COUNT> DEVICE void read(const double *from, double *to) {
#pragma unroll
    for (u32 k = 0; k < COUNT; k += 2) {
        const Pair both = *(const Pair *)(from + k);
        to[k] = both.first, to[k + 1] = both.second;
    }
}

DEVICE double power(int e) { return number((u64)(e + 1023) << 52); }
DEVICE double larger(double a, double b) { return a > b ? a : b; }
DEVICE double clipped(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// The power of two in a number, as its bits have it: no smaller for larger numbers.
DEVICE int power_of(double x) { return bits(x) >> 52 & 2047; }

// The least e with |x| < 2^e, as frexp has it; 0 for 0.
DEVICE int exponent_of_power(int power) { return power ? power - 1022 : 0; }
DEVICE int exponent_above(double x) { return exponent_of_power(power_of(x)); }

// `a` as a number of 20 bits, see `products.shortened`; `e`: the exponent above the largest of those that are summed over.
DEVICE double shortened(double a, int e) { return rint(a * power(20 - e)) * power(e - 20); }

// `a` as two numbers of 20 bits, see `products.fine_product`; `e`: the exponent above the largest of those that are summed over.
DEVICE void halve(double a, int e, double &top, double &rest) {
    top = rint(a * power(20 - e)) * power(e - 20);
    rest = rint((a - top) * power(40 - e)) * power(e - 40);
}

