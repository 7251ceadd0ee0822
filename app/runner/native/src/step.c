/* One step of the decoder: embedding, layers, head, in one region of the pool.
 *
 * Rows are shared out by row, linears by column, attention by (query block, kv head), as threads come
 * free: who computes a number never changes it. */
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "blocks.h"
#include "draw.h"
#include "pool.h"
#include "rows.h"
#include "vmath.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define GAP 256 /* no man's land behind each buffer, where ASan sees an overrun */
#define FORBID(p, bytes) ASAN_POISON_MEMORY_REGION(p, bytes)
#define ALLOW(p, bytes) ASAN_UNPOISON_MEMORY_REGION(p, bytes)
#else
#define GAP 0
#define FORBID(p, bytes) ((void)(p), (void)(bytes))
#define ALLOW(p, bytes) ((void)(p), (void)(bytes))
#endif

#define ALIGN 64
#define MOST_HELD 1024 /* blocks that are drawn in before their layer: beyond that caches hold no more */

struct hw_context {
    hw_pool *pool;
    char *memory;
    char *draw_memory; /* [thread] */
    size_t capacity, draw_capacity;
    /* carved out of memory for the running step */
    float *residual, *branch, *qkv, *scales; /* branch: what is normed before it joins the residual */
    uint16_t *x, *attended, *activated;
    uint8_t *bytes;
    block_scale *block_scales;
    query_block *queries;
    int32_t *held; /* blocks that the step reads, num_held of them */
    lane_best *best;              /* [thread][logits row] */
    attention_scratch *attention; /* [thread] */
    int num_queries, num_held;
};

typedef struct {
    hw_context *ctx;
    const hw_model *model;
    const hw_step *step;
} job;

/* ---- scratch ---- */

static long padded(long n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }
static long max2(long a, long b) { return a > b ? a : b; }
static long attended_stride(const hw_model *m) { return padded((long)m->num_heads * m->head_dim); }
static long qkv_stride(const hw_model *m) { return m->layers[0].qkv.n_pad; }
static long widest(const hw_model *m) { return max2(max2(m->hidden_pad, m->act_pad), attended_stride(m)); }

static void *carve(char **at, size_t bytes) {
    char *p = *at;
    *at += (bytes + ALIGN - 1) / ALIGN * ALIGN + GAP;
    if (GAP && (uintptr_t)p >= 4096) FORBID(p + bytes, (size_t)(*at - p) - bytes); /* below: sizes alone, from NULL */
    return p;
}

/* Lay out the buffers of a step from `base`; returns the bytes used. */
static size_t lay_out(hw_context *c, const hw_model *m, const hw_step *s, char *base) {
    char *at = base;
    if (base) ALLOW(base, c->capacity);
    const size_t tokens = (size_t)s->num_tokens, logits = (size_t)s->num_logits;
    const size_t threads = (size_t)pool_threads(c->pool), rows = tokens > logits ? tokens : logits;
    c->residual = carve(&at, tokens * (size_t)m->hidden_pad * sizeof(float)); /* first: hw_score reads it again */
    c->branch = carve(&at, m->has_post_norms ? tokens * (size_t)m->hidden_pad * sizeof(float) : 0);
    c->qkv = carve(&at, tokens * (size_t)qkv_stride(m) * sizeof(float));
    c->x = carve(&at, rows * (size_t)m->hidden_pad * 2);
    c->attended = carve(&at, tokens * (size_t)attended_stride(m) * 2);
    c->activated = carve(&at, tokens * (size_t)m->act_pad * 2);
    c->bytes = carve(&at, (size_t)m->byte_rows * rows * (size_t)widest(m));
    c->scales = carve(&at, rows * sizeof(float));
    c->block_scales = carve(&at, m->has_blocks ? rows * (size_t)(widest(m) / BLOCK_K) * sizeof(block_scale) : 0);
    c->queries = carve(&at, tokens * sizeof(query_block));
    c->held = carve(&at, MOST_HELD * sizeof(int32_t));
    c->best = carve(&at, threads * rows * sizeof(lane_best));
    c->attention = carve(&at, threads * sizeof(attention_scratch));
    return (size_t)(at - base);
}

