/* Online softmax over a sequence's blocks in order; a row is one (token, head).
 *
 * A row's result is fixed by its own position: it meets block after block, within a block its keys
 * are lanes, and masked lanes are selected away, never multiplied. Rows that share a pass (heads, the tokens
 * of a prefill chunk, sequences with the same beginning) only share the loads. */
#include "attention.h"

#include <math.h>
#include <string.h>

#include "tile.h"

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

/* One item and whose it is. Rows: heads, within them tokens, within those the heads of the group. */
typedef struct {
    const hw_model *model;
    const hw_layer *layer;
    const attention_item *item;
    attention_scratch *s;
} pass;

static int group_of(const hw_model *model) { return model->num_heads / model->num_kv_heads; }
static int first_row(const pass *p, int head, int token) { return (head * p->item->count + token) * group_of(p->model); }

static uint16_t *keys_at(const pass *p, int32_t block, int head) {
    return block_at(p->model, p->layer->k_cache, block, p->item->kv_head + head);
}

static uint16_t *values_at(const pass *p, int32_t block, int head) {
    return block_at(p->model, p->layer->v_cache, block, p->item->kv_head + head);
}

/* Rows from .. to - 1, of which the first may see `seen` tokens of the block and those before it at most. A row whose
 * window begins behind the block takes nothing of it. */
static void softmax_rows(const pass *p, int from, int to, int seen) {
    const int group = group_of(p->model), dim = p->model->head_dim;
    const float scale = p->model->attention_scale * LOG2_E, cap = p->model->attention_cap * LOG2_E;
    attention_scratch *s = p->s;
    for (int r = from; r < to; r++) {
        const int tokens = seen + (r - from) / group, first = p->layer->window ? tokens - (int)p->layer->window : 0;
        if (first >= BLOCK_TOKENS) memset(s->p + r * BLOCK_TOKENS, 0, BLOCK_TOKENS * sizeof *s->p);
        else if (cap > 0.0f) softmax_row(0, 1, s, r, first, tokens, scale, cap, dim);
        else if (tokens >= BLOCK_TOKENS && first <= 0) softmax_row(1, 0, s, r, 0, BLOCK_TOKENS, scale, cap, dim);
        else softmax_row(0, 0, s, r, first, tokens, scale, cap, dim);
    }
}

/* Ask for keys or values of one head before they are needed. */
static void draw_all(const uint16_t *next, int dim) {
    for (long i = 0; i < BLOCK_TOKENS * dim * 2; i += 64) _mm_prefetch((const char *)next + i, _MM_HINT_T1);
}

/* What is needed next is drawn in while this is multiplied, a line for each that is read; by the first tile alone. */
static void draw_next(tile_in *t, const uint16_t *next, int tile) {
    const long step = tile == 0 ? BLOCK_TOKENS * 4 : 0;
    t->near = (stream){(const char *)next, step};
    t->far = (stream){t->near.at + 128, step};
    t->beside = (stream){t->near.at + 192, step};
}

static void scores_of(attention_scratch *s, const uint16_t *keys, const uint16_t *next, int from, int to, int columns,
                      int dim) {
    const int count = tile_count(to - from, MR_MAX);
    for (int i = 0; i < count; i++) {
        const int row = from + tile_start(to - from, count, i), end = from + tile_start(to - from, count, i + 1);
        tile_in t = {.x = s->q + row * dim, .x_stride = dim / 2, .w = keys, .w_stride = BLOCK_TOKENS, .groups = dim / 2};
        draw_next(&t, next, i);
        tile_run_bf16(&t, end - row, columns, NULL, 0, s->scores + row * BLOCK_TOKENS, BLOCK_TOKENS);
    }
}

static void add_values(attention_scratch *s, const uint16_t *values, const uint16_t *next, int from, int to, int tokens,
                       int dim) {
    const int count = tile_count(to - from, MR_MAX);
    if (tokens < BLOCK_TOKENS) draw_all(next, dim); /* too few steps to draw it beside them */
    for (int i = 0; i < count; i++) {
        const int row = from + tile_start(to - from, count, i), end = from + tile_start(to - from, count, i + 1);
        tile_in t = {.x = s->p + row * BLOCK_TOKENS, .x_stride = BLOCK_TOKENS / 2, .w_stride = dim};
        t.groups = (tokens + 1) / 2;
        for (int d = 0; d < dim; d += COLUMNS) {
            float *out = s->out + row * dim + d;
            t.w = values + 2 * d;
            draw_next(&t, next + BLOCK_TOKENS * d, i);
            tile_run_bf16(&t, end - row, dim - d < COLUMNS ? dim - d : COLUMNS, out, dim, out, dim);
        }
    }
}

