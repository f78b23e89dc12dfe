// The loops of `arithmetic.fitting` over inputs, in fp64, with the bits of the law. `cuda_fit` launches this, `nvrtc` compiles it.
//
// LANES threads have a row of the weight, or a cell: a group of one. Thread number i of these has its inputs i, i + LANES and so on.
//
// Constants (macros):
//   GROUP: inputs of a cell, a power of two of 16 to 128. LANES: at most that, and at most a warp.
//   MOST: a float's largest exponent. And those of `steps.cuh`.

#include "steps.cuh"

constexpr u32 WIDTH = 128;  // inputs that change before others are updated
constexpr u32 MINE = GROUP / LANES;  // inputs of a cell that a thread has
constexpr u32 AHEAD = GROUP <= 32 ? GROUP / 4 : 4;  // of the steps of a product, those at once
constexpr u32 TEAMS = THREADS / LANES;  // rows or cells of a program

// The sum of the numbers of a cell by halves, see `products.total`.
DEVICE double total(const double *terms) {
    double sums[MINE];
    for (u32 k = 0; k < MINE; k++) sums[k] = terms[k];
#pragma unroll
    for (u32 size = MINE / 2; size; size /= 2)
#pragma unroll
        for (u32 k = 0; k < size; k++) sums[k] = sums[k] + sums[k + size];
    double sum = sums[0];
#pragma unroll
    for (u32 size = LANES / 2; size; size /= 2) sum = sum + of_neighbor(sum, size);
    return sum;
}

// Writes the numbers of a team, shortened, where all of it reads them.
template <u32 COUNT> DEVICE void share(const double *values, double *shared, u32 lane) {
    int most = 0;
    for (u32 k = 0; k < COUNT; k++) most = most > power_of(values[k]) ? most : power_of(values[k]);
    const int e = exponent_of_power(highest(most));
    together();
    for (u32 k = 0; k < COUNT; k++) shared[lane + LANES * k] = shortened(values[k], e);
    together();
}

