/* Elementary functions over vectors: one polynomial, no libm, the same bits for every lane. */
#ifndef HW_VMATH_H
#define HW_VMATH_H
#include SIMD_HEADER

/* 2^x within 2 ulp for x in -126..126; below, the smallest normal number. NaN stays NaN. */
INLINE vf v_exp2(vf x) {
    x = v_min(v_set1(126.0f), v_max(v_set1(-126.0f), x));
    vf n = v_round(x), r = v_sub(x, n);
    vf p = v_set1(1.5403530e-4f);
    p = v_fma(p, r, v_set1(1.3333558e-3f));
    p = v_fma(p, r, v_set1(9.6181291e-3f));
    p = v_fma(p, r, v_set1(5.5504109e-2f));
    p = v_fma(p, r, v_set1(2.4022651e-1f));
    p = v_fma(p, r, v_set1(6.9314718e-1f));
    p = v_fma(p, r, v_set1(1.0f));
    return v_mul(p, v_pow2(n));
}

#define LOG2_E 1.44269504f

/* x / (1 + e^-x) */
INLINE vf v_silu(vf x) { return v_div(x, v_add(v_set1(1.0f), v_exp2(v_mul(x, v_set1(-LOG2_E))))); }
#endif
