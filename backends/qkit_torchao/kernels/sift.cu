// Which scales `search` has to try, by its errors in fp32 and a bound of how far these are off: far fewer than all. `cuda_fit` launches
// this, `nvrtc` compiles it.
//
// A thread has a cell of GROUP (a macro) integers. It divides values by a power of two near the largest, and the moments come
// divided by one, too. A value, a scale and their difference then are fp32 numbers, so that only sums round.

#include "steps.cuh"

constexpr u32 TRIED = STEPS * (1 + (RULE == 1)), BOTH = 2;  // scales to try, and those at once
constexpr float REACH = (HIGHEST > -LOWEST ? HIGHEST : -LOWEST) + 1;  // of codes that clipping tells apart
constexpr float SHIFT = 12582912;  // 1.5 * 2^23: sums with it are whole
constexpr float ROUNDED = 1.f / (1 << 17);  // at least 128 roundings to 2^-24
constexpr float SHORT = 1.f / (1 << 19);  // at least four to 2^-21, as those of `products.shortened`
constexpr float NOTHING = 1e-36f;  // more than is lost where numbers are too small for fp32
constexpr u64 ALL = ~0ull, THE_RULE = 1ull << 63;

// The compiler reads nothing from memory earlier than here: a row of moments at a time leaves registers for the rest.
DEVICE void in_order() { asm volatile("" ::: "memory"); }

// The integer nearest to value / s, ties to even; at least REACH where it is beyond.
DEVICE float nearest_integer(float value, float s, float inverse) {
    float q = value * inverse;
    q = q < -REACH ? -REACH : q > REACH ? REACH : q;
    q = (q + SHIFT) - SHIFT;
    const float rest = fused(-q, s, value), far = 2 * fabsf(rest), size = fabsf(s);
    if (far > size || far == size && (int)q & 1) q = q + ((rest < 0) == (s < 0) ? 1.f : -1.f);
    return q;
}

DEVICE float difference(float code, float s, float value) {
    code = code < LOWEST ? LOWEST : code > HIGHEST ? HIGHEST : code;
    return fused(code, s, -value);
}

