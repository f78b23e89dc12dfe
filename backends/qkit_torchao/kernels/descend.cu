// The loop of `fitting._descend_window` over groups and inputs, in fp64, with the bits of the law. `cuda_fit` launches this, `nvrtc`
// compiles it.
//
// A thread has a row of the weight, and a program HERE of them. All threads of a program read the same moments. GROUP (a macro): inputs
// of a cell, a power of two of 16 to 128. The other constants are those of `steps.cuh`.

#include "steps.cuh"

constexpr u32 WIDTH = 128;  // inputs that change before others are updated
constexpr u32 NEAR = 16;  // inputs that a thread has in its registers
constexpr u32 BLOCKS = GROUP / NEAR;
constexpr u32 HERE = GROUP > 32 ? 16 : 32;  // rows: their numbers take at most 40 KB of shared memory

// Sums over NEAR inputs of each block, and over blocks from FIRST on, STEP apart: by halves, as `products.total` has them.
template <u32 FIRST, u32 STEP, class Block> DEVICE void sum_blocks(Block block, double *terms, double *others) {
    if constexpr (STEP >= BLOCKS) block(FIRST, terms, others);
    else {
        double more[NEAR], others_more[NEAR];
        sum_blocks<FIRST, 2 * STEP>(block, terms, others), sum_blocks<FIRST + STEP, 2 * STEP>(block, more, others_more);
#pragma unroll
        for (u32 k = 0; k < NEAR; k++) terms[k] = terms[k] + more[k], others[k] = others[k] + others_more[k];
    }
}

DEVICE double total(double *terms) {
#pragma unroll
    for (u32 size = NEAR / 2; size; size /= 2)
#pragma unroll
        for (u32 k = 0; k < size; k++) terms[k] = terms[k] + terms[k + size];
    return terms[0];
}

// Writes the numbers of a row in a group, shortened by size, over their sizes; returns the power of the largest by size.
template <class Number> DEVICE int share(Number number, const double *sizes, double (*shared)[HERE]) {
    const u32 me = threadIdx.x;
    int most = 0;
#pragma unroll 8
    for (u32 j = 0; j < GROUP; j++) {
        const int power = power_of(sizes[j] * number(j));
        most = most > power ? most : power;
    }
    const int e = exponent_of_power(most);
#pragma unroll 8
    for (u32 j = 0; j < GROUP; j++) shared[j][me] = shortened(sizes[j] * number(j), e) * inverse_power(sizes[j]);
    return most;
}

// near [inputs, WIDTH]: correlations and sizes of each input and those of its part of a window.
ENTRY find_near(const double *correlations, const double *sizes, double *near, u32 inputs) {
    const u32 j = blockIdx.x, i = j / WIDTH * WIDTH + threadIdx.x;
    near[(u64)j * WIDTH + threadIdx.x] = i < inputs ? correlations[(u64)j * inputs + i] * sizes[i] * sizes[j] : 0;
}