static int reserve(hw_context *c, size_t bytes) {
    if (bytes <= c->capacity) return 0;
    free(c->memory);
    c->capacity = 0;
    size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    c->memory = aligned_alloc(4096, size);
    if (!c->memory) return -1;
    memset(c->memory, 0, size);
    c->capacity = size;
    return 0;
}

/* Tokens of one sequence that share a pass over its keys. */
static void plan_queries(hw_context *c, const hw_model *m, const hw_step *s) {
    const int most = query_tokens(m);
    c->num_queries = 0;
    for (int e = 0; e < s->num_entries; e++)
        for (int t = s->entry_starts[e]; t < s->entry_starts[e + 1]; t += most) {
            int left = s->entry_starts[e + 1] - t;
            c->queries[c->num_queries++] = (query_block){e, t, left < most ? left : most};
        }
}

/* The blocks of all sequences: their keys and values are drawn in while the layer before multiplies. */
static void plan_drawing(hw_context *c, const hw_step *s) {
    c->num_held = 0;
    for (int e = 0; e < s->num_entries; e++) {
        const int last = s->positions[s->entry_starts[e + 1] - 1] / BLOCK_TOKENS;
        for (int b = 0; b <= last && c->num_held < MOST_HELD; b++)
            c->held[c->num_held++] = s->block_tables[s->table_starts[e] + b];
    }
}

/* ---- what is done to some of the items of a phase ---- */

/* Inputs of a linear as bytes. */
static void quantise_rows(const job *j, const hw_linear *lin, const uint16_t *x, long stride, int from, int to) {
    const long width = widest(j->model);
    for (int r = from; r < to; r++) {
        uint8_t *bytes = j->ctx->bytes + r * lin->byte_rows * width;
        if (lin->blocks)
            row_quantise_blocks(x + r * stride, lin->k, (int8_t *)bytes, j->ctx->block_scales + r * (width / BLOCK_K));
        else if (lin->byte_rows == 1) row_quantise(x + r * stride, lin->k, bytes, j->ctx->scales + r);
        else row_quantise_wide(x + r * stride, lin->k, bytes, bytes + width, j->ctx->scales + r);
    }
}

static void embed_rows(const job *j, int from, int to) {
    for (int t = from; t < to; t++)
        row_embed(j->model, j->step->token_ids[t], j->step->positions[t],
                  j->ctx->residual + (long)t * j->model->hidden_pad);
}

/* Norm, then the inputs of the linear `next`. */
static void norm_rows(const job *j, const float *weight, const float *bias, const hw_linear *next, int from, int to) {
    const long stride = j->model->hidden_pad;
    for (int t = from; t < to; t++)
        row_norm(j->model, j->ctx->residual + t * stride, weight, bias, j->ctx->x + t * stride);
    if (next->byte_rows) quantise_rows(j, next, j->ctx->x, stride, from, to);
}

/* What a branch gives, normed, into the residual. */
static void join_rows(const job *j, const float *weight, int from, int to) {
    const long stride = j->model->hidden_pad;
    for (int t = from; t < to; t++)
        row_add_norm(j->model, j->ctx->branch + t * stride, weight, j->ctx->residual + t * stride);
}

static void rotate_and_store(const job *j, const hw_layer *layer, int from, int to) {
    const long stride = qkv_stride(j->model);
    const hw_step *s = j->step;
    for (int t = from, e = 0; t < to; t++) {
        while (s->entry_starts[e + 1] <= t) e++;
        float *qkv = j->ctx->qkv + t * stride;
        row_rotate(j->model, layer, s->positions[t], qkv);
        cache_write(j->model, layer, qkv, stride, s->positions[t], s->block_tables + s->table_starts[e],
                    t > s->entry_starts[e], t + 1 < s->entry_starts[e + 1]);
    }
}

