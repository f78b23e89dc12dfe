// The loop of `fitting._feed` over inputs, in fp64, with the bits of the law. `cuda_fit` launches this, `nvrtc` compiles it.
//
// A thread has a row of the weight, and a program ROWS of them. GROUP (a macro): inputs of a cell. The other constants are those of
// `steps.cuh`.

#include "steps.cuh"

constexpr u32 WIDTH = 128;  // inputs that change before others are updated
constexpr u32 NEAR = 16;  // inputs that a thread has in its registers
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
    __shared__ double kept[WIDTH][ROWS + 1];
    __shared__ int exponents[ROWS], from[ROWS];
    const u32 me = threadIdx.x, base = blockIdx.x * ROWS, row = base + me < rows ? base + me : rows - 1;
    const bool there = base + me < rows;
    const u64 first = (u64)row * inputs;
    order += start, upper += (u64)start * inputs + start;
    int most = 0;
#pragma unroll 1
    for (u32 begin = 0; begin < count; begin += NEAR) {
        double value[NEAR], wanted[NEAR], step[NEAR], inverse[NEAR], zero[NEAR];
#pragma unroll
        for (u32 k = 0; k < NEAR; k++) {
            const u64 at = first + order[begin + k];
            value[k] = wanted[k] = x[at], step[k] = s[at / GROUP], zero[k] = RULE == 2 ? zeros[at / GROUP] : 0;
        }
        if (start)
#pragma unroll
            for (u32 k = 0; k < NEAR; k++) {
                double found = before ? 0. + before[(u64)row * width + start - window + begin + k] : 0;
                if (more) found = found + more[(u64)row * count + begin + k];
                wanted[k] = wanted[k] + found;
            }
#pragma unroll
        for (u32 k = 0; k < NEAR; k++) inverse[k] = 1 / step[k];
#pragma unroll 2
        for (u32 j = 0; j < begin; j++) {
            double factor[NEAR];
            read<NEAR>(upper + (u64)j * inputs + begin, factor);
            const double by = kept[j][me];
#pragma unroll
            for (u32 k = 0; k < NEAR; k++) wanted[k] = wanted[k] + factor[k] * by;
        }
#pragma unroll
        for (u32 j = 0; j < NEAR; j++) {
            double factor[NEAR];
            read<NEAR>(upper + (u64)(begin + j) * inputs + begin, factor);
            const double now = nearest_quotient(wanted[j], step[j], inverse[j], zero[j]), off = value[j] - now * step[j];
            if (there) units[first + order[begin + j]] = now;
            kept[begin + j][me] = off, most = most > power_of(off) ? most : power_of(off);
#pragma unroll
            for (u32 k = j + 1; k < NEAR; k++) wanted[k] = wanted[k] + factor[k] * off;
        }
    }
    const int old = start == window ? 0 : peaks[row];
    most = most > old ? most : old;
    if (there) peaks[row] = most;
    exponents[me] = exponent_of_power(most), from[me] = old == most ? start : window;
    __syncthreads();
    for (u32 r = 0; r < ROWS && base + r < rows; r++) {
        double *const mine = errors + (u64)(base + r) * inputs, *const out = parts + (u64)(base + r) * inputs;
        for (u32 i = me; i < count; i += ROWS) mine[start + i] = kept[i][r], out[start + i] = shortened(kept[i][r], exponents[r]);
        for (u32 i = from[r] + me; i < start; i += ROWS) out[i] = shortened(mine[i], exponents[r]);
    }
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
