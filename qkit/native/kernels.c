/* The loops that a CPU spends its time in: quantizing, fake-quantizing and packing; `weights.h` begins those of packed codes.
   `qkit/reference/` is the law: these loops do its arithmetic in its order, one group at a time, and so compute its bits.

   There are no intrinsics and no threads: compilers vectorize these loops, and callers split rows. Build with -O3
   -ffp-contract=off -fno-math-errno -fno-trapping-math, and never with -ffast-math. Constants come from `qkit/element.py`, in
   `struct grid`. Codes, scales and bytes are little-endian. `native/library.py` declares the elements and scale rules that
   `known` and `pack` accept. */

#include "numbers.h"

#define BATCH 64 /* groups whose scales one loop computes, so that compilers vectorize it */

enum { DONE, UNKNOWN }; /* returned to Python: UNKNOWN says that nothing was written */
enum { SIGNED, SYMMETRIC, MINMAX, RCEIL, EVEN, FLOOR, NVFP4 }; /* absmax and midmax are SYMMETRIC: their step differs */

struct grid {
    int32_t rule, bits;
    int32_t mantissa, min_exponent, max_exponent; /* of a small float */
    int32_t min_code, max_code;                   /* of E8M0 */
    float lowest, highest;                        /* codes of an integer; -largest and largest of a float */
    float step;                                   /* the multiplier of a peak */
    float min_scale;
    float min_block, max_block; /* of e4m3 scales */
};

struct scales {                      /* of a batch of groups */
    float high[BATCH], low[BATCH];   /* extremes; zero counts as a value */
    float step[BATCH], zero[BATCH];  /* a value is (code - zero) * step; step is NaN where a group is not finite */
    uint8_t code[BATCH];             /* E8M0, or the bits of an e4m3 */
};

/* Small floats: above the smallest normal number the pattern is rounded; below it, a sum rounds to the fixed distance. */

INLINE uint8_t small_code(float y, struct small e)
{
    int32_t drop = 23 - e.mantissa;
    float a = clip(fabsf(y), 0.0f, e.largest), shift = power(e.min_exponent + drop);
    uint32_t rounded = (bits(a) + (1u << (drop - 1)) - 1 + (bits(a) >> drop & 1)) >> drop;
    uint32_t normal = rounded - ((uint32_t)(126 + e.min_exponent) << e.mantissa);
    uint32_t below = bits(a + shift) - bits(shift);
    uint32_t code = a < power(e.min_exponent) ? below : normal;
    return (uint8_t)(bits(y) >> 31 << (e.width - 1) | code);
}

INLINE float small_value(float y, struct small e)
{
    int32_t drop = 23 - e.mantissa;
    float a = clip(fabsf(y), 0.0f, e.largest), shift = power(e.min_exponent + drop);
    uint32_t normal = (bits(a) + (1u << (drop - 1)) - 1 + (bits(a) >> drop & 1)) & ~((1u << drop) - 1);
    uint32_t below = bits((a + shift) - shift);
    return from_bits((bits(y) & 0x80000000u) | (a < power(e.min_exponent) ? below : normal));
}

static const struct small E4M3 = {3, -6, 8, 448.0f};

/* Extremes; zero counts as a value. As integers, the patterns of one sign are in the order of their values. */

#define EXTREMES(NAME, UNSIGNED, SIGNED_)                                               \
    INLINE void NAME(const UNSIGNED *x, int64_t n, UNSIGNED *highest, UNSIGNED *lowest) \
    {                                                                                   \
        SIGNED_ high = 0;                                                               \
        UNSIGNED low = (UNSIGNED)((UNSIGNED)1 << (8 * sizeof low - 1));                 \
        for (int64_t i = 0; i < n; i++) {                                               \
            high = (SIGNED_)x[i] > high ? (SIGNED_)x[i] : high;                         \
            low = x[i] > low ? x[i] : low;                                              \
        }                                                                               \
        *highest = (UNSIGNED)high, *lowest = low;                                       \
    }

EXTREMES(extremes_of_16, uint16_t, int16_t)
EXTREMES(extremes_of_32, uint32_t, int32_t)

