// The CUDA kernel behind a C function.
#include "leverage-score.cu"

#include <map>
#include <memory>

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

size_t ggml_nbytes(const ggml_tensor * t) {
    if (ggml_is_empty(t)) {
        return 0;
    }
    const int64_t n_elements = t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_BF16 ? 1 : 32;

    size_t n = t->ne[0]/n_elements*t->nb[0];
    for (int i = 1; i < GGML_MAX_DIMS; i++) {
        n += (t->ne[i] - 1)*t->nb[i];
    }
    return n;
}

bool ggml_is_empty(const ggml_tensor * t) {
    return t->ne[0] == 0 || t->ne[1] == 0 || t->ne[2] == 0 || t->ne[3] == 0;
}

void ggml_abort(const char * file, int line, const char * fmt, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, fmt);
    abort();
}

extern "C" {

struct simt_options {
    int32_t  order, warp, align_end;
    int32_t  fused; // whether ops may share launches
    uint64_t seed;
};

struct simt_node {
    const char * op; // leverage_score, or another one, which does nothing
    int32_t is_computed;
    int32_t type, d, n_head_kv, n_kv, n_head; // n_head 0: no weights
    int32_t w_of;                             // the node whose result are the weights, or -1
    int32_t over;                             // the node whose weights the result overwrites, or -1
    float   scale, lambda;
    int64_t nb1, nb2;                         // strides of u in bytes

    const void  * u; // n_u bytes from the first of the view
    size_t        n_u;
    const float * w;
    float       * dst; // [n_head_kv][n_kv]
};

static ggml_op find_op(const char * name) {
    static const std::map<std::string, ggml_op> ops = {
        { "leverage_score", GGML_OP_LEVERAGE_SCORE },
        { "view",           GGML_OP_VIEW           },
        { "reshape",        GGML_OP_RESHAPE        },
        { "permute",        GGML_OP_PERMUTE        },
        { "transpose",      GGML_OP_TRANSPOSE      },
        { "none",           GGML_OP_NONE           },
        { "concat",         GGML_OP_CONCAT         },
    };
    return ops.at(name);
}

// Computes nodes as ggml-cuda.cu does. Returns the error, or NULL.
const char * simt_graph(const simt_options * o, const simt_node * nodes, int n, int * n_launches) {
    simt::error.clear();
    simt::n_launches    = 0;
    simt::opt.order     = o->order;
    simt::opt.seed      = o->seed;
    simt::opt.warp      = o->warp;
    simt::opt.align_end = o->align_end;

    std::vector<std::unique_ptr<simt::memory>> u_mem(n), w_mem(n), dst_mem(n);

    std::vector<ggml_tensor>   tensors(3*n);
    std::vector<ggml_tensor *> graph(n);

    for (int i = 0; i < n; i++) {
        const simt_node & c = nodes[i];

        const bool is_overwritten = std::any_of(nodes + i, nodes + n, [&](const simt_node & other) { return other.over == i; });

        u_mem[i] = std::make_unique<simt::memory>(c.u, c.n_u);
        w_mem[i] = std::make_unique<simt::memory>(c.w, c.w ? (size_t) c.n_head*c.n_kv*sizeof(float) : 0, is_overwritten);
        dst_mem[i] = std::make_unique<simt::memory>((size_t) c.n_head_kv*c.n_kv*sizeof(float));

        ggml_tensor & u   = tensors[3*i + 0];
        ggml_tensor & w   = tensors[3*i + 1];
        ggml_tensor & dst = tensors[3*i + 2];

        u.type  = (ggml_type) c.type;
        u.data  = u_mem[i]->data;
        u.ne[0] = c.d;
        u.ne[1] = c.n_head_kv;
        u.ne[2] = c.n_kv;
        u.ne[3] = 1;
        u.nb[0] = ggml_type_size(u.type);
        u.nb[1] = c.nb1;
        u.nb[2] = c.nb2;

        w.type  = GGML_TYPE_F32;
        w.data  = c.w_of < 0 ? w_mem[i]->data : dst_mem[c.w_of]->data;
        w.ne[0] = c.n_kv;
        w.ne[1] = c.n_head;
        w.ne[2] = 1;
        w.ne[3] = 1;
        w.nb[0] = sizeof(float);
        w.nb[1] = sizeof(float)*c.n_kv;

        dst.type   = GGML_TYPE_F32;
        dst.op     = find_op(c.op);
        dst.flags  = c.is_computed ? GGML_TENSOR_FLAG_COMPUTE : 0;
        dst.data   = c.over < 0 ? dst_mem[i]->data : w_mem[c.over]->data;
        dst.ne[0]  = c.n_kv;
        dst.ne[1]  = c.n_head_kv;
        dst.ne[2]  = 1;
        dst.ne[3]  = 1;
        dst.nb[0]  = sizeof(float);
        dst.nb[1]  = sizeof(float)*c.n_kv;
        dst.src[0] = &u;
        dst.src[1] = c.n_head > 0 ? &w : nullptr;
        memcpy(&dst.op_params[0], &c.scale,  sizeof(float));
        memcpy(&dst.op_params[1], &c.lambda, sizeof(float));

        graph[i] = &dst;

        if (dst.op == GGML_OP_LEVERAGE_SCORE && !ggml_cuda_leverage_score_supported(0, &dst)) {
            return "not supported";
        }
    }

    ggml_backend_cuda_context ctx;

    for (int i = 0; i < n; i++) {
        if (graph[i]->op != GGML_OP_LEVERAGE_SCORE || ggml_is_empty(graph[i]) || !nodes[i].is_computed) {
            continue;
        }
        if (o->fused) {
            const int n_skip = ggml_cuda_leverage_score_fused(ctx, graph.data() + i, n - i);
            if (n_skip != 0) {
                i += n_skip;
                continue;
            }
        }
        ggml_cuda_leverage_score(ctx, graph[i]);
    }

    for (int i = 0; i < n; i++) {
        memcpy(nodes[i].dst, graph[i]->data, (size_t) nodes[i].n_head_kv*nodes[i].n_kv*sizeof(float));
    }
    *n_launches = simt::n_launches;
    return simt::error.empty() ? nullptr : simt::error.c_str();
}

} // extern "C"
