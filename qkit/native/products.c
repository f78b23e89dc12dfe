/* Products of packed codes with few rows: sums in float32 of the exact values of codes, in an order that no number of threads
   changes. Eight lanes are a vector that compilers of any processor know; this file may contract a * b + c. */

#include "weights.h"

#define LANES 8
#define MOST 4 /* rows that share one pass over the codes */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

enum { SIGNED_CODES, UNSIGNED_CODES, SMALL_FLOATS, NORMAL_FLOATS, E2M1 };

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define EXPORT_PRODUCT __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EXPORT_PRODUCT
#endif

/* Row `x` in the order of the codes of the first plane, eight words beside each other. */
INLINE void arrange(const void *x, int64_t row, int type, const struct weight *w, float *out)
{
    int64_t count = words_of(w, w->high), each = 32 / w->high, unit_words = w->unit / each;
    memset(out, 0, at_least(count, LANES) * LANES * each * sizeof(float));
    for (int64_t word = 0; word < count; word++) {
        int64_t first = word / unit_words * w->unit + 2 * (word % unit_words);
        float *to = out + word / LANES * LANES * each + word % LANES;
        for (int64_t i = 0; i < each; i += 2, first += 2 * unit_words)
            for (int64_t odd = 0; odd < 2; odd++)
                if (first + odd < w->inputs)
                    to[(i + odd) * LANES] = load(x, row * w->inputs + first + odd, type);
    }
}

/* The sum of a row that is in the order of codes over those of one word. */
INLINE float sum_of_word(const float *arranged, int64_t word, int64_t each)
{
    float total = 0.0f;
    for (int64_t i = 0; i < each; i++)
        total += arranged[word / LANES * LANES * each + i * LANES + word % LANES];
    return total;
}

/* The number of each group of an output, `groups` of them, in `out` for each word of the first plane. */
INLINE void spread(const float *groups, int64_t count, int64_t span, int64_t padded, float *out)
{
#define SPREAD(SPAN)                        \
    for (int64_t g = 0; g < count; g++)     \
        for (int64_t i = 0; i < SPAN; i++)  \
            out[g * SPAN + i] = groups[g]
    if (span == 2)
        SPREAD(2);
    else if (span == 4)
        SPREAD(4);
    else if (span == 8)
        SPREAD(8);
    else
        SPREAD(span);
    for (int64_t i = count * span; i < padded; i++)
        out[i] = 0.0f;
}

/* The scales of an output, in float32. `table` has the scales of all bytes. */
INLINE void scales_of(const struct weight *w, int64_t first, int64_t groups, const float *table, float *out)
{
    const uint8_t *codes = (const uint8_t *)w->scales + first;
    if (w->scale_type > FLOAT16_SCALES)
        for (int64_t g = 0; g < groups; g++)
            out[g] = table[codes[g]];
    else
        for (int64_t g = 0; g < groups; g++)
            out[g] = load(w->scales, first + g, w->scale_type);
}

/* Where eight words of the first plane find their codes of the second: in which of its words, and how far up. Two words beside
   each other in a unit of the second are as long as `shift` tells apart. */
struct lanes {
    ints from[2];
    words shift[2];
    int64_t span; /* words of the first plane that share words of the second */
};

INLINE struct lanes lanes_of(int64_t unit_words, int width, int low)
{
    struct lanes lanes = {.span = unit_words > LANES ? unit_words : LANES};
    int64_t fewer = unit_words * low / width;
    for (int64_t word = 0; word < 2 * LANES; word++) {
        int64_t in_unit = word % unit_words, unit = unit_words < LANES ? word % LANES / unit_words : 0;
        lanes.from[word / LANES][word % LANES] = (int32_t)(unit * fewer + in_unit % fewer);
        lanes.shift[word / LANES][word % LANES] = (uint32_t)(2 * low * (in_unit / fewer));
    }
    return lanes;
}

INLINE words picked(words v, ints from)
{
#if defined(__GNUC__) && !defined(__clang__)
    return __builtin_shuffle(v, from);
#else
    words out;
    for (int i = 0; i < LANES; i++)
        out[i] = v[from[i]];
    return out;
#endif
}

