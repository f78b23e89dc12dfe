// The loops of `arithmetic.fitting` over inputs, in fp64, with the bits of the law. `cuda_fit` launches this, `nvrtc` compiles it.
//
// A thread has a row of the weight, or a cell: a group of one. Arrays lie on their side, [inputs, rows], so that neighbors read
// neighbors.
//
// Constants (macros):
//   GROUP: inputs of a cell, a power of two of 16 to 128.
//   RULE: of scales: 0 integers above zero, 1 integers of either sign, 2 integers with zero points, 3 nvfp4, 4 powers of two.
//   LOWEST, HIGHEST: codes of integers. MANTISSA, LEAST, EIGHTHS: bits of a float's mantissa, its least exponent, and eight times
//   its largest value. MOST: its largest exponent.
//   LEAST_POWER, MOST_POWER: of scales that are powers of two.

#include "doubles.cuh"

constexpr u32 WIDTH = 128;  // inputs that change before others are updated
constexpr u32 STEPS = 20;  // scales of integers to try
constexpr u32 AHEAD = GROUP <= 32 ? GROUP : 8;  // of a loop over a group, steps at once: registers have no room for long ones

// Numbers that depend on the weight or its moments.
struct Facts {
    double limit, least, least_block, tensor, damping, search_damping, pull;
    double tried[STEPS];  // scales of integers, over the largest value
    double e4m3[127];
};

DEVICE double nearest_float(double y, int mantissa, int least, double largest) {
    int floor = (int)(bits(y) >> 52 & 2047) - 1023, e = (floor > least ? floor : least) - mantissa;
    return clipped(rint(y * power(-e)) * power(e), -largest, largest);
}

DEVICE double nearest(double y, double z) {
    if (RULE == 2) return clipped(rint(y), -z, HIGHEST - z);
    if (RULE < 2) return clipped(rint(y), LOWEST, HIGHEST);
    return nearest_float(y, MANTISSA, LEAST, EIGHTHS * 0.125);
}

// See `steps.storable`.
DEVICE double storable(double wanted, double s, const Facts &facts) {
    bool finite = (bits(wanted) >> 52 & 2047) != 2047;
    if (!finite || !(wanted > 0 || RULE == 1)) wanted = s;
    if (RULE == 3) return nearest_float(clipped(wanted / facts.tensor, facts.least_block, 448), 3, -6, 448) * facts.tensor;
    if (RULE == 4) {
        int e = exponent_above(wanted) - !(bits(wanted) >> 51 & 1);
        return power(e < LEAST_POWER ? LEAST_POWER : e > MOST_POWER ? MOST_POWER : e);
    }
    double near = to_bfloat16(clipped(wanted, -facts.limit, facts.limit));
    return fabs(near) < facts.least ? (near < 0 ? -facts.least : facts.least) : near;
}

DEVICE double refit(double numerator, double denominator, double s, const Facts &facts) {
    return storable(denominator > 0 ? numerator / denominator : s, s, facts);
}

// The sum of `term(0)` to `term(GROUP - 1)` by halves, see `products.total`; `four(q, terms)` gives those whose numbers are q, and
// q with a half, a quarter and both of GROUP more.
template <class Four> DEVICE double total_of_fours(Four four) {
    double sums[GROUP / 4], terms[4];
#pragma unroll 1
    for (u32 q = 0; q < GROUP / 4; q++) {
        four(q, terms);
        sums[q] = (terms[0] + terms[1]) + (terms[2] + terms[3]);
    }
#pragma unroll
    for (u32 size = GROUP / 8; size; size /= 2)
#pragma unroll
        for (u32 q = 0; q < size; q++) sums[q] = sums[q] + sums[q + size];
    return sums[0];
}

DEVICE u32 place(u32 q, u32 k) { return q + (k & 1) * (GROUP / 2) + (k >> 1) * (GROUP / 4); }

template <class Term> DEVICE double total(Term term) {
    return total_of_fours([&](u32 q, double *terms) {
        for (u32 k = 0; k < 4; k++) terms[k] = term(place(q, k));
    });
}

