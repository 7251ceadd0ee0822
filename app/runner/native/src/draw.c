/* One row's draw: its changes, its mask, its filters, one seeded token. See app.runner.sampling for the definition, whose
 * steps are followed one by one; every sum is exact (vmath.h, v_weight), so that none depends on how it is made. */
#include "draw.h"

#include <math.h>
#include <string.h>

#include "filter.h"
#include "vmath.h"

#define SPAN 256 /* tokens summed together */

typedef struct {
    float *changed, *values, *scores, *left, *right; /* [vocab + a vector] each, as the ids */
    int32_t *ids, *kept;
    double *sums; /* [spans] */
} scratch;

/* Tokens that may be drawn, in the order of their ids. */
typedef struct {
    const float *values;
    const int32_t *ids; /* NULL: 0, 1, ... */
    long count;
} tokens;

static long room(long vocab) { return (vocab + VL + 15) / 16 * 16; }
static long spans(long count) { return (count + SPAN - 1) / SPAN; }

size_t draw_scratch(int32_t vocab) {
    return (size_t)room(vocab) * (5 * sizeof(float) + 2 * sizeof(int32_t)) + (size_t)(spans(vocab) + 7) / 8 * 8 * sizeof(double);
}

static scratch carve(char *memory, long vocab) {
    float *f = (float *)memory;
    const long n = room(vocab);
    scratch s = {.changed = f, .values = f + n, .scores = f + 2 * n, .left = f + 3 * n, .right = f + 4 * n};
    s.ids = (int32_t *)(f + 5 * n);
    s.kept = s.ids + n;
    s.sums = (double *)(s.kept + n);
    return s;
}

static int32_t id_of(const tokens *t, long index) { return t->ids ? t->ids[index] : (int32_t)index; }

/* ---- random numbers ---- */

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

/* ---- changes and masks ---- */

static int is_changed(const hw_row *row) {
    return row->num_repeated || row->num_output || row->num_bias || row->num_banned;
}

static void change(const hw_row *row, float *logits) {
    for (int i = 0; i < row->num_repeated; i++) {
        float *at = logits + row->repeated_ids[i];
        *at = *at > 0.0f ? *at / row->repetition_penalty : *at * row->repetition_penalty;
    }
    for (int i = 0; i < row->num_output; i++)
        logits[row->output_ids[i]] -= row->output_counts[i] * row->frequency_penalty + row->presence_penalty;
    for (int i = 0; i < row->num_bias; i++) logits[row->bias_ids[i]] += row->bias_values[i];
    for (int i = 0; i < row->num_banned; i++) logits[row->banned_ids[i]] = -INFINITY;
}

static int is_masked_out(const hw_row *row, long id) { return row->mask && !((uint32_t)row->mask[id / 32] >> id % 32 & 1); }

static tokens gather_masked(const hw_row *row, const float *logits, long vocab, scratch *s) {
    long n = 0;
    for (long first = 0; first < vocab; first += 32) {
        uint32_t bits = (uint32_t)row->mask[first / 32];
        if (vocab - first < 32) bits &= (1u << (vocab - first)) - 1;
        for (; bits; bits &= bits - 1) {
            const long id = first + __builtin_ctz(bits);
            s->values[n] = logits[id];
            s->ids[n++] = (int32_t)id;
        }
    }
    return (tokens){s->values, s->ids, n};
}

static tokens gather_allowed(const hw_row *row, const float *logits, scratch *s) {
    long n = 0;
    for (int i = 0; i < row->num_allowed; i++) {
        const long id = row->allowed_ids[i];
        if (is_masked_out(row, id)) continue;
        s->values[n] = logits[id];
        s->ids[n++] = (int32_t)id;
    }
    return (tokens){s->values, s->ids, n};
}

static tokens allowed_tokens(const hw_row *row, long vocab, scratch *s) {
    const float *logits = row->logits;
    if (is_changed(row)) {
        memcpy(s->changed, logits, (size_t)vocab * sizeof(float));
        change(row, s->changed);
        logits = s->changed;
    }
    if (row->num_allowed) return gather_allowed(row, logits, s);
    if (row->mask) return gather_masked(row, logits, vocab, s);
    return (tokens){logits, NULL, vocab};
}

/* ---- scores ---- */

static vf load_part(const float *from, long left) {
    if (left >= VL) return v_load(from);
    float part[VL];
    for (int i = 0; i < VL; i++) part[i] = i < left ? from[i] : -INFINITY;
    return v_load(part);
}

