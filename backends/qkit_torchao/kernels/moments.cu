// The passes over moments [n, n] of `arithmetic.moments`, in fp64, with the bits of the law. `cuda_moments` launches this, `nvrtc`
// compiles it. DOUBLE (a macro): moments are fp64, not fp32.
//
// A program has a tile of TILE rows and TILE columns, a warp one row after the other: reads of the other side share lines of the cache.

#include "doubles.cuh"

#if DOUBLE
typedef double Given;
#else
typedef float Given;
#endif

constexpr u32 TILE = 32, ROWS_AT_ONCE = THREADS / TILE;
constexpr double LIMIT = 1 << 20, UNIT = 1.0 / (1 << 19);  // of correlations: the largest number, and what one counts

DEVICE double mean(const Given *h, u32 n, u32 i, u32 j) { return ((double)h[(u64)i * n + j] + (double)h[(u64)j * n + i]) / 2; }

template <class Each> DEVICE void each(u32 n, Each visit) {
    const u32 j = blockIdx.x * TILE + threadIdx.x % TILE, first = blockIdx.y * TILE;
    for (u32 i = first + threadIdx.x / TILE; j < n && i < n && i < first + TILE; i += ROWS_AT_ONCE) visit(i, j);
}

// faults [2]: whether any is not finite, and whether both sides of the diagonal differ by more than `bound` times both `roots` [n].
ENTRY check(const Given *h, const double *roots, const double *bound, u32 *faults, u32 n) {
    each(n, [&](u32 i, u32 j) {
        const Given one = h[(u64)i * n + j], other = h[(u64)j * n + i];
        if ((bits(one) >> 52 & 2047) == 2047) faults[0] = 1;
        const Given apart = one - other;
        if (fabs((double)apart) > *bound * roots[i] * roots[j]) faults[1] = 1;
    });
}

// The lower half of `out`: the mean of both sides, and `damping` on the diagonal, inputs from the last to the first in `order`.
ENTRY reorder(const Given *h, const i64 *order, const double *damping, double *out, u32 n) {
    each(n, [&](u32 r, u32 c) {
        if (c > r) return;
        const double found = mean(h, n, order[n - 1 - r], order[n - 1 - c]);
        out[(u64)r * n + c] = r == c ? found + *damping : found;
    });
}

// correlations [n, n], see `moments.correlations`; and, unless there are none, the digits [3, n, n] of what they count.
ENTRY correlate(const Given *h, const double *sizes, double *correlations, signed char *digits, u32 n) {
    each(n, [&](u32 i, u32 j) {
        const u64 at = (u64)i * n + j, plane = (u64)n * n;
        const double number = clipped(rint(mean(h, n, i, j) / (sizes[i] * UNIT) / sizes[j]), -LIMIT, LIMIT);
        correlations[at] = number * UNIT;
        if (!digits) return;
        int rest = (int)number;
        for (u32 k = 0; k < 3; k++) {
            const int digit = (rest + 128 & 255) - 128;
            digits[k * plane + at] = digit, rest = (rest - digit) >> 8;
        }
    });
}

// The unit upper matrix `out` that is `lower` from its last row and column to its first.
ENTRY turn(const double *lower, double *out, u32 n) {
    each(n, [&](u32 i, u32 j) { out[(u64)i * n + j] = j > i ? lower[(u64)(n - 1 - i) * n + n - 1 - j] : i == j; });
}
