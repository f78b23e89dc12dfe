// Numbers in fp64 with the bits of the law, see `qkit.reference.products`. The compiler contracts nothing: a product is fused with a sum
// only by `fused`, where both are exact.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;

constexpr u32 ROWS = 32;  // threads of a program

#ifndef HOST
#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define ENTRY extern "C" __global__ void
DEVICE u64 bits(double x) { return __double_as_longlong(x); }
DEVICE double number(u64 u) { return __longlong_as_double(u); }
DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE double to_bfloat16(double x) {
    u32 u = __float_as_uint(__double2float_rn(x));
    return __uint_as_float((u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000);
}
#endif

DEVICE double power(int e) { return number((u64)(e + 1023) << 52); }
DEVICE double larger(double a, double b) { return a > b ? a : b; }
DEVICE double clipped(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// The least e with |x| < 2^e, as frexp has it; 0 for 0.
DEVICE int exponent_above(double x) {
    int e = bits(x) >> 52 & 2047;
    return e ? e - 1022 : 0;
}

// `a` as two numbers of 20 bits, see `products.halves`; `e`: the exponent above the largest of those that are summed over.
DEVICE void halve(double a, int e, double &top, double &rest) {
    top = rint(a * power(20 - e)) * power(e - 20);
    rest = rint((a - top) * power(40 - e)) * power(e - 40);
}