// A part of a window: `count` inputs from `start` on. units [rows, inputs], s, zeros [rows, groups]; residual, moved [rows, `window`
// numbers each]: how far values moved; parts [rows, WIDTH]: that by size, shortened. near: of `find_near`. sizes, diagonal [inputs]: of
// the moments; `changed` gets a one if any value moved.
ENTRY descend(
    double *units, double *s, const double *zeros, const double *residual, const double *near, const double *sizes, const double *diagonal,
    const Facts *known, double *moved, double *parts, u32 *changed, u32 rows, u32 inputs, u32 window, u32 start, u32 count
) {
    __shared__ double went[WIDTH - GROUP + (GROUP == WIDTH)][HERE], kept[GROUP][HERE], left[GROUP][HERE];
    __shared__ int exponents[HERE];
    const u32 me = threadIdx.x, first_row = blockIdx.x * HERE, row = first_row + me < rows ? first_row + me : rows - 1;
    const bool there = first_row + me < rows;
    const Facts &facts = *known;
    const u64 first = (u64)row * inputs + start;
    units += first, s += first / GROUP, zeros += first / GROUP, residual += (u64)row * window;
    double *const mine = moved + (u64)row * window;
    near += (u64)start * WIDTH, sizes += start, diagonal += start;
    bool ever = false;
    int peak = 0;
#pragma unroll 1
    for (u32 base = 0; base < count; base += GROUP) {
        const double *const here = near + (u64)base * WIDTH + base;  // of the group: rows lie WIDTH apart
        // The product of the moments of NEAR inputs, from `block` on, and `numbers` of a group that begins at `of`.
        auto times = [&](const double (*numbers)[HERE], u32 of, u32 block, double *found) {
#pragma unroll
            for (u32 k = 0; k < NEAR; k++) found[k] = 0;
#pragma unroll 2
            for (u32 j = 0; j < GROUP; j++) {
                double h[NEAR];
                read<NEAR>(near + (u64)(of + j) * WIDTH + base + block, h);
                const double by = numbers[j][me];
#pragma unroll
                for (u32 k = 0; k < NEAR; k++) found[k] = fused(h[k], by, found[k]);
            }
        };
#pragma unroll 1
        for (u32 block = 0; block < GROUP; block += NEAR) {
            double r[NEAR], found[NEAR];
#pragma unroll
            for (u32 k = 0; k < NEAR; k++) r[k] = residual[base + block + k];
#pragma unroll 1
            for (u32 of = 0; of < base; of += GROUP) {
                times(went + of, of, block, found);
#pragma unroll
                for (u32 k = 0; k < NEAR; k++) r[k] = r[k] - found[k];
            }
#pragma unroll
            for (u32 k = 0; k < NEAR; k++) left[block + k][me] = r[k];
        }

        const double *const unit = units + base;
        share([&](u32 j) { return unit[j]; }, sizes + base, kept);
        double terms[NEAR], others[NEAR];
        sum_blocks<0, 1>(
            [&](u32 block, double *curve, double *along) {
                times(kept, base, block * NEAR, curve);
#pragma unroll
                for (u32 k = 0; k < NEAR; k++) {
                    const double v = unit[block * NEAR + k];
                    curve[k] = v * (curve[k] + facts.damping * v), along[k] = v * left[block * NEAR + k][me];
                }
            },
            terms, others
        );
        const double curvature = total(terms), slope = total(others), old = s[base / GROUP];
        const double z = RULE == 2 ? zeros[base / GROUP] : 0, step = refit(curvature * old + slope, curvature, old, facts);
        bool any = step != old;
        if (any) {
            share([&](u32 j) { return unit[j] * (step - old); }, sizes + base, kept);
#pragma unroll 1
            for (u32 block = 0; block < GROUP; block += NEAR) {
                double found[NEAR];
                times(kept, base, block, found);
#pragma unroll
                for (u32 k = 0; k < NEAR; k++) {
                    const double move = unit[block + k] * (step - old);
                    left[block + k][me] = left[block + k][me] - (found[k] + facts.damping * move);
                }
            }
            if (there) s[base / GROUP] = step;
        }

        // Each input takes its best code; `kept` gets how far that moved its value.
#pragma unroll 1
        for (u32 block = 0; block < GROUP; block += NEAR) {
            double r[NEAR], inverse[NEAR], v[NEAR];
#pragma unroll
            for (u32 k = 0; k < NEAR; k++) {
                r[k] = left[block + k][me], v[k] = unit[block + k];
                inverse[k] = 1 / ((diagonal[base + block + k] + facts.damping) * step);
            }
#pragma unroll 2
            for (u32 j = 0; j < block; j++) {
                double h[NEAR];
                read<NEAR>(here + (u64)j * WIDTH + block, h);
                const double by = kept[j][me];
#pragma unroll
                for (u32 k = 0; k < NEAR; k++) r[k] = r[k] - h[k] * by;
            }
#pragma unroll
            for (u32 j = 0; j < NEAR; j++) {
                double h[NEAR];
                read<NEAR>(here + (u64)(block + j) * WIDTH + block, h);
                const double now = nearest(v[j] + r[j] * inverse[j], z), by = (now - v[j]) * step, move = v[j] * (step - old) + by;
                kept[block + j][me] = by, any = any || by != 0;
                if (there) units[base + block + j] = now, mine[base + block + j] = move;
                left[block + j][me] = move;
#pragma unroll
                for (u32 k = j + 1; k < NEAR; k++) r[k] = r[k] - h[k] * by;
            }
        }
        ever = ever || any;
        if (base + GROUP < count) {
            const int power = share([&](u32 j) { return left[j][me]; }, sizes + base, went + base);
            peak = peak > power ? peak : power;
        } else
#pragma unroll 8
            for (u32 j = 0; j < GROUP; j++) {
                const int power = power_of(sizes[base + j] * left[j][me]);
                peak = peak > power ? peak : power;
            }
    }
    if (ever && there) *changed = 1;
    exponents[me] = exponent_of_power(peak);
    __syncthreads();
    for (u32 r = 0; r < HERE && first_row + r < rows; r++)
        for (u32 i = me; i < count; i += HERE) {
            const u64 other = first_row + r;
            parts[other * WIDTH + i] = shortened(sizes[i] * moved[other * window + i], exponents[r]);
        }
}
