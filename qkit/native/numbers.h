/* Numbers of 32, 16 and 8 bits, for every source here. Functions are inline, and compute the bits of the law. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) /* the loader of these systems chooses the version */
#define EXPORT __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define EXPORT
#endif
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, FLOAT16 };

INLINE uint32_t bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

INLINE float from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

INLINE float power(int32_t exponent) { return from_bits((uint32_t)(127 + exponent) << 23); }

INLINE float clip(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

INLINE float half_value(uint16_t h)
{
    uint32_t magnitude = (uint32_t)(h & 0x7FFF) << 13;
    uint32_t finite = bits(from_bits(magnitude) * power(112)); /* the exponents' biases are 112 apart */
    return from_bits((uint32_t)(h & 0x8000) << 16 | (magnitude < 0x0F800000 ? finite : magnitude | 0x7F800000));
}

INLINE uint16_t half_code(float x)
{
    float a = fabsf(x);
    uint32_t normal = ((bits(a) + 0xFFF + (bits(a) >> 13 & 1)) >> 13) - (112 << 10);
    uint32_t code = a < power(-14) ? bits(a + 0.5f) - bits(0.5f) : normal;
    return (uint16_t)(bits(x) >> 16 & 0x8000) | (uint16_t)(code < 0x7C00 ? code : 0x7C00);
}

INLINE float load(const void *x, int64_t i, int type)
{
    if (type == FLOAT32)
        return ((const float *)x)[i];
    uint16_t pattern = ((const uint16_t *)x)[i];
    return type == BFLOAT16 ? from_bits((uint32_t)pattern << 16) : half_value(pattern);
}

/* Rounds to nearest even. `x` must not be NaN. */
INLINE void store(void *out, int64_t i, float x, int type)
{
    if (type == FLOAT32)
        ((float *)out)[i] = x;
    else if (type == BFLOAT16)
        ((uint16_t *)out)[i] = (uint16_t)((bits(x) + 0x7FFF + (bits(x) >> 16 & 1)) >> 16);
    else
        ((uint16_t *)out)[i] = half_code(x);
}

INLINE void store_nan(void *out, int64_t n, int type)
{
    for (int64_t i = 0; i < n; i++)
        if (type == FLOAT32)
            ((float *)out)[i] = NAN;
        else
            ((uint16_t *)out)[i] = type == BFLOAT16 ? 0x7FC0 : 0x7E00;
}

struct small {
    int32_t mantissa, min_exponent, width;
    float largest;
};

/* The value of a code; both halves of a code that is a normal number, or is not, are exact. */
INLINE float decoded_small(uint32_t code, struct small e)
{
    uint32_t magnitude = code & ((1u << (e.width - 1)) - 1), bias = (uint32_t)(126 + e.min_exponent) << 23;
    uint32_t pattern = magnitude << (23 - e.mantissa), least = bias + (1u << 23);
    uint32_t below = bits(from_bits(pattern + least) - from_bits(least));
    return from_bits((magnitude < 1u << e.mantissa ? below : pattern + bias) | (code >> (e.width - 1)) << 31);
}
