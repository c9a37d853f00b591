// The CUDA kernel behind a C function.
#include "leverage-score.cu"

// of libggml-base
size_t ggml_type_size(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:    return sizeof(float);
        case GGML_TYPE_F16:    return sizeof(half);
        case GGML_TYPE_BF16:   return sizeof(nv_bfloat16);
        case GGML_TYPE_Q8_0:   return sizeof(block_q8_0);
        case GGML_TYPE_Q5_1:   return sizeof(block_q5_1);
        case GGML_TYPE_Q5_0:   return sizeof(block_q5_0);
        case GGML_TYPE_Q4_1:   return sizeof(block_q4_1);
        case GGML_TYPE_Q4_0:   return sizeof(block_q4_0);
        case GGML_TYPE_IQ4_NL: return sizeof(block_iq4_nl);
        default:               return 0;
    }
}

void ggml_abort(const char * file, int line, const char * fmt, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, fmt);
    abort();
}

extern "C" {

struct simt_call {
    int32_t type;
    int32_t d, n_head_kv, n_kv, n_head; // n_head 0: no weights
    int64_t nb1, nb2;                   // strides of u in bytes
    float   scale, lambda;
    int32_t order, warp, align_end;
    uint64_t seed;
};

// u: n_u bytes of cache, the view begins at offset; dst: [n_head_kv][n_kv]. Returns the error, or NULL.
const char * simt_leverage_score(const simt_call * c, const void * u, size_t n_u, size_t offset, const float * w, float * dst) {
    simt::error.clear();
    simt::opt.order     = c->order;
    simt::opt.seed      = c->seed;
    simt::opt.warp      = c->warp;
    simt::opt.align_end = c->align_end;

    const size_t n_dst = (size_t) c->n_head_kv*c->n_kv*sizeof(float);

    simt::memory u_mem(u, n_u);
    simt::memory w_mem(w ? (const void *) w : u, w ? (size_t) c->n_head*c->n_kv*sizeof(float) : 0);
    simt::memory dst_mem(n_dst);

    ggml_tensor tu = {}, tw = {}, td = {};

    tu.type  = (ggml_type) c->type;
    tu.data  = u_mem.data + offset;
    tu.ne[0] = c->d;
    tu.ne[1] = c->n_head_kv;
    tu.ne[2] = c->n_kv;
    tu.ne[3] = 1;
    tu.nb[0] = ggml_type_size(tu.type);
    tu.nb[1] = c->nb1;
    tu.nb[2] = c->nb2;

    tw.type  = GGML_TYPE_F32;
    tw.data  = w_mem.data;
    tw.ne[0] = c->n_kv;
    tw.ne[1] = c->n_head;
    tw.nb[0] = sizeof(float);
    tw.nb[1] = sizeof(float)*c->n_kv;

    td.type   = GGML_TYPE_F32;
    td.data   = dst_mem.data;
    td.ne[0]  = c->n_kv;
    td.ne[1]  = c->n_head_kv;
    td.nb[0]  = sizeof(float);
    td.nb[1]  = sizeof(float)*c->n_kv;
    td.src[0] = &tu;
    td.src[1] = w ? &tw : nullptr;
    memcpy(&td.op_params[0], &c->scale,  sizeof(float));
    memcpy(&td.op_params[1], &c->lambda, sizeof(float));

    if (!ggml_cuda_leverage_score_supported(0, &td)) {
        return "not supported";
    }

    ggml_backend_cuda_context ctx;
    ggml_cuda_leverage_score(ctx, &td);

    memcpy(dst, dst_mem.data, n_dst);
    return simt::error.empty() ? nullptr : simt::error.c_str();
}

} // extern "C"
