/* Plain seeded draws (temperature alone) of many rows at once, equal to app.runner.sampling's.
 *
 * The definition there adds float32 exponentials of numpy in float64. Here the same sums are made with
 * another exponential, so a running sum is off by at most DOUBT of the total (numpy's exponential is
 * good to 3e-7, this one to 2e-7). A draw that lies nearer than that to the border of a token is left
 * to the definition: the answer is then "in doubt", never another token. */
#include "draw.h"

#include <string.h>

#include "vmath.h"

#define SPAN 256 /* tokens summed together */
#define DOUBT 2e-6
#define IN_DOUBT (-1)

static void mix(uint32_t c[4], const uint32_t k[2]) {
    uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    uint32_t first = (uint32_t)(b >> 32) ^ c[1] ^ k[0], third = (uint32_t)(a >> 32) ^ c[3] ^ k[1];
    c[0] = first, c[1] = (uint32_t)b, c[2] = third, c[3] = (uint32_t)a;
}

/* Top 24 bits of philox4x32-10 for (seed, position), in [0, 1). */
static double uniform(uint64_t seed, uint64_t position) {
    uint32_t c[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
    uint32_t k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++, k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u) mix(c, k);
    return (double)(c[0] >> 8) * 0x1p-24;
}

/* e^((logit - largest) / temperature) of up to SPAN tokens; 0 beyond `count`. */
static void weights_of(const float *logits, long count, float largest, float temperature, float *weights) {
    for (long i = 0; i < SPAN; i += VL) {
        float part[VL];
        long left = count - i;
        const float *from = logits + i;
        if (left < VL) {
            memset(part, 0, sizeof part);
            if (left > 0) memcpy(part, from, (size_t)left * sizeof(float));
            from = part;
        }
        vf score = v_div(v_sub(v_load(from), v_set1(largest)), v_set1(temperature));
        v_store(weights + i, v_select(v_first(left < VL ? (int)left : VL), v_exp(score), v_zero()));
    }
}

static double sum_of(const float *weights) {
    double parts[8] = {0};
    for (int i = 0; i < SPAN; i += 8)
        for (int j = 0; j < 8; j++) parts[j] += (double)weights[i + j];
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

/* The token whose share of the running sum holds `target`, when it is that by more than `margin`. */
static int32_t token_at(const float *weights, double before, double target, double margin, int32_t first) {
    for (int i = 0; i < SPAN; i++) {
        double after = before + (double)weights[i];
        if (after > target) {
            int is_sure = after - target > margin && (first + i == 0 || target - before > margin);
            return is_sure ? first + i : IN_DOUBT;
        }
        before = after;
    }
    return IN_DOUBT;
}

static int32_t draw_row(const float *logits, int32_t vocab, float largest, float temperature, double u, double *sums) {
    float weights[SPAN];
    const long spans = (vocab + SPAN - 1) / SPAN;
    double total = 0.0, before = 0.0;
    for (long s = 0; s < spans; s++) {
        weights_of(logits + s * SPAN, vocab - s * SPAN, largest, temperature, weights);
        total += sums[s] = sum_of(weights);
    }
    const double target = u * total;
    for (long s = 0; s < spans; before += sums[s++]) {
        if (before + sums[s] <= target) continue;
        weights_of(logits + s * SPAN, vocab - s * SPAN, largest, temperature, weights);
        return token_at(weights, before, target, DOUBT * total, (int32_t)(s * SPAN));
    }
    return IN_DOUBT;
}

void draw_rows(const hw_draws *d, int from, int to) {
    double sums[DRAW_VOCAB / SPAN];
    for (int r = from; r < to; r++) {
        const float *logits = d->logits + (long)d->slots[r] * d->stride;
        double u = uniform(d->seeds[r], d->positions[r]);
        d->token_ids[r] = d->vocab > DRAW_VOCAB
            ? IN_DOUBT
            : draw_row(logits, d->vocab, logits[d->best_ids[r]], d->temperatures[r], u, sums);
    }
}
