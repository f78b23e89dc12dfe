// The numbers that a grid can store, as `qkit.reference.steps` has them: the nearest scale, and the nearest code.
//
// Constants (macros):
//   RULE: of scales: 0 integers above zero, 1 integers of either sign, 2 integers with zero points, 3 nvfp4, 4 powers of two.
//   LOWEST, HIGHEST: codes of integers. MANTISSA, LEAST, EIGHTHS: bits of a float's mantissa, its least exponent, and eight times
//   its largest value.
//   LEAST_POWER, MOST_POWER: of scales that are powers of two.

#include "doubles.cuh"

constexpr u32 STEPS = 20;  // scales of integers to try

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