/* The values of code `i` of eight words; `second` has the codes of the second plane, of `low` bits, where `low` is not 0. */
INLINE floats value_of(words v, words second, int i, int width, int low, int kind, struct small e)
{
    words top = v << (uint32_t)(32 - width - width * i); /* the code is in the highest bits */
    if (kind == SIGNED_CODES || kind == UNSIGNED_CODES) {
        uint32_t below = (1u << low) - 1;
        int spare = 32 - width - low;
        words code = kind == SIGNED_CODES ? (words)((ints)top >> spare) : top >> (uint32_t)spare;
        if (low)
            code = (code & ~below) | (second >> (uint32_t)(i / 2 * 2 * width + i % 2 * low) & below);
        return __builtin_convertvector((ints)code, floats);
    }
#if defined(__GNUC__) && !defined(__clang__)
    if (kind == E2M1) {
        static const floats table = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
        words code = v >> (uint32_t)(4 * i); /* the lowest three bits choose */
        return (floats)((words)__builtin_shuffle(table, (ints)code) ^ (code << 28 & 0x80000000u));
    }
#endif
    uint32_t mask = ((1u << (width - 1)) - 1) << (23 - e.mantissa), bias = (uint32_t)(126 + e.min_exponent) << 23;
    if (kind == NORMAL_FLOATS)
        return (floats)(((words)((ints)top >> (9 - width + e.mantissa)) & (mask | 0x80000000u)) + bias);
    /* With a leading 1, a number below the least normal one is too large; twice that less the least one is right, and less. */
    floats normal = (floats)((top >> (uint32_t)(9 - width + e.mantissa) & mask) + bias);
    floats small = normal * 2.0f - power(e.min_exponent);
    words less = (words)(small < normal);
    return (floats)((less & (words)small) | (~less & (words)normal) | (top & 0x80000000u));
}

/* Whether none of the codes of eight bits in eight words is below the least normal number. */
INLINE int are_normal(words v, struct small e)
{
    uint32_t exponents = (0x7fu >> e.mantissa << e.mantissa) * 0x01010101u;
    words carried = (v & exponents) + (0x80u - (1u << e.mantissa)) * 0x01010101u; /* into the highest bit of each byte */
    uint64_t all[LANES / 2];
    memcpy(all, &carried, sizeof carried);
    return (~(all[0] & all[1] & all[2] & all[3]) & 0x8080808080808080u) == 0;
}

INLINE float sum(floats v)
{
    float total = 0.0f;
    for (int i = 0; i < LANES; i++)
        total += v[i];
    return total;
}

/* Up to eight words, of which `there` lie in memory; a whole vector does not go by way of the stack. */
INLINE words loaded(const uint32_t *from, int64_t there)
{
    if (there >= LANES) {
        words whole;
        memcpy(&whole, from, sizeof whole);
        return whole;
    }
    words rest = {};
    memcpy(&rest, from, there * sizeof(uint32_t));
    return rest;
}

/* As `loaded`, of up to four words, which follow each other twice. */
INLINE words loaded_twice(const uint32_t *from, int64_t there)
{
    if (there >= 4) {
        uint32_t a = from[0], b = from[1], c = from[2], d = from[3];
        return (words){a, b, c, d, a, b, c, d};
    }
    return loaded(from, there);
}

