/* Weights of packed codes. Codes lie in 32-bit words, a word of a plane after the other, as `qkit_torchao/arithmetic/words.py`
   describes; codes are unsigned from 0 on. `native/products.py` has these structures too. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

enum { DONE, UNKNOWN };
/* The first three are types of numbers. E4M3 under a power of two, and in files times any number or over one. */
enum {
    FLOAT_SCALES, BFLOAT16_SCALES, FLOAT16_SCALES, E8M0_SCALES, ANY_E8M0_SCALES, E4M3_SCALES, E4M3_TIMES_SCALES, E4M3_OVER_SCALES
};

struct weight { /* [outputs, inputs] */
    const uint32_t *codes;
    const void *scales;
    const uint8_t *zeros; /* NULL where groups have none; as many as scales */
    const void *biases;   /* as `zeros`; codes of such groups are from 0 on */
    int64_t outputs, inputs, group, groups; /* groups of a row; 0 where the tensor has one scale */
    int32_t integer, high, low; /* widths of the planes; `low` is 0 where there is one */
    int32_t unit, scale_type;
    int32_t bias_type; /* as of x */
    int32_t mantissa, min_exponent;
    float power; /* the scale of the tensor, or 1 */
};

struct team { /* of OpenMP, whose threads the caller has already: NULL for one thread */
    void (*run)(void (*)(void *), void *, unsigned, unsigned);
    int (*rank)(void);
    int (*size)(void);
    int32_t threads;
};

INLINE int64_t at_least(int64_t n, int64_t size) { return (n + size - 1) / size; }

INLINE int64_t words_of(const struct weight *w, int32_t width)
{
    return at_least(w->inputs, w->unit) * w->unit * width / 32;
}

INLINE int64_t words_of_row(const struct weight *w)
{
    return words_of(w, w->high) + (w->low ? words_of(w, w->low) : 0);
}

/* The number that the byte of a scale stands for. Bytes of files may be any: E8M0 has one subnormal number, and one NaN. */
INLINE float scale_of_byte(const struct weight *w, uint8_t code)
{
    static const struct small e4m3 = {3, -6, 8, 448.0f};
    if (w->scale_type == E8M0_SCALES)
        return power((int32_t)code - 127);
    if (w->scale_type == ANY_E8M0_SCALES)
        return code == 255 ? NAN : code ? power((int32_t)code - 127) : from_bits(0x00400000);
    if (w->scale_type == E4M3_OVER_SCALES)
        return decoded_small(code, e4m3) / w->power;
    return decoded_small(code, e4m3) * w->power;
}

/* The scale of a group, in float32. */
INLINE float scale_at(const struct weight *w, int64_t i)
{
    if (w->scale_type <= FLOAT16_SCALES)
        return load(w->scales, i, w->scale_type);
    return scale_of_byte(w, ((const uint8_t *)w->scales)[i]);
}
