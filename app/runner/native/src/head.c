/* From the last layer to logits and the best id of each row. */
#include "phases.h"
#include "rows.h"

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

int head_count(const job *j, int phase) {
    return phase == HEAD && j->step->num_logits > 0 ? linear_units(&j->model->head) : j->step->num_logits;
}

void head_run(const job *j, int phase, int from, int to, int thread) {
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