/* Index of the largest, the first of equals; 0 where there are none. */
static long largest_of(const tokens *t) {
    vf most = v_set1(-INFINITY);
    for (long i = 0; i < t->count; i += VL) most = v_max(most, load_part(t->values + i, t->count - i));
    const vf largest = v_set1(v_largest(most));
    for (long i = 0; i < t->count; i += VL) {
        const unsigned bits = v_bits(v_at_least(load_part(t->values + i, t->count - i), largest));
        if (bits) return i + __builtin_ctz(bits);
    }
    return 0;
}

/* (logit - largest) / temperature, -infinity below min_p's border. */
static vf scores_at(const hw_row *row, const tokens *t, float largest, long i) {
    const vf score = v_div(v_sub(load_part(t->values + i, t->count - i), v_set1(largest)), v_set1(row->temperature));
    return v_select(v_at_least(score, v_set1(row->lowest_score)), score, v_set1(-INFINITY));
}

/* ---- the draw ---- */

static void weights_at(const hw_row *row, const tokens *t, float largest, long first, float *weights) {
    for (long i = 0; i < SPAN; i += VL)
        v_store(weights + i, first + i < t->count ? v_weight(scores_at(row, t, largest, first + i)) : v_zero());
}

/* Index of the first whose running sum exceeds `target`. */
static int index_at(const float *weights, double before, double target) {
    for (int i = 0; i < SPAN - 1; i++)
        if ((before += (double)weights[i]) > target) return i;
    return SPAN - 1;
}

static int32_t draw_of_all(const hw_row *row, const tokens *t, float largest, scratch *s) {
    float weights[SPAN];
    const long num_spans = spans(t->count);
    double total = 0.0, before = 0.0;
    for (long span = 0; span < num_spans; span++) {
        vd sum = vd_zero();
        for (long i = span * SPAN; i < (span + 1) * SPAN && i < t->count; i += VL)
            sum = vd_add(sum, v_weight(scores_at(row, t, largest, i)));
        total += s->sums[span] = vd_sum(sum);
    }
    const double target = uniform(row->seed, row->position) * total;
    long span = 0;
    while (span < num_spans - 1 && before + s->sums[span] <= target) before += s->sums[span++];
    weights_at(row, t, largest, span * SPAN, weights);
    return id_of(t, span * SPAN + index_at(weights, before, target));
}

static int32_t draw_of_kept(const hw_row *row, const candidates *kept) {
    const double target = uniform(row->seed, row->position) * mass_of(kept->scores, kept->count);
    double before = 0.0;
    float weights[SPAN];
    for (long first = 0;; first += SPAN) {
        const long count = kept->count - first < SPAN ? kept->count - first : SPAN;
        for (long i = 0; i < SPAN; i += VL)
            v_store(weights + i, i < count ? v_weight(load_part(kept->scores + first + i, count - i)) : v_zero());
        double after = before;
        for (long i = 0; i < count; i++)
            if ((after += (double)weights[i]) > target || first + i == kept->count - 1) return kept->ids[first + i];
        before = after;
    }
}

void draw_row(hw_row *row, int32_t vocab, char *memory) {
    scratch s = carve(memory, vocab);
    const int is_raw = !is_changed(row) && row->num_allowed == 0;
    row->token_id = row->best_id;
    if (is_raw && row->temperature == 0.0f && !is_masked_out(row, row->best_id)) return;
    tokens t = allowed_tokens(row, vocab, &s);
    const long best = is_raw && !row->mask ? row->best_id : largest_of(&t);
    const float largest = t.count ? t.values[best] : -INFINITY;
    row->token_id = isfinite(largest) ? id_of(&t, best) : -1;
    if (row->token_id < 0 || row->temperature == 0.0f) return;
    if (row->top_p >= 1.0 && (row->top_k <= 0 || row->top_k >= t.count)) {
        row->token_id = draw_of_all(row, &t, largest, &s);
        return;
    }
    for (long i = 0; i < t.count; i += VL) v_store(s.scores + i, scores_at(row, &t, largest, i));
    candidates kept = {s.changed, s.kept, 0};
    filter_tokens(s.scores, t.ids, t.count, row->top_k, row->top_p, &kept, s.left, s.right);
    row->token_id = draw_of_kept(row, &kept);
}