// The sum of row(j) * shared[j] over a cell: exact in any order.
template <class Row> DEVICE double product(Row row, const double *shared) {
    double sums[4] = {};
#pragma unroll AHEAD
    for (u32 j = 0; j < GROUP; j += 4)
#pragma unroll
        for (u32 k = 0; k < 4; k++) sums[k] = fused(row(j + k), shared[j + k], sums[k]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Scales of least error for cells, see `fitting.search`.
//
// x, units [rows, inputs]; rule, best, zeros, by_rule, squares [rows, groups]: the rule's scales, those of least error, zero points,
// which are read and written, and squares of errors under both. blocks [groups, GROUP, GROUP]: moments, columns first. weights
// [inputs]. With `some` [rows], only these rows, and squares may not exceed `by_rule`. With `worth` [rows, groups], only the scales
// that have a bit there are tried; see `sift`.
ENTRY search(
    const double *x, const double *rule, const double *blocks, const double *weights, const Facts *known, const bool *some,
    const u64 *worth, double *best, double *zeros, double *units, double *by_rule, double *squares, u32 rows, u32 groups
) {
    __shared__ double kept[TEAMS][GROUP];
    const u32 lane = threadIdx.x % LANES, team = threadIdx.x / LANES, row = blockIdx.x * TEAMS + team, group = blockIdx.y;
    if (row >= rows || some && !some[row]) return;
    const Facts &facts = *known;
    const u64 cell = (u64)row * groups + group;
    x += cell * GROUP, units += cell * GROUP, blocks += (u64)group * GROUP * GROUP, weights += group * GROUP;
    double *const shared = kept[team];
    double value[MINE], weight[MINE], d[MINE], along[MINE], terms[MINE], near[MINE == 1 ? GROUP : 1];
    for (u32 k = 0; k < MINE; k++) value[k] = x[lane + LANES * k], weight[k] = weights[lane + LANES * k];
    if (MINE == 1)
#pragma unroll
        for (u32 j = 0; j < GROUP; j++) near[MINE == 1 ? j : 0] = blocks[j * GROUP + lane];
    auto times = [&](const double *v, double *found) {
        share<MINE>(v, shared, lane);
        for (u32 k = 0; k < MINE; k++) {
            if (MINE == 1) found[k] = product([&](u32 j) { return near[MINE == 1 ? j : 0]; }, shared);
            else found[k] = product([&](u32 j) { return blocks[j * GROUP + lane + LANES * k]; }, shared);
            found[k] = found[k] + facts.search_damping * v[k];
        }
    };
    auto dot = [&](const double *a, const double *b) {
        for (u32 k = 0; k < MINE; k++) terms[k] = a[k] * b[k];
        return total(terms);
    };
    auto square = [&](const double *v) {  // values' own products, by the moments
        double found[MINE];
        times(v, found);
        return dot(v, found);
    };
    times(value, along);
    double size = dot(value, along);
    if (!(size > 0)) size = 1;
    auto differ = [&](double s, double z) {
        for (u32 k = 0; k < MINE; k++) d[k] = nearest(value[k] / s, z) * s - value[k];
    };
    auto error = [&](double most) {  // at least its first part, where that is not less than `most`
        const double own = square(d);
        if (!(own < most)) return own;
        const double along_x = dot(d, along);
        return own + facts.pull * (along_x * along_x / size);
    };
    auto squared = [&]() {
        for (u32 k = 0; k < MINE; k++) terms[k] = weight[k] * d[k] * d[k];
        return total(terms);
    };

    const double by = rule[cell], from = RULE == 2 ? zeros[cell] : 0;
    const u64 worthy = worth ? worth[cell] : ~0ull;
    const double none = number(2047ull << 52);
    double s = by, z = from, most;
    differ(s, z);
    double least = worthy >> 63 ? error(none) : none;
    most = squared();
    auto keep = [&](double tried, double offset) {
        differ(tried, offset);
        double found = error(least);
        const bool better = found < least && (!some || squared() <= most);
        if (better) least = found, s = tried, z = offset;
        return better;
    };
    double lowest = 0, highest_value = 0, peak = 0;
    if (RULE != 3) {
        for (u32 k = 0; k < MINE; k++) {
            lowest = value[k] < lowest ? value[k] : lowest, highest_value = larger(highest_value, value[k]);
            peak = larger(peak, fabs(value[k]));
        }
#pragma unroll
        for (u32 size = LANES / 2; size; size /= 2) {
            double other = of_neighbor(lowest, size);
            lowest = other < lowest ? other : lowest;
            highest_value = larger(highest_value, of_neighbor(highest_value, size)), peak = larger(peak, of_neighbor(peak, size));
        }
    }
    if (RULE == 3) {
        int code = 0;
        while (code < 126 && facts.e4m3[code] < by / facts.tensor) code++;
#pragma unroll 1
        for (int offset = -6; offset < 8; offset++) {
            int near_code = code + offset;
            keep(facts.e4m3[near_code < 1 ? 1 : near_code > 126 ? 126 : near_code] * facts.tensor, 0);
        }
    } else if (RULE == 4) {
        int floor = exponent_above(peak) - 1 - MOST;
#pragma unroll 1
        for (int offset = 0; offset < 2; offset++) keep(storable(power(floor + offset), by, facts), 0);
    } else {
#pragma unroll 1
        for (u32 step = 0; step < STEPS * (1 + (RULE == 1)); step++) {
            if (!(worthy >> step & 1)) continue;
            double f = facts.tried[RULE == 1 ? step / 2 : step];
            if (RULE == 2) {
                double low_end = lowest * f, narrow = storable((highest_value * f - low_end) / HIGHEST, by, facts);
                keep(narrow, clipped(rint(-low_end / narrow), 0, HIGHEST));
            } else {
                double scale = peak * f;
                keep(storable(RULE == 1 && step % 2 ? -scale : scale, by, facts), 0);
            }
        }
    }
#pragma unroll 1
    for (u32 again = 0; again < 2; again++) {
        for (u32 k = 0; k < MINE; k++) d[k] = nearest(value[k] / s, z);
        double along_x = dot(d, along), own = square(d);
        const double tried = refit((1 + facts.pull) * along_x, own + facts.pull * (along_x * along_x / size), s, facts);
        if (tried == s || !keep(tried, z)) break;  // another refit would try this scale again
    }
    differ(s, z);
    const double found = squared();
    for (u32 k = 0; k < MINE; k++) units[lane + LANES * k] = nearest(value[k] / s, z);
    if (lane) return;
    squares[cell] = found, best[cell] = s;
    if (!some) by_rule[cell] = most;
    if (RULE == 2) zeros[cell] = z;
}

// A part of a window of `fitting._descend`: `count` inputs from `start` on. units [rows, inputs], s, zeros [rows, groups];
// residual, moved [rows, `window` numbers each]: how far values moved; parts [rows, WIDTH]: that by size, shortened.
// correlations [inputs, inputs], sizes, diagonal [inputs]: of the moments; `changed` gets a one if any value moved.
ENTRY descend(
    double *units, double *s, const double *zeros, const double *residual, const double *correlations, const double *sizes,
    const double *diagonal, const Facts *known, double *moved, double *parts, u32 *changed, u32 rows, u32 inputs, u32 window, u32 start,
    u32 count
) {
    __shared__ double kept[TEAMS][GROUP], lefts[TEAMS][WIDTH], moves[TEAMS][WIDTH];
    const u32 lane = threadIdx.x % LANES, team = threadIdx.x / LANES, row = blockIdx.x * TEAMS + team;
    if (row >= rows) return;
    const Facts &facts = *known;
    const u64 first = (u64)row * inputs + start;
    units += first, s += first / GROUP, zeros += first / GROUP, residual += (u64)row * window, moved += (u64)row * window;
    parts += (u64)row * WIDTH, correlations += (u64)start * inputs + start, sizes += start, diagonal += start;
    double *const shared = kept[team], *const left = lefts[team], *const went = moves[team];
    for (u32 i = lane; i < count; i += LANES) left[i] = residual[i];
    bool ever = false;
#pragma unroll 1
    for (u32 base = 0; base < count; base += GROUP) {
        const double *near = correlations + (u64)base * inputs + base;
        double unit[MINE], size[MINE], r[MINE], move[MINE], found[MINE], scaled[MINE], inverse[MINE];
        for (u32 k = 0; k < MINE; k++) {
            const u32 i = base + lane + LANES * k;
            unit[k] = units[i], size[k] = sizes[i], r[k] = left[i];
        }
        auto times = [&](const double *v) {
            for (u32 k = 0; k < MINE; k++) scaled[k] = size[k] * v[k];
            share<MINE>(scaled, shared, lane);
            for (u32 k = 0; k < MINE; k++)
                found[k] = size[k] * product([&](u32 j) { return near[(u64)j * inputs + lane + LANES * k]; }, shared);
        };
        double terms[MINE];
        times(unit);
        for (u32 k = 0; k < MINE; k++) terms[k] = unit[k] * (found[k] + facts.damping * unit[k]);
        const double curvature = total(terms);
        for (u32 k = 0; k < MINE; k++) terms[k] = unit[k] * r[k];
        const double slope = total(terms), old = s[base / GROUP], z = RULE == 2 ? zeros[base / GROUP] : 0;
        const double step = refit(curvature * old + slope, curvature, old, facts);
        bool any = step != old;
        for (u32 k = 0; k < MINE; k++) move[k] = unit[k] * (step - old);
        if (any) {
            times(move);
            for (u32 k = 0; k < MINE; k++) r[k] = r[k] - (found[k] + facts.damping * move[k]);
            if (!lane) s[base / GROUP] = step;
        }
        for (u32 k = 0; k < MINE; k++) inverse[k] = 1 / ((diagonal[base + lane + LANES * k] + facts.damping) * step);
#pragma unroll
        for (u32 k = 0; k < MINE; k++)
#pragma unroll 2
            for (u32 from = 0; from < LANES; from++) {
                const u32 j = k * LANES + from;
                double factor[MINE];
#pragma unroll
                for (u32 after = k; after < MINE; after++)
                    factor[after] = near[(u64)j * inputs + lane + LANES * after] * size[after] * sizes[base + j];
                const double now = nearest(unit[k] + r[k] * inverse[k], z), by = of_lane((now - unit[k]) * step, from);
                if (lane == from) unit[k] = now;
                if (by == 0) continue;
                any = true;
                if (lane == from) move[k] = move[k] + by;
#pragma unroll
                for (u32 after = k; after < MINE; after++) r[after] = r[after] - factor[after] * by;
            }
        for (u32 k = 0; k < MINE; k++) units[base + lane + LANES * k] = unit[k], went[base + lane + LANES * k] = move[k];
        if (!any) continue;
        ever = true;
        for (u32 k = 0; k < MINE; k++) scaled[k] = size[k] * move[k];
        if (base + GROUP == count) break;
        share<MINE>(scaled, shared, lane);
#pragma unroll 1
        for (u32 i = base + GROUP + lane; i < count; i += LANES) {
            const double *beyond = correlations + (u64)base * inputs + i;
            left[i] = left[i] - sizes[i] * product([&](u32 j) { return beyond[(u64)j * inputs]; }, shared);
        }
    }
    if (ever && !lane) *changed = 1;
    int most = 0;
    for (u32 i = lane; i < count; i += LANES) {
        moved[i] = went[i];
        const int mine = power_of(sizes[i] * went[i]);
        most = most > mine ? most : mine;
    }
    const int e = exponent_of_power(highest(most));
    for (u32 i = lane; i < count; i += LANES) parts[i] = shortened(sizes[i] * went[i], e);
}

// The digits of shortened numbers sizes * x [rows, count], of which rows lie `stride` apart: three of eight bits [3, rows, count],
// the lowest first, and the unit of each row, of which they count.
ENTRY digits(const double *x, const double *sizes, signed char *found, double *units, u32 rows, u32 stride, u32 count) {
    const u32 lane = threadIdx.x % LANES, row = blockIdx.x * TEAMS + threadIdx.x / LANES;
    if (row >= rows) return;
    x += (u64)row * stride, found += (u64)row * count;
    int most = 0;
    for (u32 i = lane; i < count; i += LANES) {
        const int mine = power_of(sizes[i] * x[i]);
        most = most > mine ? most : mine;
    }
    const int e = exponent_of_power(highest(most));
    for (u32 i = lane; i < count; i += LANES) {
        int rest = (int)rint(sizes[i] * x[i] * power(20 - e));
        for (u32 k = 0; k < 3; k++) {
            const int digit = (rest + 128 & 255) - 128;
            found[(u64)k * rows * count + i] = digit, rest = (rest - digit) >> 8;
        }
    }
    if (!lane) units[row] = power(e - 20);
}

// Sums over the inputs of rows, by halves, see `products.total`: whole [rows] of d * residual, plain [rows] of d * (residual - damping
// * d). d, residual [rows, inputs]; with `add`, damping * d is added to the residual before.
ENTRY weigh(const double *d, double *residual, const double *damping, double *whole, double *plain, u32 rows, u32 inputs, u32 add) {
    const u32 lane = threadIdx.x % LANES, row = blockIdx.x * TEAMS + threadIdx.x / LANES;
    if (row >= rows) return;
    d += (u64)row * inputs, residual += (u64)row * inputs;
    u32 count = 1;  // of a thread's inputs, to a power of two
    while (LANES * count < inputs) count *= 2;
    double sums[32], others[32];  // of halves, quarters and so on that wait for their neighbors
    u32 level = 0;
#pragma unroll 4
    for (u32 n = 0, k = 0; n < count; n++) {  // k counts with its highest bit first: neighbors in the tree follow each other
        const u32 i = lane + LANES * k;
        double a = 0, b = 0;
        if (i < inputs) {
            const double own = *damping * d[i], now = add ? residual[i] + own : residual[i];
            if (add) residual[i] = now;
            a = d[i] * now, b = d[i] * (now - own);
        }
        level = 0;
        for (u32 m = n; m & 1; m /= 2, level++) a = sums[level] + a, b = others[level] + b;
        sums[level] = a, others[level] = b;
        u32 bit = count / 2;
        for (; k & bit; bit /= 2) k ^= bit;
        k |= bit;
    }
    double sum = sums[level], other = others[level];
#pragma unroll
    for (u32 size = LANES / 2; size; size /= 2) sum = sum + of_neighbor(sum, size), other = other + of_neighbor(other, size);
    if (!lane) whole[row] = sum, plain[row] = other;
}

// out = x - units * s, of values and units [rows, inputs], and scales [rows, groups].
ENTRY differ(const double *x, const double *units, const double *s, double *out, u32 inputs) {
    const u64 first = (u64)blockIdx.y * inputs;
    for (u32 i = blockIdx.x * 4 * THREADS + threadIdx.x, k = 0; k < 4 && i < inputs; k++, i += THREADS)
        out[first + i] = x[first + i] - units[first + i] * s[(first + i) / GROUP];
}

// from [rows, columns], of which rows lie `stride` apart, -= sizes * a.
ENTRY subtract(double *from, const double *a, const double *sizes, u32 stride, u32 columns) {
    const u64 row = blockIdx.y;
    from += row * stride, a += row * columns;
    for (u32 i = blockIdx.x * 4 * THREADS + threadIdx.x, k = 0; k < 4 && i < columns; k++, i += THREADS) from[i] = from[i] - sizes[i] * a[i];
}
