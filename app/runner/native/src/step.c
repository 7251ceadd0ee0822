/* One step of the decoder: embedding, layers, head, in one region of the pool.
 *
 * Items are taken as threads come free: who computes a number never changes it. */
#include <stdlib.h>

#include "draw.h"
#include "phases.h"
#include "rows.h"
#include "vmath.h"

static void embed_rows(const job *j, int from, int to) {
    for (int t = from; t < to; t++)
        row_embed(j->model, j->step->token_ids[t], j->step->positions[t],
                  j->ctx->residual + (long)t * j->model->hidden_pad);
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
    if (context_reserve(c, model, step)) return -1;
    plan_attention(&c->attention, model, step, pool_threads(c->pool));
    job j = {c, model, step};
    const int phases = 1 + model->num_layers * LAYER_PHASES + HEAD_PHASES;
    return pool_run(c->pool, &(hw_region){phases, forward_count, forward_run, &j});
}

/* Logits of more tokens of the step that hw_forward computed last: the same step with other logits
 * fields, no more rows than num_tokens. */
int32_t hw_score(hw_context *c, const hw_model *model, const hw_step *step) {
    if (step->num_logits > step->num_tokens || context_reuse(c, model, step)) return -1;
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