// A group's values as two halves each.
struct Halves {
    double top[GROUP], rest[GROUP];
    template <class Value> METHOD void split(Value value) {
        double peak = 0;
#pragma unroll 4
        for (u32 j = 0; j < GROUP; j++) peak = larger(peak, fabs(value(j)));
        int e = exponent_above(peak);
#pragma unroll AHEAD
        for (u32 j = 0; j < GROUP; j++) halve(value(j), e, top[j], rest[j]);
    }
    // Four rows of a matrix, given as halves, times these values.
    template <class Row> METHOD void products(const double *high, const double *low, Row row, double *found) const {
        double a[4] = {}, b[4] = {};
        const double *h[4], *l[4];
        for (u32 k = 0; k < 4; k++) h[k] = high + row(k), l[k] = low + row(k);
#pragma unroll AHEAD
        for (u32 j = 0; j < GROUP; j++)
#pragma unroll
            for (u32 k = 0; k < 4; k++) {
                double of_high = h[k][j], of_low = l[k][j];
                a[k] = fused(of_high, top[j], a[k]);
                b[k] = fused(of_high, rest[j], b[k]);
                b[k] = fused(of_low, top[j], b[k]);
            }
        for (u32 k = 0; k < 4; k++) found[k] = a[k] + b[k];
    }
};

// Scales of least error for cells, see `fitting.search`.
//
// x, units [inputs, rows]; rule, best, zeros, by_rule, squares [groups, rows]: the rule's scales, those of least error, zero points,
// which are read and written, and squares of errors under both. high, low [groups, GROUP, GROUP]: halves of moments. weights [inputs].
// With `some` [rows], only these rows, and squares may not exceed `by_rule`.
ENTRY search(
    const double *x, const double *rule, const double *high, const double *low, const double *weights, const Facts *known,
    const bool *some, double *best, double *zeros, double *units, double *by_rule, double *squares, u32 rows
) {
    __shared__ double kept[GROUP][ROWS];
    const u32 lane = threadIdx.x, row = blockIdx.x * ROWS + lane, group = blockIdx.y;
    if (row >= rows || some && !some[row]) return;
    const Facts &facts = *known;
    const u64 cell = (u64)group * rows + row, stride = rows, first = (u64)group * GROUP * rows + row;
    x += first, units += first, high += group * GROUP * GROUP, low += group * GROUP * GROUP, weights += group * GROUP;
    double *along = units;  // until the end
    Halves parts;
    auto value = [&](u32 i) { return kept[i][lane]; };
    auto row_of = [&](u32 q) { return [=](u32 k) { return place(q, k) * GROUP; }; };
    auto square = [&]() {  // values' own products, by the moments
        parts.split(value);
        return total_of_fours([&](u32 q, double *terms) {
            parts.products(high, low, row_of(q), terms);
            for (u32 k = 0; k < 4; k++) {
                double v = value(place(q, k));
                terms[k] = v * (terms[k] + facts.search_damping * v);
            }
        });
    };
    auto part = [&]() { return total([&](u32 i) { return value(i) * along[i * stride]; }); };
    for (u32 i = 0; i < GROUP; i++) kept[i][lane] = x[i * stride];
    parts.split(value);
    double size = total_of_fours([&](u32 q, double *terms) {
        parts.products(high, low, row_of(q), terms);
        for (u32 k = 0; k < 4; k++) {
            u32 i = place(q, k);
            double all = terms[k] + facts.search_damping * value(i);
            along[i * stride] = all, terms[k] = value(i) * all;
        }
    });
    if (!(size > 0)) size = 1;
    double lowest = 0, highest = 0, peak = 0;
    for (u32 i = 0; i < GROUP; i++) {
        double v = value(i);
        lowest = v < lowest ? v : lowest, highest = larger(highest, v), peak = larger(peak, fabs(v));
    }
    auto differ = [&](double s, double z) {
#pragma unroll 4
        for (u32 i = 0; i < GROUP; i++) kept[i][lane] = nearest(x[i * stride] / s, z) * s - x[i * stride];
    };
    auto error = [&]() {
        double along_x = part();
        return square() + facts.pull * (along_x * along_x / size);
    };
    auto squared = [&]() { return total([&](u32 i) { return weights[i] * value(i) * value(i); }); };

    const double by = rule[cell], from = RULE == 2 ? zeros[cell] : 0;
    double s = by, z = from, least, most;
    differ(s, z);
    least = error(), most = squared();
    auto keep = [&](double tried, double offset) {
        differ(tried, offset);
        double found = error();
        if (found < least && (!some || squared() <= most)) least = found, s = tried, z = offset;
    };
    if (RULE == 3) {
        int code = 0;
        while (code < 126 && facts.e4m3[code] < by / facts.tensor) code++;
#pragma unroll 1
        for (int offset = -6; offset < 8; offset++) {
            int near = code + offset;
            keep(facts.e4m3[near < 1 ? 1 : near > 126 ? 126 : near] * facts.tensor, 0);
        }
    } else if (RULE == 4) {
        int floor = exponent_above(peak) - 1 - MOST;
#pragma unroll 1
        for (int offset = 0; offset < 2; offset++) keep(storable(power(floor + offset), by, facts), 0);
    } else {
#pragma unroll 1
        for (u32 step = 0; step < STEPS * (1 + (RULE == 1)); step++) {
            double f = facts.tried[RULE == 1 ? step / 2 : step];
            if (RULE == 2) {
                double low_end = lowest * f, narrow = storable((highest * f - low_end) / HIGHEST, by, facts);
                keep(narrow, clipped(rint(-low_end / narrow), 0, HIGHEST));
            } else {
                double scale = peak * f;
                keep(storable(RULE == 1 && step % 2 ? -scale : scale, by, facts), 0);
            }
        }
    }
#pragma unroll 1
    for (u32 again = 0; again < 2; again++) {
        for (u32 i = 0; i < GROUP; i++) kept[i][lane] = nearest(x[i * stride] / s, z);
        double along_x = part(), own = square();
        keep(refit((1 + facts.pull) * along_x, own + facts.pull * (along_x * along_x / size), s, facts), z);
    }
    differ(s, z);
    squares[cell] = squared(), best[cell] = s;
    if (!some) by_rule[cell] = most;
    if (RULE == 2) zeros[cell] = z;
    for (u32 i = 0; i < GROUP; i++) units[i * stride] = nearest(x[i * stride] / s, z);
}