static void attend_items(const job *j, const hw_layer *layer, int from, int to, int thread) {
    const hw_context *c = j->ctx;
    const hw_model *m = j->model;
    const hw_step *s = j->step;
    const int heads = m->num_kv_heads, items = c->num_queries * heads;
    for (int i = from; i < to; i++) {
        int next = i + 1 < items ? i + 1 : i; /* the likely one: a thread's share lies together */
        int32_t next_block = s->block_tables[s->table_starts[c->queries[next / heads].entry]];
        attend(m, layer, s, c->queries + i / heads, i % heads, next_block, next % heads, c->qkv, qkv_stride(m),
               c->attended, attended_stride(m), c->attention + thread);
    }
}

/* x times some columns of a linear into `done`; where its inputs are bytes, they are there. */
static void project(const job *j, const hw_linear *lin, const uint16_t *x, long stride, int rows, const finish *done,
                    const drawing *beside, int from, int to) {
    linear_in in = {.bf16 = x, .stride = stride};
    if (lin->byte_rows)
        in = (linear_in){.bytes = j->ctx->bytes, .scales = j->ctx->scales, .blocks = j->ctx->block_scales,
                         .stride = widest(j->model)};
    linear_run(lin, &in, rows, done, beside, from, to);
}

/* ---- phases ---- */

enum {
    ATTENTION_NORM, QKV, ROTATE, ATTEND, QUANTISE_ATTENDED, OUTPUT, JOIN_ATTENDED, MLP_NORM, GATE_UP,
    QUANTISE_ACTIVATED, DOWN, JOIN_MLP, LAYER_PHASES
};
enum { HEAD_NORM, HEAD, SETTLE, HEAD_PHASES };

#define MOST_DRAWING 64 /* rows: with more of them attention is a small part, and computes longer than it reads */

/* Thirds first .. last - 1 of the keys and values that the layer after `layer` reads; NULL: there is none. */
static const drawing *of_next_layer(const job *j, const hw_layer *layer, int first, int last, drawing *d) {
    const hw_model *m = j->model;
    const long bytes = m->block_stride / m->num_layers * (long)sizeof(uint16_t); /* K and V lie together */
    if (layer + 1 == m->layers + m->num_layers || j->step->num_tokens > MOST_DRAWING) return NULL;
    *d = (drawing){.base = (const char *)layer[1].k_cache, .blocks = j->ctx->held, .region_lines = bytes / 64};
    d->stride = m->block_stride * (long)sizeof(uint16_t);
    d->from = j->ctx->num_held * d->region_lines * first / 3;
    d->to = j->ctx->num_held * d->region_lines * last / 3;
    return d;
}

static int units(const hw_linear *lin) { return lin->n_pad / UNIT; }

static int layer_count(const job *j, const hw_layer *layer, int phase) {
    const int tokens = j->step->num_tokens;
    switch (phase) {
        case QKV: return units(&layer->qkv);
        case ATTEND: return j->ctx->num_queries * j->model->num_kv_heads;
        case QUANTISE_ATTENDED: return layer->output.byte_rows ? tokens : 0;
        case OUTPUT: return units(&layer->output);
        case GATE_UP: return units(&layer->gate_up);
        case QUANTISE_ACTIVATED: return layer->down.byte_rows ? tokens : 0;
        case DOWN: return units(&layer->down);
        case JOIN_ATTENDED:
        case JOIN_MLP: return j->model->has_post_norms ? tokens : 0;
        default: return tokens;
    }
}

static const finish_kind activations[] = {FINISH_SILU_MUL, FINISH_GELU_MUL, FINISH_GELU};

