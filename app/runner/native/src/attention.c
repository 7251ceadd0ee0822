/* Online softmax over a sequence's blocks in order; a row is one (token, head).
 *
 * A row's result is fixed by its own position: it meets block after block, within a block its keys
 * are lanes, and masked lanes are selected away, never multiplied. Rows that share a pass (the heads of
 * a group, the tokens of a prefill chunk) only share the loads. */
#include "attention.h"

#include <math.h>
#include <string.h>

#include "tile.h"

#define TARGET_ROWS 48

int query_tokens(const hw_model *model) {
    int group = model->num_heads / model->num_kv_heads;
    int rows = model->head_dim > 64 ? TARGET_ROWS / 2 : TARGET_ROWS;
    return group >= rows ? 1 : rows / group;
}

static uint16_t *block_at(const hw_model *model, uint16_t *cache, int32_t block, int kv_head) {
    return cache + block * model->block_stride + (long)kv_head * BLOCK_TOKENS * model->head_dim;
}

/* K: pairs of dimensions, tokens side by side. */
static void write_key(uint16_t *block, const float *k, int dim, int offset) {
    uint16_t row[256];
    for (int d = 0; d < dim; d += VL) v_store_bf16(row + d, v_load(k + d));
    const uint32_t *pairs = (const uint32_t *)row;
    uint32_t *to = (uint32_t *)block + offset;
    for (int d = 0; d < dim / 2; d++) to[d * BLOCK_TOKENS] = pairs[d];
}

/* V: pairs of tokens, dimensions side by side. The even token writes both: its partner, or zero, so that
 * the half of a pair that no token fills yet is a number. */
static void write_value(uint16_t *block, const float *v, const float *next, int dim, int offset) {
    uint32_t *to = (uint32_t *)block + offset / 2 * dim;
    for (int d = 0; d < dim; d += VL) {
        vi here = v_to_bf16_lanes(v_load(v + d));
        vi there = next ? v_to_bf16_lanes(v_load(next + d)) : vi_set1(0);
        vi_store(to + d, vi_or(here, vi_shift_left16(there)));
    }
}

/* An odd token whose partner was written by an earlier step. */
static void add_odd_value(uint16_t *block, const float *v, int dim, int offset) {
    uint16_t row[256], *to = block + offset / 2 * dim * 2 + 1;
    for (int d = 0; d < dim; d += VL) v_store_bf16(row + d, v_load(v + d));
    for (int d = 0; d < dim; d++) to[2 * d] = row[d];
}

void cache_write(const hw_model *model, const hw_layer *layer, const float *qkv, long stride, int position,
                 const int32_t *table, int has_previous, int has_next) {
    const int dim = model->head_dim, offset = position % BLOCK_TOKENS;
    const float *k = qkv + model->num_heads * dim, *v = k + model->num_kv_heads * dim;
    for (int h = 0; h < model->num_kv_heads; h++, k += dim, v += dim) {
        write_key(block_at(model, layer->k_cache, table[position / BLOCK_TOKENS], h), k, dim, offset);
        uint16_t *values = block_at(model, layer->v_cache, table[position / BLOCK_TOKENS], h);
        if (offset % 2 == 0) write_value(values, v, has_next ? v + stride : NULL, dim, offset);
        else if (!has_previous) add_odd_value(values, v, dim, offset);
    }
}

#define SCORES (BLOCK_TOKENS / VL) /* vectors of scores */
#define SCORES_LOOP _Pragma("GCC unroll 8") for (int j = 0; j < SCORES; j++)

/* Make `largest` the row's reference: what was summed under the old one shrinks. */
static void rebase_row(attention_scratch *s, int row, float largest, float *out, int dim) {
    vf shrink = v_exp2_negative(v_set1(s->largest[row] - largest));
    for (int d = 0; d < dim; d += VL) v_store(out + d, v_mul(v_load(out + d), shrink));
    s->sum[row] *= v_largest(shrink);
    s->largest[row] = largest;
}