/* Tokens from .. to - 1 of the item, the first of which stands at `position`, through blocks begin .. end - 1 of a table.
 * Keys of all heads, then values, as they lie in memory. after: what is read then. */
static void walk(const pass *p, int from, int to, int position, const int32_t *table, int begin, int end,
                 const uint16_t *after) {
    const int heads = p->item->heads, dim = p->model->head_dim, last = position + to - from - 1;
    for (int b = begin; b < end; b++) {
        const int start = b * BLOCK_TOKENS, tokens = last + 1 - start < BLOCK_TOKENS ? last + 1 - start : BLOCK_TOKENS;
        const int columns = (tokens + 15) / 16 * 16;
        const int skip = start > position ? start - position : 0; /* tokens that end in earlier blocks */
        const uint16_t *beyond = b + 1 < end ? keys_at(p, table[b + 1], 0) : after;
        for (int h = 0; h < heads; h++) {
            const uint16_t *next = h + 1 < heads ? keys_at(p, table[b], h + 1) : values_at(p, table[b], 0);
            scores_of(p->s, keys_at(p, table[b], h), next, first_row(p, h, from + skip), first_row(p, h, to), columns, dim);
        }
        for (int h = 0; h < heads; h++)
            softmax_rows(p, first_row(p, h, from + skip), first_row(p, h, to), position + skip + 1 - start);
        for (int h = 0; h < heads; h++) {
            const uint16_t *next = h + 1 < heads ? values_at(p, table[b], h + 1) : beyond;
            add_values(p->s, values_at(p, table[b], h), next, first_row(p, h, from + skip), first_row(p, h, to), tokens, dim);
        }
    }
}

static void begin_rows(const pass *p, const query *queries, const float *qkv, long stride) {
    const int dim = p->model->head_dim, width = group_of(p->model) * dim, rows = first_row(p, p->item->heads, 0);
    for (int h = 0; h < p->item->heads; h++)
        for (int t = 0; t < p->item->count; t++) {
            const float *q = qkv + queries[t].token * stride + (p->item->kv_head + h) * width;
            uint16_t *to = p->s->q + first_row(p, h, t) * dim;
            for (int i = 0; i < width; i += VL) v_store_bf16(to + i, v_load(q + i));
        }
    for (int r = 0; r < rows; r++) p->s->largest[r] = -INFINITY, p->s->sum[r] = 0.0f;
    memset(p->s->out, 0, sizeof(float) * (size_t)(rows * dim));
}

static void end_rows(const pass *p, const query *queries, uint16_t *out, long stride) {
    const int dim = p->model->head_dim, group = group_of(p->model), rows = p->item->count * group;
    for (int h = 0; h < p->item->heads; h++)
        for (int i = 0; i < rows; i++) {
            const int row = h * rows + i;
            uint16_t *to = out + queries[i / group].token * stride + ((p->item->kv_head + h) * group + i % group) * dim;
            const vf inverse = v_set1(1.0f / p->s->sum[row]);
            for (int d = 0; d < dim; d += VL) v_store_bf16(to + d, v_mul(v_load(p->s->out + row * dim + d), inverse));
        }
}

static int first_block(const hw_layer *layer, int position) {
    return layer->window && position >= layer->window ? (position + 1 - (int)layer->window) / BLOCK_TOKENS : 0;
}

void attend(const hw_model *model, const hw_layer *layer, const hw_step *step, const attention_plan *plan, int index,
            const float *qkv, long qkv_stride, uint16_t *out, long out_stride, attention_scratch *s) {
    const attention_item *item = plan->items + index, *following = index + 1 < plan->num_items ? item + 1 : item;
    const query *queries = plan->queries + item->first;
    const pass p = {model, layer, item, s};
    /* The likely next item: a thread's share lies together. */
    const int32_t next_block = step->block_tables[step->table_starts[plan->queries[following->first].entry]];
    const uint16_t *after = block_at(model, layer->k_cache, next_block, following->kv_head);
    const int common = layer->window ? 0 : item->common, tokens = item->common ? 1 : item->count;
    begin_rows(&p, queries, qkv, qkv_stride);
    const int32_t *table = step->block_tables + step->table_starts[queries->entry];
    if (common) walk(&p, 0, item->count, common * BLOCK_TOKENS, table, 0, common, keys_at(&p, table[common], 0));
    for (int t = 0; t < item->count; t += tokens) {
        const int position = step->positions[queries[t].token], last = position + tokens - 1;
        const int begin = first_block(layer, position) > common ? first_block(layer, position) : common;
        table = step->block_tables + step->table_starts[queries[t].entry];
        walk(&p, t, t + tokens, position, table, begin, last / BLOCK_TOKENS + 1, after);
    }
    end_rows(&p, queries, out, out_stride);
}
