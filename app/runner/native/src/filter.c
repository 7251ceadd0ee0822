/* Candidates above a level that a pass over all scores finds, then the border among them by halving. */
#include "filter.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "vmath.h"

/* Where candidates may begin; behind the last level all are. */
#define LEVELS 5
static const float levels[LEVELS + 1] = {-1.5f, -3.0f, -5.0f, -8.0f, -12.0f, -FLT_MAX};

double mass_of(const float *scores, long count) {
    vd mass = vd_zero();
    long i = 0;
    for (; i + VL <= count; i += VL) mass = vd_add(mass, v_weight(v_load(scores + i)));
    if (i < count) {
        float rest[VL] = {0};
        memcpy(rest, scores + i, (size_t)(count - i) * sizeof(float));
        mass = vd_add(mass, v_select(v_first((int)(count - i)), v_weight(v_load(rest)), v_zero()));
    }
    return vd_sum(mass);
}

/* ---- candidates ---- */

static void count_levels(const float *scores, long count, long *above) {
    memset(above, 0, LEVELS * sizeof *above);
    for (long i = 0; i < count; i += VL) {
        vf score = v_load(scores + i);
        for (int l = 0; l < LEVELS; l++) above[l] += __builtin_popcount(v_bits(v_at_least(score, v_set1(levels[l]))));
    }
}

/* The mass of all; about the mass above each level, which only says where to look. */
static double weigh_levels(const float *scores, long count, double *above) {
    vd mass = vd_zero();
    vf sums[LEVELS];
    for (int l = 0; l < LEVELS; l++) sums[l] = v_zero();
    for (long i = 0; i < count; i += VL) {
        vf score = v_load(scores + i), weight = v_weight(score);
        mass = vd_add(mass, weight);
        for (int l = 0; l < LEVELS; l++)
            sums[l] = v_add(sums[l], v_select(v_at_least(score, v_set1(levels[l])), weight, v_zero()));
    }
    for (int l = 0; l < LEVELS; l++) above[l] = (double)v_sum(sums[l]);
    return vd_sum(mass);
}

static void gather(const float *scores, const int32_t *ids, long count, float level, candidates *found) {
    long n = 0;
    for (long i = 0; i < count; i += VL)
        for (unsigned bits = v_bits(v_at_least(v_load(scores + i), v_set1(level))); bits; bits &= bits - 1) {
            const long at = i + __builtin_ctz(bits);
            found->scores[n] = scores[at];
            found->ids[n++] = ids ? ids[at] : (int32_t)at;
        }
    found->count = n;
}

/* ---- the border ---- */

typedef struct {
    float score;
    long num_equal; /* of those that equal it, how many are kept */
} border;

static float middle_of(float a, float b, float c) {
    return fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
}

/* Scores above `pivot` to the front of `scores`, those below to `lower`; returns how many of each. */
static void part(float *scores, long count, float pivot, float *lower, long *num_above, long *num_below) {
    long above = 0, below = 0;
    for (long i = 0; i < count; i++) {
        const float score = scores[i];
        scores[above] = score;
        lower[below] = score;
        above += score > pivot;
        below += score < pivot;
    }
    *num_above = above;
    *num_below = below;
}

/* The fewest of `count` tokens, one at least, that bring `missing` with `weight` each. All sums are exact. */
static long needed(double sum, double target, double weight, long count) {
    if (weight <= 0.0) return 1;
    long n = (long)fmin((target - sum) / weight, (double)count) - 1; /* a quotient may be rounded up */
    if (n < 1) n = 1;
    while (n < count && sum + (double)n * weight < target) n++;
    return n;
}

/* Where the tokens in order reach `target`, a number of tokens or (is_mass) their mass, which all together reach. Each round
 * drops the part that does not hold the border. */
static border find_border(float *scores, long count, double target, int is_mass, float *lower) {
    double sum = 0.0;
    for (;;) {
        const float pivot = middle_of(scores[0], scores[count / 2], scores[count - 1]);
        long above, below;
        part(scores, count, pivot, lower, &above, &below);
        const long equal = count - above - below;
        const double weight = is_mass ? mass_of(&pivot, 1) : 1.0;
        const double gain = is_mass ? mass_of(scores, above) : (double)above;
        if (above > 0 && sum + gain >= target) {
            count = above;
            continue;
        }
        sum += gain;
        if (below == 0 || sum + (double)equal * weight >= target)
            return (border){pivot, needed(sum, target, weight, equal)};
        sum += (double)equal * weight;
        float *next = lower;
        lower = scores, scores = next, count = below;
    }
}

static void keep(candidates *tokens, border edge) {
    long n = 0;
    for (long i = 0; i < tokens->count; i++) {
        const float score = tokens->scores[i];
        if (score < edge.score || (score == edge.score && edge.num_equal-- <= 0)) continue;
        tokens->scores[n] = score;
        tokens->ids[n++] = tokens->ids[i];
    }
    tokens->count = n;
}

static void keep_until(candidates *tokens, double target, int is_mass, float *left, float *right) {
    memcpy(left, tokens->scores, (size_t)tokens->count * sizeof(float));
    keep(tokens, find_border(left, tokens->count, target, is_mass, right));
}

void filter_tokens(const float *scores, const int32_t *ids, long count, int32_t top_k, double top_p, candidates *kept,
                   float *left, float *right) {
    int l = 0;
    if (top_k > 0) {
        long above[LEVELS];
        count_levels(scores, count, above);
        while (l < LEVELS && above[l] < top_k) l++;
        gather(scores, ids, count, levels[l], kept);
        if (kept->count > top_k) keep_until(kept, (double)top_k, 0, left, right);
        if (top_p < 1.0) keep_until(kept, top_p * mass_of(kept->scores, kept->count), 1, left, right);
        return;
    }
    double above[LEVELS];
    const double target = top_p * weigh_levels(scores, count, above);
    while (l < LEVELS && above[l] < target) l++;
    for (;; l++) {
        gather(scores, ids, count, levels[l], kept);
        if (l == LEVELS || mass_of(kept->scores, kept->count) >= target) break;
    }
    if (top_p < 1.0) keep_until(kept, target, 1, left, right);
}