// A window of `fitting._feed`: inputs start to start + count in `order`, which get the errors of all before them.
//
// before [count, rows]: what those before the window add, or none. errors, top, rest [inputs, rows], in this order: halves of
// errors are of inputs from `chunk` to the end of the window, peaks [rows] their largest.
ENTRY feed(
    const double *x, const i64 *order, const double *s, const double *zeros, const double *upper, const double *before, double *units,
    double *errors, double *top, double *rest, double *peaks, u32 rows, u32 inputs, u32 start, u32 count, u32 chunk
) {
    __shared__ double kept[WIDTH][ROWS];
    const u32 lane = threadIdx.x, row = blockIdx.x * ROWS + lane;
    if (row >= rows) return;
    const u64 stride = rows;
    x += row, s += row, zeros += row, before += row, units += row, errors += row, top += row, rest += row;
    order += start, upper += (u64)start * inputs + start;
    double peak = 0;
    for (u32 j = 0; j < count; j += 8) {
        double wanted[8];
#pragma unroll
        for (u32 k = 0; k < 8; k++) {
            wanted[k] = x[order[j + k] * stride];
            if (start) wanted[k] = wanted[k] + before[(j + k) * stride];
        }
#pragma unroll 4
        for (u32 i = 0; i < j; i++) {
            double error = kept[i][lane];
#pragma unroll
            for (u32 k = 0; k < 8; k++) wanted[k] = wanted[k] + upper[(u64)i * inputs + j + k] * error;
        }
#pragma unroll
        for (u32 k = 0; k < 8; k++) {
            const u64 at = order[j + k];
            const double step = s[at / GROUP * stride], z = RULE == 2 ? zeros[at / GROUP * stride] : 0;
            const double unit = nearest(wanted[k] / step, z), error = x[at * stride] - unit * step;
            units[at * stride] = unit, errors[(start + j + k) * stride] = error, kept[j + k][lane] = error;
            peak = larger(peak, fabs(error));
#pragma unroll
            for (u32 after = k + 1; after < 8; after++)
                wanted[after] = wanted[after] + upper[(u64)(j + k) * inputs + j + after] * error;
        }
    }
    double old = start == chunk ? 0 : peaks[row];
    peak = peaks[row] = larger(peak, old);
    const int e = exponent_above(peak);
    for (u32 i = exponent_above(old) == e ? start : chunk; i < start + count; i++)
        halve(errors[i * stride], e, top[i * stride], rest[i * stride]);
}