// worth [rows, groups]: a bit for each scale whose error may be the least, the last bit for the rule's.
//
// x [rows, inputs], rule [rows, groups]: values and the rule's scales. blocks [groups, GROUP, GROUP]: moments and damping; below the
// diagonal those of both sides together. roots [groups, GROUP]: no moment exceeds the product of those of its inputs.
ENTRY sift(const double *x, const double *rule, const float *blocks, const float *roots, const Facts *known, u64 *worth, u32 rows, u32 groups) {
    alignas(16) __shared__ float block[GROUP * GROUP];
    __shared__ float root[GROUP], kept[GROUP][ROWS];
    const u32 me = threadIdx.x, row = blockIdx.x * ROWS + me, group = blockIdx.y;
    for (u32 i = me; i < GROUP * GROUP; i += ROWS) block[i] = blocks[(u64)group * GROUP * GROUP + i];
    for (u32 i = me; i < GROUP; i += ROWS) root[i] = roots[group * GROUP + i];
    __syncthreads();
    if (row >= rows) return;
    const Facts &facts = *known;
    const u64 cell = (u64)row * groups + group;
    x += cell * GROUP, worth += cell;

    double peak = 0;
    for (u32 i = 0; i < GROUP; i++) peak = larger(peak, fabs(x[i]));
    if (peak == 0) {
        *worth = THE_RULE;
        return;
    }
    const double unit = power(-exponent_above(peak));
    float value[GROUP], along[GROUP] = {}, all = 0, reach_x = 0, size = 0;
    for (u32 i = 0; i < GROUP; i++) value[i] = x[i] * unit;
#pragma unroll
    for (u32 i = 0; i < GROUP; i++) {
        in_order();
        all = root[i] > all ? root[i] : all, reach_x = fused(root[i], fabsf(value[i]), reach_x);
#pragma unroll
        for (u32 j = 0; j < i; j++) {
            const float half = 0.5f * block[i * GROUP + j];
            along[i] = fused(half, value[j], along[i]), along[j] = fused(half, value[i], along[j]);
        }
        along[i] = fused(block[i * GROUP + i], value[i], along[i]);
    }
    all = all * GROUP;
#pragma unroll
    for (u32 i = 0; i < GROUP; i++) size = fused(value[i], along[i], size), kept[i][me] = along[i];
    const float pull = facts.pull, off_size = reach_x * (ROUNDED * reach_x + SHORT * all) + NOTHING;
    bool sure = size > 2 * off_size;

    // The least and the most that the errors of two scales can be.
    auto bound = [&](const float (&d)[BOTH][GROUP], float (&least)[BOTH], float (&most)[BOTH]) {
        float own[BOTH] = {}, part[BOTH] = {}, reach[BOTH] = {}, largest[BOTH] = {};
#pragma unroll
        for (u32 i = 0; i < GROUP; i++) {
            float sum[BOTH];
            in_order();
#pragma unroll
            for (u32 c = 0; c < BOTH; c++) sum[c] = block[i * GROUP + i] * d[c][i];
#pragma unroll
            for (u32 j = 0; j < i; j++)
#pragma unroll
                for (u32 c = 0; c < BOTH; c++) sum[c] = fused(block[i * GROUP + j], d[c][j], sum[c]);
            const float ahead = kept[i][me];
#pragma unroll
            for (u32 c = 0; c < BOTH; c++) {
                const float far = fabsf(d[c][i]);
                own[c] = fused(d[c][i], sum[c], own[c]), part[c] = fused(d[c][i], ahead, part[c]);
                reach[c] = fused(root[i], far, reach[c]), largest[c] = far > largest[c] ? far : largest[c];
            }
        }
#pragma unroll
        for (u32 c = 0; c < BOTH; c++) {
            const float short_of = SHORT * all * largest[c];
            const float off_part = reach[c] * (ROUNDED * reach_x + SHORT * all) + short_of * reach_x;
            const float near = fabsf(part[c]) - off_part, far = fabsf(part[c]) + off_part;
            const float low = near > 0 ? pull * (near * near / (size + off_size)) : 0, high = pull * (far * far / (size - off_size));
            const float off = reach[c] * (ROUNDED * reach[c] + short_of) + ROUNDED * (fabsf(own[c]) + high) + NOTHING;
            least[c] = own[c] + low - off, most[c] = own[c] + high + off;
        }
    };
    auto scale = [&](double s) {  // as a number of fp32
        const float found = s * unit;
        sure = sure && fabsf(found) > 1e-30f && fabsf(found) < 1e30f && found == (float)to_bfloat16(found);
        return found;
    };

    float d[BOTH][GROUP], least[BOTH], most[BOTH], lows[TRIED + TRIED % 2];
    const float by = scale(rule[cell]), by_inverse = 1 / by;
#pragma unroll
    for (u32 i = 0; i < GROUP; i++) d[0][i] = d[1][i] = difference(nearest_integer(value[i], by, by_inverse), by, value[i]);
    bound(d, least, most);
    const float of_rule = least[0];
    float bar = most[0];
#pragma unroll 1
    for (u32 step = 0; step < TRIED; step += 2) {
        const double first = peak * facts.tried[RULE == 1 ? step / 2 : step];
        const float s = scale(storable(first, by, facts)), inverse = 1 / s;
        float other = -s, other_inverse = -inverse;
        if (RULE != 1) other = scale(storable(peak * facts.tried[step + 1], by, facts)), other_inverse = 1 / other;
#pragma unroll
        for (u32 i = 0; i < GROUP; i++) {
            const float code = nearest_integer(value[i], s, inverse);
            d[0][i] = difference(code, s, value[i]);
            d[1][i] = difference(RULE == 1 ? -code : nearest_integer(value[i], other, other_inverse), other, value[i]);
        }
        bound(d, least, most);
        for (u32 c = 0; c < BOTH; c++) lows[step + c] = least[c], bar = most[c] < bar ? most[c] : bar;
    }
    u64 found = of_rule > bar ? 0 : THE_RULE;
    for (u32 step = 0; step < TRIED; step++) found |= (u64)!(lows[step] > bar) << step;
    *worth = sure ? found : ALL;
}