static void layer_run(const job *j, const hw_layer *layer, int phase, int from, int to, int thread) {
    hw_context *c = j->ctx;
    const hw_model *m = j->model;
    const int rows = j->step->num_tokens;
    const finish to_qkv = {.kind = FINISH_STORE, .out = c->qkv, .stride = qkv_stride(m)};
    const finish to_residual = {.kind = m->has_post_norms ? FINISH_STORE : FINISH_ADD,
                                .out = m->has_post_norms ? c->branch : c->residual, .stride = m->hidden_pad};
    const finish to_activated = {.kind = activations[m->activation], .out16 = c->activated, .stride = m->act_pad};
    drawing d;
    switch (phase) {
        case ATTENTION_NORM: norm_rows(j, layer->attention_norm, layer->attention_norm_bias, &layer->qkv, from, to); break;
        case QKV: project(j, &layer->qkv, c->x, m->hidden_pad, rows, &to_qkv, NULL, from, to); break;
        case ROTATE: rotate_and_store(j, layer, from, to); break;
        case ATTEND: attend_items(j, layer, from, to, thread); break;
        case QUANTISE_ATTENDED: quantise_rows(j, &layer->output, c->attended, attended_stride(m), from, to); break;
        case OUTPUT:
            project(j, &layer->output, c->attended, attended_stride(m), rows, &to_residual, NULL, from, to);
            break;
        case JOIN_ATTENDED: join_rows(j, layer->post_attention_norm, from, to); break;
        case MLP_NORM: norm_rows(j, layer->mlp_norm, layer->mlp_norm_bias, &layer->gate_up, from, to); break;
        case GATE_UP:
            project(j, &layer->gate_up, c->x, m->hidden_pad, rows, &to_activated, of_next_layer(j, layer, 0, 2, &d), from, to);
            break;
        case QUANTISE_ACTIVATED: quantise_rows(j, &layer->down, c->activated, m->act_pad, from, to); break;
        case DOWN:
            project(j, &layer->down, c->activated, m->act_pad, rows, &to_residual, of_next_layer(j, layer, 2, 3, &d), from, to);
            break;
        case JOIN_MLP: join_rows(j, layer->post_mlp_norm, from, to); break;
    }
}

/* Norm the rows that want logits, and clear what each thread knows of their best. */
static void head_rows(const job *j, int from, int to) {
    hw_context *c = j->ctx;
    const hw_model *m = j->model;
    const long stride = m->hidden_pad;
    for (int r = from; r < to; r++)
        row_norm(m, c->residual + j->step->logits_tokens[r] * stride, m->final_norm, m->final_norm_bias, c->x + r * stride);
    if (m->head.byte_rows) quantise_rows(j, &m->head, c->x, stride, from, to);
    for (int t = 0; t < pool_threads(c->pool); t++) best_reset(c->best + (long)t * j->step->num_logits + from, to - from);
}

/* The best of all lanes and threads: the largest value, the lowest id of equals. */
static void settle_best(const job *j, int row) {
    const hw_step *s = j->step;
    float value = 0.0f, taint = 0.0f;
    int32_t id = -1;
    for (int t = 0; t < pool_threads(j->ctx->pool); t++) {
        const lane_best *b = j->ctx->best + (long)t * s->num_logits + row;
        for (int i = 0; i < VL; i++) {
            int32_t lane_id = b->id[i] + i;
            taint += b->taint[i];
            if (id < 0 || b->value[i] > value || (b->value[i] == value && lane_id < id)) value = b->value[i], id = lane_id;
        }
    }
    s->best_ids[row] = id;
    s->is_finite[row] = taint == 0.0f;
}

static int head_count(const job *j, int phase) {
    return phase == HEAD && j->step->num_logits > 0 ? units(&j->model->head) : j->step->num_logits;
}