INLINE void extremes(const void *x, int64_t n, int type, float *high, float *low)
{
    uint16_t ends[2];
    uint32_t wide[2];
    if (type == FLOAT32) {
        extremes_of_32(x, n, &wide[0], &wide[1]);
        *high = from_bits(wide[0]), *low = from_bits(wide[1]);
    } else {
        extremes_of_16(x, n, &ends[0], &ends[1]);
        *high = load(ends, 0, type), *low = load(ends, 1, type);
    }
}

/* Scales */

INLINE float round_to_bfloat16(float x)
{
    return from_bits((bits(x) + 0x7FFF + (bits(x) >> 16 & 1)) & 0xFFFF0000u);
}

INLINE void choose(struct scales *s, int i, float tensor_scale, const struct grid *grid, int rule)
{
    float high = s->high[i], low = s->low[i], step, zero = 0.0f;
    float peak = high >= -low ? high : -low, poison = high * 0.0f + low * 0.0f;
    int32_t code = 0;
    if (rule == SIGNED) {
        float end = high >= -low ? high : low;
        float least = end > 0.0f ? -grid->min_scale : grid->min_scale;
        step = round_to_bfloat16(end * grid->step);
        step = fabsf(step) < grid->min_scale ? least : step;
    } else if (rule == SYMMETRIC || rule == MINMAX) {
        float span = rule == MINMAX ? high - low : peak;
        step = round_to_bfloat16(span * grid->step);
        step = step < grid->min_scale ? grid->min_scale : step;
        zero = rule == MINMAX ? clip(rintf(-low / step), grid->lowest, grid->highest) : 0.0f;
        poison += span * 0.0f; /* the distance of two finite numbers may be infinite */
    } else if (rule == NVFP4) {
        float block = clip(peak * (1.0f / tensor_scale) * grid->step, grid->min_block, grid->max_block);
        code = small_code(block, E4M3);
        step = small_value(block, E4M3) * tensor_scale;
    } else {
        uint32_t half = rule == EVEN ? 1u << (22 - grid->mantissa) : 0, up = bits(peak * grid->step);
        code = (int32_t)((bits(peak) + half) >> 23) - grid->max_exponent;
        code = rule == RCEIL ? (int32_t)(up >> 23) + ((up & 0x7FFFFF) != 0) : code;
        code = code < grid->min_code ? grid->min_code : code > grid->max_code ? grid->max_code : code;
        step = power(code - 127);
    }
    s->step[i] = step + poison;
    s->zero[i] = zero;
    s->code[i] = (uint8_t)code;
}

/* The scales of `count` groups of `n`. */
INLINE void find_scales(struct scales *s, const void *x, int count, int64_t n, int type, const float *ends,
                        float tensor_scale, const struct grid *grid)
{
    int64_t width = n * (type == FLOAT32 ? 4 : 2);
    for (int i = 0; i < count; i++)
        if (ends)
            s->high[i] = ends[0], s->low[i] = ends[1];
        else
            extremes((const char *)x + i * width, n, type, &s->high[i], &s->low[i]);
#define RULE(R)                         \
    case R:                             \
        for (int i = 0; i < count; i++) \
            choose(s, i, tensor_scale, grid, R); \
        break;
    switch (grid->rule) {
        RULE(SIGNED)
        RULE(SYMMETRIC)
        RULE(MINMAX)
        RULE(RCEIL)
        RULE(EVEN)
        RULE(FLOOR)
        RULE(NVFP4)
    }
}

/* One group at a time. `type` is a constant in each call. */

#define EACH(WHAT)                      \
    for (int64_t i = 0; i < n; i++) \
        WHAT(i);

INLINE void encode(const void *x, int64_t n, int type, float step, float zero, const struct grid *grid, uint8_t *codes)
{
    float lowest = grid->lowest, highest = grid->highest, inverse = 1.0f / step;
    struct small e = {grid->mantissa, grid->min_exponent, grid->bits, highest};
#define INTEGER(I) codes[I] = (uint8_t)(int32_t)clip(rintf(load(x, I, type) / step) + zero, lowest, highest)
#define POWER(I) codes[I] = small_code(load(x, I, type) * inverse, e) /* exact: the step is a power of two */
#define BLOCK(I) codes[I] = small_code(load(x, I, type) / step, e)    /* right: the step has four bits */
    if (grid->rule < RCEIL)
        EACH(INTEGER)
    else if (grid->rule < NVFP4)
        EACH(POWER)
    else
        EACH(BLOCK)
#undef INTEGER
#undef POWER
#undef BLOCK
}

