/* Elementary functions over vectors: one polynomial, no libm, the same bits for every lane. */
#ifndef HW_VMATH_H
#define HW_VMATH_H
#include SIMD_HEADER

/* x as n + r, n whole and |r| <= 1/2; x below -126 counts as -126. */
INLINE vf v_whole_part(vf x, vf *r) {
    x = v_max(v_set1(-126.0f), x);
    vf n = v_round(x);
    *r = v_sub(x, n);
    return n;
}

/* 2^x within 1e-7 for x up to 126. NaN stays NaN. */
INLINE vf v_exp2(vf x) {
    vf r, n = v_whole_part(v_min(v_set1(126.0f), x), &r);
    vf p = v_set1(1.32646975e-3f);
    p = v_fma(p, r, v_set1(9.6715113e-3f));
    p = v_fma(p, r, v_set1(5.5507343e-2f));
    p = v_fma(p, r, v_set1(2.4022242e-1f));
    p = v_fma(p, r, v_set1(6.9314698e-1f));
    return v_scale2(v_fma(p, r, v_set1(1.0f)), n);
}

/* 2^x within 3e-6 for x <= 0: probabilities, which become bf16. 2^0 is 1. */
INLINE vf v_exp2_negative(vf x) {
    vf r, n = v_whole_part(x, &r);
    vf p = v_set1(9.58285e-3f);
    p = v_fma(p, r, v_set1(5.590642e-2f));
    p = v_fma(p, r, v_set1(2.4024099e-1f));
    p = v_fma(p, r, v_set1(6.9312419e-1f));
    return v_scale2(v_fma(p, r, v_set1(1.0f)), n);
}

#define LOG2_E 1.44269504f

/* What a token weighs in a draw, e^x for x <= 0: app.runner.sampling.weights bit for bit, nothing fused. Multiples
 * of 2^-32, so that sums in double precision are exact in any order. */
INLINE vf v_weight(vf x) {
    vf power = v_max(v_set1(-40.0f), v_mul(x, v_set1(LOG2_E)));
    vf n = v_round(power), r = v_sub(power, n);
    vf p = v_set1(1.540353e-4f);
    p = v_add(v_mul(p, r), v_set1(1.3333558e-3f));
    p = v_add(v_mul(p, r), v_set1(9.618129e-3f));
    p = v_add(v_mul(p, r), v_set1(5.5504109e-2f));
    p = v_add(v_mul(p, r), v_set1(2.4022651e-1f));
    p = v_add(v_mul(p, r), v_set1(6.9314718e-1f));
    p = v_scale2(v_add(v_mul(p, r), v_set1(1.0f)), n);
    vf grain = v_set1(0x1p-9f), rounded = v_sub(v_add(p, grain), grain);
    return v_select(v_greater(grain, p), rounded, p);
}

/* x / (1 + e^-x) */
INLINE vf v_silu(vf x) { return v_div(x, v_add(v_set1(1.0f), v_exp2(v_mul(x, v_set1(-LOG2_E))))); }

/* x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): 0.5 x (1 + tanh u) without its cancellation. */
INLINE vf v_gelu(vf x) {
    vf u = v_mul(x, v_fma(v_mul(x, x), v_set1(0.7978845608f * 0.044715f), v_set1(0.7978845608f)));
    return v_div(x, v_add(v_set1(1.0f), v_exp2(v_mul(u, v_set1(-2.0f * LOG2_E)))));
}

/* cap * tanh(x / cap) */
INLINE vf v_cap(vf x, float cap) {
    vf e = v_exp2(v_mul(x, v_set1(2.0f * LOG2_E / cap)));
    return v_fma(v_div(v_set1(-2.0f), v_add(e, v_set1(1.0f))), v_set1(cap), v_set1(cap));
}
#endif
