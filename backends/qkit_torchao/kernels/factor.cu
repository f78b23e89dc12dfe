// The panels of `exact_products.unit_upper`, in fp64, with the bits of the law. `cuda_fit`
// launches this, `nvrtc` compiles it.
//
// A panel [BLOCK, rows] has BLOCK (a macro) columns of a symmetric matrix, on their side. The last one may have fewer.

#include "doubles.cuh"

// Eliminates the panel's own columns, in one program: `before` [BLOCK, BLOCK] gets its rows as they are before their division.
ENTRY eliminate(double *panel, double *before, double *pivots, u32 rows, u32 count) {
    __shared__ double kept[BLOCK][BLOCK], found[BLOCK];
    const u32 all = BLOCK * BLOCK, me = threadIdx.x, step = blockDim.x;
    for (u32 i = me; i < all; i += step)
        if (i / BLOCK < count && i % BLOCK < count) kept[i / BLOCK][i % BLOCK] = panel[(u64)(i / BLOCK) * rows + i % BLOCK];
    __syncthreads();
    for (u32 j = 0; j < count; j++) {
        const double pivot = kept[j][j];
        for (u32 c = me; c < count; c += step) {
            before[j * BLOCK + c] = kept[j][c];
            if (c == j) pivots[j] = pivot;
            if (c > j) panel[(u64)j * rows + c] = found[c] = kept[j][c] / pivot;
        }
        __syncthreads();
        for (u32 i = me; i < all; i += step) {
            const u32 r = i / BLOCK, c = i % BLOCK;
            if (r > j && c > j && r < count && c < count) kept[r][c] = kept[r][c] - kept[j][r] * found[c];
        }
        __syncthreads();
    }
}

// Eliminates the columns from the rows below, from number BLOCK on. left [rows - BLOCK, 2 BLOCK], parts [3 BLOCK, rows - BLOCK]:
// the halves of the product that updates the rest of the matrix.
ENTRY eliminate_below(double *panel, const double *before, const double *pivots, double *left, double *parts, u32 rows) {
    __shared__ double above[BLOCK * BLOCK];
    const u32 c = blockIdx.x * ROWS + threadIdx.x, many = rows - BLOCK;
    for (u32 i = threadIdx.x; i < BLOCK * BLOCK; i += ROWS) above[i] = before[i];
    together();
    if (c >= many) return;
    double v[BLOCK], peak = 0, largest = 0;
    panel += BLOCK + c, left += (u64)c * 2 * BLOCK, parts += c;
#pragma unroll
    for (u32 j = 0; j < BLOCK; j++) v[j] = panel[(u64)j * rows];
#pragma unroll
    for (u32 j = 0; j < BLOCK; j++) {
        v[j] = v[j] / pivots[j];
#pragma unroll
        for (u32 r = j + 1; r < BLOCK; r++) v[r] = v[r] - above[j * BLOCK + r] * v[j];
        panel[(u64)j * rows] = v[j];
        peak = larger(peak, fabs(v[j])), largest = larger(largest, fabs(v[j] * pivots[j]));
    }
    const int e = exponent_above(peak), of_left = exponent_above(largest);
#pragma unroll
    for (u32 j = 0; j < BLOCK; j++) {
        double top, rest;
        halve(v[j], e, top, rest);
        parts[(u64)j * many] = parts[(u64)(2 * BLOCK + j) * many] = top, parts[(u64)(BLOCK + j) * many] = rest;
        halve(v[j] * pivots[j], of_left, left[j], left[BLOCK + j]);
    }
}