INLINE void round_values(const void *x, int64_t n, int type, float step, float zero, const struct grid *grid, void *out)
{
    float lowest = grid->lowest, highest = grid->highest, inverse = 1.0f / step;
    struct small e = {grid->mantissa, grid->min_exponent, grid->bits, highest};
#define INTEGER(I) \
    store(out, I, (clip(rintf(load(x, I, type) / step) + zero, lowest, highest) - zero) * step, type)
#define POWER(I) store(out, I, small_value(load(x, I, type) * inverse, e) * step, type)
#define BLOCK(I) store(out, I, small_value(load(x, I, type) / step, e) * step, type)
    if (step != step)
        store_nan(out, n, type);
    else if (grid->rule < RCEIL)
        EACH(INTEGER)
    else if (grid->rule < NVFP4)
        EACH(POWER)
    else
        EACH(BLOCK)
}

INLINE void quantize(const struct grid *grid, const void *x, int64_t groups, int64_t n, const float *ends,
                     float tensor_scale, uint8_t *codes, void *scales, uint8_t *zeros, int type)
{
    int64_t width = n * (type == FLOAT32 ? 4 : 2);
    struct scales s;
    for (int64_t first = 0; first < groups; first += BATCH) {
        int count = groups - first < BATCH ? (int)(groups - first) : BATCH;
        const char *from = (const char *)x + first * width;
        find_scales(&s, from, count, n, type, ends, tensor_scale, grid);
        for (int i = 0; i < count; i++)
            encode(from + i * width, n, type, s.step[i], s.zero[i], grid, codes + (first + i) * n);
        if (grid->rule < RCEIL)
            memcpy((float *)scales + first, s.step, count * sizeof(float));
        else
            memcpy((uint8_t *)scales + first, s.code, count);
        for (int i = 0; zeros && i < count; i++)
            zeros[first + i] = (uint8_t)s.zero[i];
    }
}

INLINE void fake_quantize(const struct grid *grid, const void *x, int64_t groups, int64_t n, const float *ends,
                          float tensor_scale, void *out, int type)
{
    int64_t width = n * (type == FLOAT32 ? 4 : 2);
    struct scales s;
    for (int64_t first = 0; first < groups; first += BATCH) {
        int count = groups - first < BATCH ? (int)(groups - first) : BATCH;
        const char *from = (const char *)x + first * width;
        char *to = (char *)out + first * width;
        find_scales(&s, from, count, n, type, ends, tensor_scale, grid);
        for (int i = 0; i < count; i++)
            round_values(from + i * width, n, type, s.step[i], s.zero[i], grid, to + i * width);
    }
}

/* Eight codes, one in a byte, as one stream of bits: pairs are joined first, then fours, then all eight. */
INLINE uint64_t joined(const uint8_t *codes, int width, uint8_t flip)
{
    uint64_t one = (1ull << width) - 1, two = (1ull << 2 * width) - 1, four = (1ull << 4 * width) - 1, x;
    memcpy(&x, codes, 8);
    x ^= flip * 0x0101010101010101u;
    x = (x & one * 0x0001000100010001u) | (x >> (8 - width) & (one << width) * 0x0001000100010001u);
    x = (x & two * 0x0000000100000001u) | (x >> (16 - 2 * width) & (two << 2 * width) * 0x0000000100000001u);
    return (x & four) | (x >> (32 - 4 * width) & four << 4 * width);
}

/* `n` codes to a stream of `width` bits each, lowest first, in `bytes` bytes; the rest of them is zero. Codes are XORed with
   `flip`: the sign bit of `width` bits makes signed codes unsigned. Returns UNKNOWN, and writes nothing, for
   any other width. */
