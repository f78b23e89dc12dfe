// The loop of `fitting._feed` over inputs, in fp64, with the bits of the law. `cuda_fit` launches this, `nvrtc` compiles it.
//
// LANES threads have a row of the weight. Thread number i of these has inputs i, i + LANES and so on of WIDTH in a row. GROUP: inputs of a
// cell. The other constants are those of `steps.cuh`.

#include "steps.cuh"

constexpr u32 WIDTH = 128;  // inputs that change before others are updated
constexpr u32 SPAN = WIDTH / LANES;  // of these, those that a thread has
constexpr u32 TEAMS = THREADS / LANES;  // rows of a program
constexpr u32 DEEP = 256;  // rows of a matrix that a thread of `find_powers` reads

// nearest(y / s, z), by the inverse of s where that tells on which side of a tie the quotient lies.
DEVICE double nearest_quotient(double y, double s, double inverse, double z) {
    if (RULE > 2) return nearest(y / s, z);
    const double q = y * inverse, whole = rint(q);
    const bool sure = fabs(q) < 1e6 && fabs(fabs(q - whole) - 0.5) > 1e-9;  // it is off by less than 4e-10
    return nearest(sure ? whole : y / s, z);
}

// Inputs start to start + count in `order`, which get the errors of all before them.
//
// before [rows, `width` numbers each], more [rows, count]: what those before the window add, and those of it, or none. errors, parts
// [rows, inputs], in this order: of shortened errors are inputs from `window` on, peaks [rows] the power of their largest.
ENTRY feed(
    const double *x, const i64 *order, const double *s, const double *zeros, const double *upper, const double *before, const double *more,
    double *units, double *errors, double *parts, int *peaks, u32 rows, u32 inputs, u32 start, u32 count, u32 window, u32 width
) {
    const u32 lane = threadIdx.x % LANES, row = blockIdx.x * TEAMS + threadIdx.x / LANES;
    if (row >= rows) return;
    const u64 first = (u64)row * inputs, of_groups = first / GROUP;
    x += first, units += first, errors += first, parts += first, s += of_groups, zeros += of_groups;
    order += start, upper += (u64)start * inputs + start;
    double wanted[SPAN], value[SPAN], step[SPAN], inverse[SPAN], zero[SPAN], unit[SPAN] = {};
#pragma unroll
    for (u32 k = 0; k < SPAN; k++) {
        const u32 j = lane + LANES * k;
        const u64 at = j < count ? order[j] : order[0];
        value[k] = wanted[k] = x[at], step[k] = s[at / GROUP], zero[k] = RULE == 2 ? zeros[at / GROUP] : 0;
        inverse[k] = 1 / step[k];
        if (!start || j >= count) continue;
        double found = before ? 0. + before[(u64)row * width + start - window + j] : 0;
        if (more) found = found + more[(u64)row * count + j];
        wanted[k] = wanted[k] + found;
    }
#pragma unroll
    for (u32 k = 0; k < SPAN; k++)
#pragma unroll 2
        for (u32 from = 0; from < LANES; from++) {
            const u32 j = k * LANES + from;
            if (j >= count) break;
            double factor[SPAN];
#pragma unroll
            for (u32 after = k; after < SPAN; after++) {
                const u32 i = lane + LANES * after;
                factor[after] = i < count ? upper[(u64)j * inputs + i] : 0;
            }
            const double now = nearest_quotient(wanted[k], step[k], inverse[k], zero[k]), off = value[k] - now * step[k];
            if (lane == from) unit[k] = now;
            const double by = of_lane(off, from);
#pragma unroll
            for (u32 after = k; after < SPAN; after++) wanted[after] = wanted[after] + factor[after] * by;
        }
    int most = 0;
#pragma unroll
    for (u32 k = 0; k < SPAN; k++) {
        const u32 j = lane + LANES * k;
        if (j >= count) continue;
        const double error = value[k] - unit[k] * step[k];
        units[order[j]] = unit[k], errors[start + j] = error;
        most = most > power_of(error) ? most : power_of(error);
    }
    const int old = start == window ? 0 : peaks[row];
    most = highest(most > old ? most : old);
    if (!lane) peaks[row] = most;
    const int e = exponent_of_power(most);
    for (u32 i = (old == most ? start : window) + lane; i < start + count; i += LANES) parts[i] = shortened(errors[i], e);
}

// The powers [count] of the largest entries of columns begin to begin + count of upper [inputs, inputs], above their own WIDTH rows.
// A program has THREADS columns and DEEP rows.
ENTRY find_powers(const double *upper, int *powers, u32 inputs, u32 begin, u32 count) {
    const u32 at = blockIdx.x * THREADS + threadIdx.x, j = begin + at, first = blockIdx.y * DEEP;
    if (at >= count) return;
    const u32 end = j / WIDTH * WIDTH < first + DEEP ? j / WIDTH * WIDTH : first + DEEP;
    int most = 0;
    for (u32 i = first; i < end; i++) {
        const int mine = power_of(upper[(u64)i * inputs + j]);
        most = most > mine ? most : mine;
    }
    raise(powers + at, most);
}

// found [begin + count, count]: these entries, shortened by column. A program has THREADS columns of a row.
ENTRY shorten_above(const double *upper, const int *powers, double *found, u32 inputs, u32 begin, u32 count) {
    const u32 at = blockIdx.x * THREADS + threadIdx.x, i = blockIdx.y;
    if (at >= count || i >= (begin + at) / WIDTH * WIDTH) return;
    found[(u64)i * count + at] = shortened(upper[(u64)i * inputs + begin + at], exponent_of_power(powers[at]));
}
