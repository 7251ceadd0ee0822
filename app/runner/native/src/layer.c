/* The phases of a layer. Rows are shared out by row, linears by column, attention by the items of its plan. */
#include "phases.h"
#include "rows.h"

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
    for (int i = from; i < to; i++)
        attend(j->model, layer, j->step, &c->attention, i, c->qkv, qkv_stride(j->model), c->attended,
               attended_stride(j->model), c->scratch + thread);
}

#define MOST_DRAWING 64 /* rows: with more of them attention is a small part, and computes longer than it reads */

/* Thirds first .. last - 1 of the keys and values that the layer after `layer` reads; NULL: there is none. */
static const drawing *of_next_layer(const job *j, const hw_layer *layer, int first, int last, drawing *d) {
    const hw_model *m = j->model;
    const long bytes = m->block_stride / m->num_layers * (long)sizeof(uint16_t); /* K and V lie together */
    if (layer + 1 == m->layers + m->num_layers || j->step->num_tokens > MOST_DRAWING) return NULL;
    *d = (drawing){.base = (const char *)layer[1].k_cache, .blocks = j->ctx->attention.held, .region_lines = bytes / 64};
    d->stride = m->block_stride * (long)sizeof(uint16_t);
    d->from = j->ctx->attention.num_held * d->region_lines * first / 3;
    d->to = j->ctx->attention.num_held * d->region_lines * last / 3;
    return d;
}

int layer_count(const job *j, const hw_layer *layer, int phase) {
    const int tokens = j->step->num_tokens;
    switch (phase) {
        case QKV: return linear_units(&layer->qkv);
        case ATTEND: return j->ctx->attention.num_items;
        case QUANTISE_ATTENDED: return layer->output.byte_rows ? tokens : 0;
        case OUTPUT: return linear_units(&layer->output);
        case GATE_UP: return linear_units(&layer->gate_up);
        case QUANTISE_ACTIVATED: return layer->down.byte_rows ? tokens : 0;
        case DOWN: return linear_units(&layer->down);
        case JOIN_ATTENDED:
        case JOIN_MLP: return j->model->has_post_norms ? tokens : 0;
        default: return tokens;
    }
}

static const finish_kind activations[] = {FINISH_SILU_MUL, FINISH_GELU_MUL, FINISH_GELU};

void layer_run(const job *j, const hw_layer *layer, int phase, int from, int to, int thread) {
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