INLINE int32_t pack(const uint8_t *codes, int64_t n, int32_t width, uint8_t flip, uint8_t *out, int64_t bytes)
{
    int64_t whole = n / 8; /* eight codes fill `width` bytes */
    switch (width) {
#define WIDTH(W, TYPE) /* a type of exactly `W` bytes, if there is one, vectorizes */ \
    case W:                                                                    \
        for (int64_t i = 0; i < whole; i++) {                                  \
            TYPE stream = (TYPE)joined(codes + 8 * i, W, flip);                \
            memcpy(out + W * i, &stream, W);                                   \
        }                                                                      \
        break;
        WIDTH(2, uint16_t)
        WIDTH(3, uint64_t)
        WIDTH(4, uint32_t)
        WIDTH(5, uint64_t)
        WIDTH(6, uint64_t)
        WIDTH(8, uint64_t)
    default:
        return UNKNOWN;
    }
    uint8_t last[8];
    memset(last, flip, 8);
    memcpy(last, codes + 8 * whole, n - 8 * whole);
    uint64_t stream = joined(last, width, flip);
    int64_t left = bytes - whole * width, used = left < 8 ? left : 8;
    memcpy(out + whole * width, &stream, used);
    memset(out + whole * width + used, 0, left - used);
    return DONE;
}

/* Eight codes of 4 bits in the low halves of eight bytes, lowest first. */
INLINE uint64_t opened(const uint8_t *four)
{
    uint32_t x;
    memcpy(&x, four, 4);
    uint64_t wide = (x & 0xFFFFull) | (uint64_t)(x >> 16) << 32;
    wide = (wide & 0x000000FF000000FFull) | (wide & 0x0000FF000000FF00ull) << 8;
    return (wide & 0x000F000F000F000Full) | (wide & 0x00F000F000F000F0ull) << 4;
}

/* A stream of 4-bit codes to blocks of `runs` runs of `run` codes, a multiple of 16, after `head` bytes of `heads`. In a run, the
   first half of the codes goes to the low halves of the bytes, and the second half to the high ones. */