static void head_run(const job *j, int phase, int from, int to, int thread) {
    hw_context *c = j->ctx;
    const hw_model *m = j->model;
    const hw_step *s = j->step;
    const finish to_logits = {.kind = FINISH_LOGITS, .out = s->logits, .stride = m->head.n_pad, .slots = s->logits_slots,
                              .best = c->best + (long)thread * s->num_logits, .columns = m->vocab, .cap = m->logit_cap};
    switch (phase) {
        case HEAD_NORM: head_rows(j, from, to); break;
        case HEAD: project(j, &m->head, c->x, m->hidden_pad, s->num_logits, &to_logits, NULL, from, to); break;
        case SETTLE: for (int r = from; r < to; r++) settle_best(j, r); break;
    }
}

/* A step: the embedding, then each layer's phases, then the head's. */

static int forward_count(const void *arg, int phase) {
    const job *j = arg;
    const int layer = (phase - 1) / LAYER_PHASES, layers = j->model->num_layers;
    if (phase == 0) return j->step->num_tokens;
    if (layer >= layers) return head_count(j, phase - 1 - layers * LAYER_PHASES);
    return layer_count(j, j->model->layers + layer, (phase - 1) % LAYER_PHASES);
}

static void forward_run(const void *arg, int phase, int from, int to, int thread) {
    const job *j = arg;
    const int layer = (phase - 1) / LAYER_PHASES, layers = j->model->num_layers;
    if (phase == 0) embed_rows(j, from, to);
    else if (layer >= layers) head_run(j, phase - 1 - layers * LAYER_PHASES, from, to, thread);
    else layer_run(j, j->model->layers + layer, (phase - 1) % LAYER_PHASES, from, to, thread);
}

static int score_count(const void *arg, int phase) { return head_count(arg, phase); }

static void score_run(const void *arg, int phase, int from, int to, int thread) { head_run(arg, phase, from, to, thread); }

/* ---- for Python ---- */

hw_context *hw_open(int32_t num_threads) {
    hw_context *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    c->pool = pool_open(num_threads);
    if (c->pool) return c;
    free(c);
    return NULL;
}

void hw_close(hw_context *c) {
    pool_close(c->pool);
    free(c->memory);
    free(c->draw_memory);
    free(c);
}

/* Compute a step. Returns the number of threads that ran, or -1 where memory is short. */
int32_t hw_forward(hw_context *c, const hw_model *model, const hw_step *step) {
    if (reserve(c, lay_out(c, model, step, NULL))) return -1;
    lay_out(c, model, step, c->memory);
    plan_queries(c, model, step);
    plan_drawing(c, step);
    job j = {c, model, step};
    const int phases = 1 + model->num_layers * LAYER_PHASES + HEAD_PHASES;
    return pool_run(c->pool, &(hw_region){phases, forward_count, forward_run, &j});
}

/* Logits of more tokens of the step that hw_forward computed last: the same step with other logits
 * fields, no more rows than num_tokens. */
int32_t hw_score(hw_context *c, const hw_model *model, const hw_step *step) {
    if (step->num_logits > step->num_tokens || lay_out(c, model, step, NULL) > c->capacity) return -1;
    lay_out(c, model, step, c->memory);
    job j = {c, model, step};
    return pool_run(c->pool, &(hw_region){HEAD_PHASES, score_count, score_run, &j});
}

typedef struct {
    hw_context *ctx;
    hw_row *const *rows;
    int32_t vocab, num_rows;
} draw_job;

static int draw_count(const void *arg, int phase) {
    (void)phase;
    return ((const draw_job *)arg)->num_rows;
}

static void draw_run(const void *arg, int phase, int from, int to, int thread) {
    (void)phase;
    const draw_job *j = arg;
    char *memory = j->ctx->draw_memory + (size_t)thread * draw_scratch(j->vocab);
    for (int r = from; r < to; r++) draw_row(j->rows[r], j->vocab, memory);
}

/* Draw for all rows. Returns the number of threads that ran, or -1 where memory is short or the vocabulary is beyond
 * DRAW_VOCAB. */