// A part of a window of `fitting._descend`: `count` inputs from `start` on, as are the rows of residual, moved and parts. high, low
// [inputs, inputs]; moved [count, rows]: how far values moved; parts [3 count, rows]: the high halves of that, the low ones, and the
// high ones; `changed` gets a one if any did.
ENTRY descend(
    double *units, double *s, const double *zeros, const double *residual, const double *high, const double *low, const double *diagonal,
    const Facts *known, double *moved, double *parts, u32 *changed, u32 rows, u32 inputs, u32 start, u32 count
) {
    __shared__ double kept[WIDTH][ROWS];
    const u32 lane = threadIdx.x, row = blockIdx.x * ROWS + lane;
    if (row >= rows) return;
    const Facts &facts = *known;
    const u64 stride = rows, corner = (u64)start * inputs + start;
    units += start * stride + row, residual += row, moved += row, parts += row;
    s += start / GROUP * stride + row, zeros += start / GROUP * stride + row, high += corner, low += corner, diagonal += start;
    for (u32 i = 0; i < count; i++) kept[i][lane] = residual[i * stride];
    Halves halves;
#pragma unroll 1
    for (u32 first = 0; first < count; first += GROUP) {
        const u64 here = (u64)first * inputs + first;
        const double *h = high + here, *l = low + here;
        double *unit = units + first * stride, *move = moved + first * stride;
        auto row_of = [&](u32 q) { return [=](u32 k) { return (u64)place(q, k) * inputs; }; };
        halves.split([&](u32 i) { return unit[i * stride]; });
        double curvature = total_of_fours([&](u32 q, double *terms) {
            halves.products(h, l, row_of(q), terms);
            for (u32 k = 0; k < 4; k++) {
                double u = unit[place(q, k) * stride];
                terms[k] = u * (terms[k] + facts.damping * u);
            }
        });
        double slope = total([&](u32 i) { return unit[i * stride] * kept[first + i][lane]; });
        const double old = s[first / GROUP * stride], step = refit(curvature * old + slope, curvature, old, facts);
        for (u32 i = 0; i < GROUP; i++) move[i * stride] = unit[i * stride] * (step - old);
        if (step != old) {
            s[first / GROUP * stride] = step;
            halves.split([&](u32 i) { return move[i * stride]; });
#pragma unroll 1
            for (u32 q = 0; q < GROUP / 4; q++) {
                double found[4];
                halves.products(h, l, row_of(q), found);
                for (u32 k = 0; k < 4; k++) {
                    u32 i = place(q, k);
                    kept[first + i][lane] = kept[first + i][lane] - (found[k] + facts.damping * move[i * stride]);
                }
            }
        }
        const double z = RULE == 2 ? zeros[first / GROUP * stride] : 0;
        bool any = step != old;
#pragma unroll 1
        for (u32 j = 0; j < GROUP; j++) {
            const double before = unit[j * stride], own = (diagonal[first + j] + facts.damping) * step;
            const double now = nearest(before + kept[first + j][lane] / own, z), by = (now - before) * step;
            unit[j * stride] = now;
            if (now == before) continue;
            any = true, move[j * stride] = move[j * stride] + by;
#pragma unroll 4
            for (u32 i = j + 1; i < GROUP; i++)
                kept[first + i][lane] = kept[first + i][lane] - (h[(u64)i * inputs + j] + l[(u64)i * inputs + j]) * by;
        }
        if (!any) continue;
        *changed = 1;
        halves.split([&](u32 i) { return move[i * stride]; });
#pragma unroll 1
        for (u32 i = GROUP; first + i < count; i += 4) {
            double found[4];
            halves.products(h, l, [=](u32 k) { return (u64)(i + k) * inputs; }, found);
            for (u32 k = 0; k < 4; k++) kept[first + i + k][lane] = kept[first + i + k][lane] - found[k];
        }
    }
    double peak = 0;
    for (u32 i = 0; i < count; i++) peak = larger(peak, fabs(moved[i * stride]));
    const int e = exponent_above(peak);
    for (u32 i = 0; i < count; i++) {
        double top, rest;
        halve(moved[i * stride], e, top, rest);
        parts[i * stride] = parts[(2 * count + i) * stride] = top, parts[(count + i) * stride] = rest;
    }
}