INLINE void dot(const uint32_t *codes, int64_t count, int width, int low, const struct lanes *lanes, int kind, uint32_t flip,
                struct small e, const float *x, int64_t stride, int rows, const float *scales, const float *zeros, const float *biases,
                const float *x_sums, int64_t padded, float *sums)
{
    floats total[MOST] = {};
    const int each = 32 / width;
    const unsigned share = low ? width / low : 1; /* words of the first plane for one of the second */
    const uint32_t *seconds = codes + count;
    for (int64_t first = 0; first < count; first += LANES) {
        words v = loaded(codes + first, count - first) ^ flip, second = {};
        if (low) {
            uint64_t start = (uint64_t)first & ~(uint64_t)(lanes->span - 1), odd = (uint64_t)first / LANES % 2; /* a power of two */
            int64_t from = (int64_t)(start / share), there = (int64_t)((uint64_t)count / share) - from;
            second = share == 2 ? loaded(seconds + from, there) : loaded_twice(seconds + from, there);
            second = picked(second, lanes->from[odd]) >> lanes->shift[odd];
        }
        floats part[2][MOST] = {}, scale, zero; /* two sums do not wait for each other */
        memcpy(&scale, scales + first, sizeof scale);
        if (zeros)
            memcpy(&zero, zeros + first, sizeof zero);
#define CODES(KIND)                                                                \
    for (int i = 0; i < each; i++) {                                               \
        floats value = value_of(v, second, i, width, low, KIND, e);                \
        if (zeros)                                                                 \
            value -= zero;                                                         \
        for (int row = 0; row < rows; row++) {                                     \
            floats at;                                                             \
            memcpy(&at, x + row * stride + first * each + i * LANES, sizeof at);   \
            part[i % 2][row] += value * at;                                        \
        }                                                                          \
    }
        if (kind == SMALL_FLOATS && are_normal(v, e))
            CODES(NORMAL_FLOATS)
        else
            CODES(kind)
        for (int row = 0; row < rows; row++)
            total[row] += (part[0][row] + part[1][row]) * scale;
        for (int row = 0; biases && row < rows; row++) {
            floats bias, of_x;
            memcpy(&bias, biases + first, sizeof bias);
            memcpy(&of_x, x_sums + row * padded + first, sizeof of_x);
            total[row] += of_x * bias;
        }
    }
    for (int row = 0; row < rows; row++)
        sums[row] += sum(total[row]);
}

INLINE uint32_t repeated(uint32_t code, int width)
{
    uint32_t word = 0;
    for (int at = 0; at < 32; at += width)
        word |= code << at;
    return word;
}

/* A job of a team. */
struct product {
    const struct weight *w;
    const float *x; /* rows in the order of the codes of the first plane */
    const float *x_sums; /* rows of the sums of x over each word of the first plane */
    const float *table;  /* the scales of all bytes */
    int64_t stride;
    int64_t rows, padded;
    const void *bias;
    void *out;
    int32_t type, failed;
    const struct team *team;
};

INLINE void row_of(const struct product *p, const uint32_t *codes, const struct lanes *lanes, const float *scales,
                   const float *zeros, const float *biases, float *sums)
{
    const struct weight *w = p->w;
    int width = w->high, low = w->low, kind = !w->integer ? SMALL_FLOATS : zeros || biases ? UNSIGNED_CODES : SIGNED_CODES;
    int64_t count = words_of(w, width);
    uint32_t flip = kind == SIGNED_CODES ? repeated(1u << (width - 1), width) : 0;
    const struct small none = {0}, e2m1 = {1, 0, 4, 6.0f}, e4m3 = {3, -6, 8, 448.0f}, e5m2 = {2, -14, 8, 57344.0f};
#define DOT(WIDTH, LOW, KIND, ROWS, E)                                                  \
    dot(codes, count, WIDTH, LOW, lanes, KIND, flip, E, p->x, p->stride, ROWS, scales, \
        KIND == UNSIGNED_CODES ? zeros : NULL, KIND == UNSIGNED_CODES ? biases : NULL, p->x_sums, p->padded, sums)
#define ROWS_OF(WIDTH, LOW, KIND, E)             \
    do {                                         \
        if (p->rows == 1)                        \
            DOT(WIDTH, LOW, KIND, 1, E);         \
        else if (p->rows == 2)                   \
            DOT(WIDTH, LOW, KIND, 2, E);         \
        else                                     \
            DOT(WIDTH, LOW, KIND, MOST, E);      \
    } while (0)
#define INTEGERS(WIDTH, LOW)                                         \
    if (width == WIDTH && low == LOW && kind == SIGNED_CODES)        \
        ROWS_OF(WIDTH, LOW, SIGNED_CODES, none);                     \
    else if (width == WIDTH && low == LOW && kind == UNSIGNED_CODES) \
    ROWS_OF(WIDTH, LOW, UNSIGNED_CODES, none)
    INTEGERS(2, 0);
    INTEGERS(2, 1);
    INTEGERS(4, 0);
    INTEGERS(4, 1);
    INTEGERS(4, 2);
    INTEGERS(8, 0);
    if (kind == SMALL_FLOATS && width == 4)
        ROWS_OF(4, 0, E2M1, e2m1);
    else if (kind == SMALL_FLOATS && w->mantissa == 3)
        ROWS_OF(8, 0, SMALL_FLOATS, e4m3);
    else if (kind == SMALL_FLOATS)
        ROWS_OF(8, 0, SMALL_FLOATS, e5m2);
}