/* One row against one block: scores to probabilities in bf16, and the running maximum and sum. The row sees
 * the block's tokens first .. tokens - 1; `is_full`: all. `cap`: of scores, 0 is none. */
INLINE void softmax_row(const int is_full, const int is_capped, attention_scratch *s, int row, int first, int tokens,
                        float scale, float cap, int dim) {
    const float *scores = s->scores + row * BLOCK_TOKENS;
    vf x[SCORES], most = v_set1(-INFINITY), sum = v_zero();
    SCORES_LOOP {
        x[j] = v_mul(v_load(scores + j * VL), v_set1(scale));
        if (is_capped) x[j] = v_cap(x[j], cap);
        if (!is_full) x[j] = v_select(v_first(tokens - j * VL), x[j], v_set1(-INFINITY));
        if (!is_full) x[j] = v_select(v_first(first - j * VL), v_set1(-INFINITY), x[j]);
        most = v_max(most, x[j]);
    }
    float largest = v_largest(most);
    if (largest > s->largest[row]) rebase_row(s, row, largest, s->out + row * dim, dim);
    vf reference = v_set1(s->largest[row]);
    SCORES_LOOP {
        vf e = v_exp2_negative(v_sub(x[j], reference));
        if (!is_full) e = v_select(v_first(tokens - j * VL), e, v_zero());
        if (!is_full) e = v_select(v_first(first - j * VL), v_zero(), e);
        sum = v_add(sum, e);
        v_store_bf16(s->p + row * BLOCK_TOKENS + j * VL, e);
    }
    s->sum[row] += v_sum(sum);
}

/* `seen`: tokens of the block and those before it that the first row may see at most. A row whose window begins
 * behind the block takes nothing of it. */
static void softmax_rows(const hw_model *model, const hw_layer *layer, attention_scratch *s, int from, int rows,
                         int seen) {
    const int group = model->num_heads / model->num_kv_heads, dim = model->head_dim;
    const float scale = model->attention_scale * LOG2_E, cap = model->attention_cap * LOG2_E;
    for (int r = from; r < rows; r++) {
        const int tokens = seen + r / group, first = layer->window ? tokens - (int)layer->window : 0;
        if (first >= BLOCK_TOKENS) memset(s->p + r * BLOCK_TOKENS, 0, BLOCK_TOKENS * sizeof *s->p);
        else if (cap > 0.0f) softmax_row(0, 1, s, r, first, tokens, scale, cap, dim);
        else if (tokens >= BLOCK_TOKENS && first <= 0) softmax_row(1, 0, s, r, 0, BLOCK_TOKENS, scale, cap, dim);
        else softmax_row(0, 0, s, r, first, tokens, scale, cap, dim);
    }
}

/* Ask for a block of K or V before it is needed. */
static void draw_block(const uint16_t *block, int dim) {
    for (long i = 0; i < BLOCK_TOKENS * dim * 2; i += 64) _mm_prefetch((const char *)block + i, _MM_HINT_T1);
}

/* The block that is needed next is drawn in while this one is multiplied; by the first tile alone. */
static void draw_next(tile_in *t, const uint16_t *next, int tile) {
    const long step = tile == 0 ? t->w_stride * 4 : 0;
    t->near = (stream){(const char *)next, step};
    t->far = (stream){t->near.at + 128, step};
    t->beside = (stream){t->near.at + 192, step};
}

static void scores_of(attention_scratch *s, const uint16_t *keys, const uint16_t *next, int from, int rows, int columns,
                      int dim) {
    int count = tile_count(rows - from, MR_MAX);
    for (int i = 0; i < count; i++) {
        int row = from + tile_start(rows - from, count, i), end = from + tile_start(rows - from, count, i + 1);
        tile_in t = {.x = s->q + row * dim, .x_stride = dim / 2, .w = keys, .w_stride = BLOCK_TOKENS, .groups = dim / 2};
        draw_next(&t, next, i);
        tile_run_bf16(&t, end - row, columns, NULL, 0, s->scores + row * BLOCK_TOKENS, BLOCK_TOKENS);
    }
}

