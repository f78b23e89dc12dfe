/* The values of packed codes, bit for bit those of the law: every operation is rounded once. */

#include "weights.h"

/* The codes of a row, a byte each; `codes` has room for whole units. */
INLINE void unpack(const struct weight *w, const uint32_t *row, uint8_t *codes)
{
    int64_t units = at_least(w->inputs, w->unit);
#define PLANE(WIDTH, UNIT, JOIN)                                                                              \
    for (int64_t u = 0; u < units; u++)                                                                       \
        for (int p = 0; p < 16 / WIDTH; p++)                                                                  \
            for (int i = 0; i < UNIT * WIDTH / 32; i++) {                                                     \
                uint32_t pair = row[u * (UNIT * WIDTH / 32) + i] >> (2 * WIDTH * p);                          \
                uint16_t two = (uint16_t)((pair & ((1u << WIDTH) - 1)) | (pair >> WIDTH & ((1u << WIDTH) - 1)) << 8); \
                uint16_t *to = (uint16_t *)(codes + u * UNIT) + p * (UNIT * WIDTH / 32) + i;                  \
                *to = (uint16_t)(JOIN ? *to << WIDTH | two : two);                                            \
            }
#define UNITS(WIDTH, JOIN)              \
    {                                   \
        if (w->unit == 16 && WIDTH > 1) \
            PLANE(WIDTH, 16, JOIN)      \
        else if (w->unit == 32)         \
            PLANE(WIDTH, 32, JOIN)      \
        else if (w->unit == 64)         \
            PLANE(WIDTH, 64, JOIN)      \
        else                            \
            PLANE(WIDTH, 128, JOIN)     \
    }
    if (w->high == 2)
        UNITS(2, 0)
    else if (w->high == 4)
        UNITS(4, 0)
    else
        UNITS(8, 0)
    row += words_of(w, w->high);
    if (w->low == 1)
        UNITS(1, 1)
    else if (w->low == 2)
        UNITS(2, 1)
}

INLINE void values(const struct weight *w, const uint8_t *codes, int64_t n, float scale, float zero, const float *bias, int type,
                   void *out)
{
#define INTEGER_VALUE(I) store(out, I, ((float)codes[I] - zero) * scale, type)
#define BIASED_VALUE(I) store(out, I, (float)codes[I] * scale + *bias, type)
#define SMALL_VALUE(I) store(out, I, decoded_small(codes[I], e) * scale, type)
#define SMALL(MANTISSA, EXPONENT, WIDTH)                               \
    {                                                                  \
        struct small e = {MANTISSA, EXPONENT, WIDTH, 0.0f};            \
        for (int64_t i = 0; i < n; i++)                                \
            SMALL_VALUE(i);                                            \
    }
    if (scale != scale)
        store_nan(out, n, type);
    else if (bias)
        for (int64_t i = 0; i < n; i++)
            BIASED_VALUE(i);
    else if (w->integer)
        for (int64_t i = 0; i < n; i++)
            INTEGER_VALUE(i);
    else if (w->mantissa == 1)
        SMALL(1, 0, 4)
    else if (w->mantissa == 3)
        SMALL(3, -6, 8)
    else
        SMALL(2, -14, 8)
}

INLINE void decode_row(const struct weight *w, int64_t output, uint8_t *codes, int type, char *out)
{
    int64_t size = type == FLOAT32 ? 4 : 2, groups = w->groups ? w->groups : 1;
    int64_t first = w->groups ? output * groups : 0, n = groups > 1 ? w->group : w->inputs;
    unpack(w, w->codes + output * words_of_row(w), codes);
    for (int64_t g = 0; g < groups; g++) {
        float middle = w->integer ? (float)(1 << (w->high + w->low - 1)) : 0.0f;
        float zero = w->zeros ? (float)w->zeros[first + g] : middle;
        float bias = w->biases ? load(w->biases, first + g, w->bias_type) : 0.0f;
        values(w, codes + g * n, n, scale_at(w, first + g), zero, w->biases ? &bias : NULL, type, out + g * n * size);
    }
}

struct decoding {
    const struct weight *w;
    void *out;
    int32_t type, failed;
    const struct team *team;
};

/* The values of the outputs from `begin` to `end`. */
EXPORT int32_t qkit_decode_part(const struct decoding *d, int64_t begin, int64_t end)
{
    const struct weight *w = d->w;
    uint8_t *codes = malloc(at_least(w->inputs, w->unit) * w->unit);
    if (!codes)
        return UNKNOWN;
    for (int64_t output = begin; output < end; output++) {
        char *out = (char *)d->out + output * w->inputs * (d->type == FLOAT32 ? 4 : 2);
        if (d->type == FLOAT32)
            decode_row(w, output, codes, FLOAT32, out);
        else if (d->type == BFLOAT16)
            decode_row(w, output, codes, BFLOAT16, out);
        else
            decode_row(w, output, codes, FLOAT16, out);
    }
    free(codes);
    return DONE;
}

static void decode_share(void *job)
{
    struct decoding *d = job;
    int64_t rank = d->team->rank(), size = d->team->size(), n = d->w->outputs;
    if (qkit_decode_part(d, n * rank / size, n * (rank + 1) / size) != DONE)
        d->failed = 1;
}

/* The values [outputs, inputs] of the weight, rounded once to `type`. */
EXPORT int32_t qkit_decode(const struct weight *w, int32_t type, void *out, const struct team *team)
{
    struct decoding d = {w, out, type, 0, team};
    if (team->run && team->threads > 1)
        team->run(decode_share, &d, (unsigned)team->threads, 0);
    else
        d.failed = qkit_decode_part(&d, 0, w->outputs) != DONE;
    return d.failed ? UNKNOWN : DONE;
}