/* The outputs from `begin` to `end` of up to MOST rows. */
EXPORT_PRODUCT int32_t qkit_multiply_part(const struct product *p, int64_t begin, int64_t end)
{
    const struct weight *w = p->w;
    int64_t stride = words_of_row(w), padded = p->padded, each = 32 / w->high;
    int64_t groups = w->groups ? w->groups : 1, span = w->groups > 1 ? w->group / each : padded;
    float *scales = malloc(sizeof(float) * (padded * 3 + groups)), *zeros = w->zeros ? scales + padded : NULL;
    float *biases = w->biases ? scales + 2 * padded : NULL, *few = scales + 3 * padded;
    if (!scales)
        return UNKNOWN;
    struct lanes lanes = w->low ? lanes_of(w->unit / each, w->high, w->low) : (struct lanes){0};
    for (int64_t output = begin; output < end; output++) {
        float sums[MOST] = {};
        int64_t first = w->groups ? output * groups : 0;
        if (output == begin || w->groups) {
            scales_of(w, first, groups, p->table, few);
            spread(few, groups, span, padded, scales);
            for (int64_t g = 0; zeros && g < groups; g++)
                few[g] = (float)w->zeros[first + g];
            if (zeros)
                spread(few, groups, span, padded, zeros);
            for (int64_t g = 0; biases && g < groups; g++)
                few[g] = load(w->biases, first + g, w->bias_type);
            if (biases)
                spread(few, groups, span, padded, biases);
        }
        row_of(p, w->codes + output * stride, &lanes, scales, zeros, biases, sums);
        float bias = p->bias ? load(p->bias, output, p->type) : 0.0f;
        for (int64_t row = 0; row < p->rows; row++)
            store(p->out, row * w->outputs + output, sums[row] + bias, p->type);
    }
    free(scales);
    return DONE;
}

static void multiply_share(void *job)
{
    struct product *p = job;
    int64_t rank = p->team->rank(), size = p->team->size(), n = p->w->outputs;
    if (qkit_multiply_part(p, n * rank / size, n * (rank + 1) / size) != DONE)
        p->failed = 1;
}

/* x [rows, inputs] times the weight, and `bias` or NULL -> out [rows, outputs], all of one type. */
EXPORT int32_t qkit_multiply(const struct weight *w, const void *x, int64_t rows, int32_t type, const void *bias, void *out,
                             const struct team *team)
{
    int64_t size = type == FLOAT32 ? 4 : 2, padded = at_least(words_of(w, w->high), LANES) * LANES;
    int64_t stride = padded * (32 / w->high);
    float *arranged = calloc(MOST * (stride + padded), sizeof(float)), *x_sums = arranged + MOST * stride, table[256];
    if (!arranged)
        return UNKNOWN;
    for (uint32_t code = 0; w->scale_type > FLOAT16_SCALES && code < 256; code++)
        table[code] = scale_of_byte(w, (uint8_t)code);
    struct product p = {w, arranged, x_sums, table, stride, 0, padded, bias, NULL, type, 0, team};
    for (int64_t first = 0; first < rows; first += MOST) {
        p.rows = rows - first < MOST ? rows - first : MOST;
        p.out = (char *)out + first * w->outputs * size;
        for (int64_t row = 0; row < p.rows; row++) {
            arrange(x, first + row, type, w, arranged + row * stride);
            for (int64_t word = 0; w->biases && word < padded; word++)
                x_sums[row * padded + word] = sum_of_word(arranged + row * stride, word, 32 / w->high);
        }
        if (team->run && team->threads > 1)
            team->run(multiply_share, &p, (unsigned)team->threads, 0);
        else
            p.failed |= qkit_multiply_part(&p, 0, w->outputs) != DONE;
    }
    free(arranged);
    return p.failed ? UNKNOWN : DONE;
}