static void add_values(attention_scratch *s, const uint16_t *values, const uint16_t *next, int from, int rows,
                       int tokens, int dim) {
    int count = tile_count(rows - from, MR_MAX);
    if (tokens < BLOCK_TOKENS) draw_block(next, dim); /* too few steps to draw it beside them */
    for (int i = 0; i < count; i++) {
        int row = from + tile_start(rows - from, count, i), end = from + tile_start(rows - from, count, i + 1);
        tile_in t = {.x = s->p + row * BLOCK_TOKENS, .x_stride = BLOCK_TOKENS / 2, .w = values, .w_stride = dim};
        t.groups = (tokens + 1) / 2;
        draw_next(&t, next, i);
        float *out = s->out + row * dim;
        tile_run_bf16(&t, end - row, dim, out, dim, out, dim);
    }
}

static void begin(const hw_model *model, attention_scratch *s, const query_block *b, int kv_head, const float *qkv,
                  long stride) {
    const int dim = model->head_dim, group = model->num_heads / model->num_kv_heads, rows = b->count * group;
    for (int t = 0; t < b->count; t++) {
        const float *q = qkv + (b->first + t) * stride + kv_head * group * dim;
        for (int i = 0; i < group * dim; i += VL) v_store_bf16(s->q + t * group * dim + i, v_load(q + i));
    }
    for (int r = 0; r < rows; r++) s->largest[r] = -INFINITY, s->sum[r] = 0.0f;
    memset(s->out, 0, sizeof(float) * (size_t)(rows * dim));
}

static void end(const hw_model *model, attention_scratch *s, const query_block *b, int kv_head, uint16_t *out,
                long stride) {
    const int dim = model->head_dim, group = model->num_heads / model->num_kv_heads;
    for (int r = 0; r < b->count * group; r++) {
        uint16_t *to = out + (b->first + r / group) * stride + (kv_head * group + r % group) * dim;
        vf inverse = v_set1(1.0f / s->sum[r]);
        for (int d = 0; d < dim; d += VL) v_store_bf16(to + d, v_mul(v_load(s->out + r * dim + d), inverse));
    }
}

void attend(const hw_model *model, const hw_layer *layer, const hw_step *step, const query_block *b, int kv_head,
            int32_t next_block, int next_kv_head, const float *qkv, long qkv_stride, uint16_t *out, long out_stride,
            attention_scratch *s) {
    const int dim = model->head_dim, group = model->num_heads / model->num_kv_heads, rows = b->count * group;
    const int first = step->positions[b->first], last = first + b->count - 1;
    const int32_t *table = step->block_tables + step->table_starts[b->entry];
    const int seen_from = layer->window && first >= layer->window ? first + 1 - (int)layer->window : 0;
    begin(model, s, b, kv_head, qkv, qkv_stride);
    for (int block = seen_from / BLOCK_TOKENS; block <= last / BLOCK_TOKENS; block++) {
        const int start = block * BLOCK_TOKENS, tokens = last + 1 - start < BLOCK_TOKENS ? last + 1 - start : BLOCK_TOKENS;
        const int columns = (tokens + 15) / 16 * 16;
        const int from = start > first ? (start - first) * group : 0; /* rows before it end in earlier blocks */
        const int is_last = block == last / BLOCK_TOKENS;
        const int32_t next = is_last ? next_block : table[block + 1];
        const int next_head = is_last ? next_kv_head : kv_head;
        scores_of(s, block_at(model, layer->k_cache, table[block], kv_head),
                  block_at(model, layer->k_cache, next, next_head), from, rows, columns, dim);
        softmax_rows(model, layer, s, from, rows, first + 1 - start);
        add_values(s, block_at(model, layer->v_cache, table[block], kv_head),
                   block_at(model, layer->v_cache, next, next_head), from, rows, tokens, dim);
    }
    end(model, s, b, kv_head, out, out_stride);
}