INLINE void nibbles(const uint8_t *words, const uint8_t *heads, int64_t blocks, int64_t head, int64_t runs, int64_t run,
                    uint8_t *out)
{
    for (int64_t block = 0; block < blocks; block++, heads += head) {
        memcpy(out, heads, head);
        out += head;
        for (int64_t i = 0; i < runs; i++, words += run / 2)
            for (int64_t k = 0; k < run / 4; k += 4, out += 8) {
                uint64_t both = opened(words + k) | opened(words + run / 4 + k) << 4;
                memcpy(out, &both, 8);
            }
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
typedef uint8_t bytes16 __attribute__((vector_size(16)));

/* `nibbles` of one run of 32 codes after 2 bytes, five times as fast: 16 bytes at a time. */
INLINE void nibbles32(const uint8_t *words, const uint8_t *heads, int64_t blocks, uint8_t *out)
{
    for (int64_t block = 0; block < blocks; block++, heads += 2, words += 16, out += 18) {
        bytes16 x, low, high, first, second;
        memcpy(out, heads, 2);
        memcpy(&x, words, 16);
        low = x & 15;
        high = x >> 4;
        first = __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        second = __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        first |= second << 4;
        memcpy(out + 2, &first, 16);
    }
}
#endif
#endif

/* Bytes to blocks of `run` bytes after `head` bytes of `heads`. Each byte is XORed with `flip`. */
INLINE void octets(const uint8_t *words, const uint8_t *heads, int64_t blocks, int64_t head, int64_t run, uint8_t flip,
                   uint8_t *out)
{
    for (int64_t block = 0; block < blocks; block++, heads += head, words += run, out += head + run) {
        memcpy(out, heads, head);
        for (int64_t i = 0; i < run; i++)
            out[head + i] = words[i] ^ flip;
    }
}

/* Whether these kernels compute `grid`: a new element or scale rule is the law's alone until it is here. */
INLINE int known(const struct grid *grid)
{
    int32_t bits = grid->bits, mantissa = grid->mantissa;
    if (grid->rule == NVFP4)
        return bits == 4 && mantissa == 1;
    if (grid->rule == RCEIL || grid->rule == EVEN || grid->rule == FLOOR)
        return (bits == 4 && mantissa == 1) || (bits == 8 && (mantissa == 2 || mantissa == 3));
    if (grid->rule == SIGNED || grid->rule == SYMMETRIC || grid->rule == MINMAX)
        return bits >= 2 && bits <= 8 && bits != 7;
    return 0;
}

INLINE int is_type(int32_t type) { return type == FLOAT32 || type == BFLOAT16 || type == FLOAT16; }

/* What Python calls. Each function that writes returns DONE or UNKNOWN. */

const char *const qkit_digest = DIGEST; /* of this file and of its flags, see build.py */

/* Writes the highest and the lowest of `n` numbers into `ends`; zero counts as a number. */
EXPORT int32_t qkit_extremes(const void *x, int64_t n, int32_t type, float *ends)
{
    if (!is_type(type))
        return UNKNOWN;
    if (type == FLOAT32)
        extremes(x, n, FLOAT32, &ends[0], &ends[1]);
    else if (type == BFLOAT16)
        extremes(x, n, BFLOAT16, &ends[0], &ends[1]);
    else
        extremes(x, n, FLOAT16, &ends[0], &ends[1]);
    return DONE;
}

/* Quantizes rows of `groups` groups of `n`. `ends`: the extremes of the whole tensor, or NULL if every group has its own.
   `zeros`: NULL for a symmetric rule. `words`: NULL, or the place of packed rows of `bytes` bytes; then `codes` holds one row only. */
EXPORT int32_t qkit_quantize(const struct grid *grid, const void *x, int64_t rows, int64_t groups, int64_t n, int32_t type,
                             const float *ends, float tensor_scale, uint8_t *codes, void *scales, uint8_t *zeros,
                             uint8_t *words, int64_t bytes)
{
    if (!known(grid) || !is_type(type))
        return UNKNOWN;
    int64_t width = groups * n, scale_bytes = grid->rule < RCEIL ? groups * (int64_t)sizeof(float) : groups;
    uint8_t flip = grid->lowest < 0 && grid->rule < RCEIL ? (uint8_t)(1 << (grid->bits - 1)) : 0;
    for (int64_t row = 0; row < rows; row++) {
        const char *from = (const char *)x + row * width * (type == FLOAT32 ? 4 : 2);
        uint8_t *to = codes + (words ? 0 : row * width), *zero = zeros ? zeros + row * groups : NULL;
        void *scale = (char *)scales + row * scale_bytes;
        if (type == FLOAT32)
            quantize(grid, from, groups, n, ends, tensor_scale, to, scale, zero, FLOAT32);
        else if (type == BFLOAT16)
            quantize(grid, from, groups, n, ends, tensor_scale, to, scale, zero, BFLOAT16);
        else
            quantize(grid, from, groups, n, ends, tensor_scale, to, scale, zero, FLOAT16);
        if (words && pack(to, width, grid->bits, flip, words + row * bytes, bytes) != DONE)
            return UNKNOWN;
    }
    return DONE;
}

/* Writes the values of `groups` groups of `n`. */
EXPORT int32_t qkit_fake_quantize(const struct grid *grid, const void *x, int64_t groups, int64_t n, int32_t type,
                                  const float *ends, float tensor_scale, void *out)
{
    if (!known(grid) || !is_type(type))
        return UNKNOWN;
    if (type == FLOAT32)
        fake_quantize(grid, x, groups, n, ends, tensor_scale, out, FLOAT32);
    else if (type == BFLOAT16)
        fake_quantize(grid, x, groups, n, ends, tensor_scale, out, BFLOAT16);
    else
        fake_quantize(grid, x, groups, n, ends, tensor_scale, out, FLOAT16);
    return DONE;
}

/* Packs codes [rows, n], each row into `bytes` bytes. */
EXPORT int32_t qkit_pack(const uint8_t *codes, int64_t rows, int64_t n, int32_t width, uint8_t flip, uint8_t *out,
                         int64_t bytes)
{
    for (int64_t row = 0; row < rows; row++)
        if (pack(codes + row * n, n, width, flip, out + row * bytes, bytes) != DONE)
            return UNKNOWN;
    return DONE;
}

/* Writes each of `n` scales as a float16, rounded to nearest even, `repeat` times. A scale must not be NaN. */
EXPORT int32_t qkit_halves(const float *scales, int64_t n, int64_t repeat, uint16_t *out)
{
    if (repeat == 1) /* these two loops vectorize */
        for (int64_t i = 0; i < n; i++)
            out[i] = half_code(scales[i]);
    else if (repeat == 2)
        for (int64_t i = 0; i < n; i++) {
            uint32_t both = half_code(scales[i]) * 0x10001u;
            memcpy(out + 2 * i, &both, 4);
        }
    else
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k < repeat; k++)
                *out++ = half_code(scales[i]);
    return DONE;
}

/* Writes `blocks` blocks of packed codes of `width` bits, 4 or 8, each after its `head` bytes of `heads`; see `nibbles` and
   `octets`. */
EXPORT int32_t qkit_interleave(const uint8_t *words, const uint8_t *heads, int64_t blocks, int64_t head, int64_t runs,
                               int64_t run, int32_t width, uint8_t flip, uint8_t *out)
{
    if (width == 4 && flip == 0 && run == 32 && runs == 1 && head == 2)
#ifdef SHUFFLES
        nibbles32(words, heads, blocks, out);
#else
        nibbles(words, heads, blocks, 2, 1, 32, out); /* constants make the loops straight */
#endif
    else if (width == 4 && flip == 0 && run % 16 == 0)
        nibbles(words, heads, blocks, head, runs, run, out);
    else if (width == 8)
        octets(words, heads, blocks, head, runs * run, flip, out);
    else
        return UNKNOWN;
    return DONE;
}

/* Blocks of a tensor that are written together: their scales fit on the stack. */
enum { HEADS = 2048 };

/* The scales of integers in bfloat16, each for `repeat` blocks of 32 codes of `width` bits, and their codes: GGUF's Q4_0, Q8_0.
   Scales are float16 exactly; see `qkit_spans`. */
EXPORT int32_t qkit_blocks(const uint8_t *words, const uint16_t *scales, int64_t groups, int64_t repeat, int32_t width,
                           uint8_t *out)
{
    uint16_t halves[HEADS], heads[HEADS];
    int64_t codes = 4 * width, length = codes + 2;
    int64_t most = repeat < HEADS ? HEADS / repeat : 1, each = repeat < HEADS ? repeat : HEADS;
    if (width != 4 && width != 8)
        return UNKNOWN;
    for (int64_t n; groups; groups -= n, scales += n) {
        n = groups < most ? groups : most;
        for (int64_t i = 0; i < n; i++) /* this loop and the next vectorize */
            halves[i] = half_code(load(scales, i, BFLOAT16));
        if (each == 2)
            for (int64_t i = 0; i < n; i++) {
                uint32_t both = halves[i] * 0x10001u;
                memcpy(heads + 2 * i, &both, 4);
            }
        else
            for (int64_t i = 0; i < n; i++)
                for (int64_t k = 0; k < each; k++)
                    heads[i * each + k] = halves[i];
        for (int64_t left = n * repeat, some; left; left -= some) { /* more than once only where all heads are one */
            some = left < HEADS ? left : HEADS;
            if (width == 4)
                qkit_interleave(words, (const uint8_t *)heads, some, 2, 1, 32, 4, 0, out);
            else
                qkit_interleave(words, (const uint8_t *)heads, some, 2, 1, 32, 8, 0x80, out);
            words += codes * some;
            out += length * some;
        }
    }
    return DONE;
}

/* The least and the largest magnitude of `n` scales in bfloat16: a NaN is larger than any number. */
EXPORT int32_t qkit_spans(const uint16_t *scales, int64_t n, uint16_t *least, uint16_t *most)
{
    uint16_t low = 0x7FFF, high = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t magnitude = scales[i] & 0x7FFF;
        low = magnitude < low ? magnitude : low;
        high = magnitude > high ? magnitude : high;
    }
    *least = low;
    *most = high;
    return DONE;
}

/* `scales` in bfloat16 times `factor`, a power of two, `repeat` times each, as `type`: MLX's scales and biases. */
EXPORT int32_t qkit_repeated(const uint16_t *scales, int64_t n, int64_t repeat, float factor, int32_t type, void *out)
{
    if (repeat == 1)
        for (int64_t i = 0; i < n; i++)
            store(out, i, load(scales, i, BFLOAT16) * factor, type);
    else
        for (int64_t i = 0; i < n * repeat; i++)
            store(out, i, load(scales, i / repeat, BFLOAT16) * factor, type);
    return DONE;
}