int32_t hw_draw(hw_context *c, int32_t vocab, int32_t num_rows, hw_row *const *rows) {
    const size_t bytes = (size_t)pool_threads(c->pool) * draw_scratch(vocab);
    if (vocab > DRAW_VOCAB) return -1;
    if (bytes > c->draw_capacity) { /* pages that no draw touches take no memory */
        free(c->draw_memory);
        c->draw_memory = aligned_alloc(ALIGN, bytes);
        c->draw_capacity = c->draw_memory ? bytes : 0;
        if (!c->draw_memory) return -1;
    }
    const draw_job j = {c, rows, vocab, num_rows};
    return pool_run(c->pool, &(hw_region){1, draw_count, draw_run, &j});
}

/* What `count` scores weigh, for tests: a multiple of 16 of them. */
void hw_weights(const float *scores, int64_t count, float *weights) {
    for (int64_t i = 0; i < count; i += VL) v_store(weights + i, v_weight(v_load(scores + i)));
}

/* ---- single kernels, for loadtest/bench_kernels.py ---- */

typedef struct {
    const hw_layer *layers;
    int32_t which, rows; /* which: 0 qkv, 1 output, 2 gate and up, 3 down */
    linear_in in;
    float *out;
} linear_job;

static int linears_count(const void *arg, int phase) {
    const linear_job *j = arg;
    return units(&j->layers[phase].qkv + j->which);
}

static void linears_run(const void *arg, int phase, int from, int to, int thread) {
    (void)thread;
    const linear_job *j = arg;
    const hw_linear *lin = &j->layers[phase].qkv + j->which;
    finish done = {.kind = j->which == 0 ? FINISH_STORE : FINISH_ADD, .out = j->out, .stride = lin->n_pad};
    if (j->which == 2) done = (finish){.kind = FINISH_SILU_MUL, .out16 = (uint16_t *)j->out, .stride = lin->n_pad / 2};
    linear_run(lin, &j->in, j->rows, &done, NULL, from, to);
}

/* One linear of every layer, one after the other, each finished as a step finishes it. x: bf16, or bytes
 * with scales for int8, with block_scales for blocks; [rows][k]. */
void hw_run_linears(hw_context *c, const hw_layer *layers, int32_t num_layers, int32_t which, int32_t rows,
                    const void *x, const void *scales, float *out) {
    const long k = (&layers->qkv + which)->k;
    linear_job j = {layers, which, rows, {.bf16 = x, .bytes = x, .scales = scales, .blocks = scales, .stride = k}, out};
    pool_run(c->pool, &(hw_region){num_layers, linears_count, linears_run, &j});
}

static int attention_count(const void *arg, int phase) {
    const job *j = arg;
    return layer_count(j, j->model->layers + phase, ATTEND);
}

static void attention_run(const void *arg, int phase, int from, int to, int thread) {
    const job *j = arg;
    attend_items(j, j->model->layers + phase, from, to, thread);
}

/* The attention of every layer for a step that hw_forward computed last. */
void hw_run_attention(hw_context *c, const hw_model *model, const hw_step *step) {
    plan_queries(c, model, step);
    job j = {c, model, step};
    pool_run(c->pool, &(hw_region){model->num_layers, attention_count, attention_run, &j});
}

#ifdef HW_PROFILE
/* From now on add the calling thread's CPU time in each phase of hw_forward to `ns`: embedding, LAYER_PHASES a layer, HEAD_PHASES. */
void hw_profile(hw_context *c, const hw_model *model, uint64_t *ns) {
    pool_profile(c->pool, 1 + model->num_layers * LAYER_PHASES + HEAD_PHASES, ns);
}
#endif

/* Sizes of the structs, for Python to compare with its own. */
void hw_sizes(int32_t *out) {
    out[0] = sizeof(hw_linear);
    out[1] = sizeof(hw_layer);
    out[2] = sizeof(hw_model);
    out[3] = sizeof(hw_step);
    out[4] = sizeof(hw_row);
}
