// Stands for ggml-metal-device.m and ggml-metal-context.m, the Objective-C part of ggml's Metal backend: buffers are host
// memory, kernels run on the CPU. All the rest of the backend is the real one.
//
// Stricter than a GPU: new buffers and threadgroup memory are filled with NaN, what is written behind a buffer is found,
// bindings do not outlive a dispatch, and dispatches that no barrier separates run in any order.

#include "fibers.h"
#include "launch.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-context.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-impl.h"
#include "ggml-metal-ops.h"

#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

static constexpr size_t GUARD = 4096;

// ---- faults and counters, read by the test

static int n_dispatch;
static int n_barrier;
static int max_shmem;

static void fail(const char * what) {
    if (!fibers::error) {
        fibers::error = what;
    }
}

extern "C" {

void metal_options(int order, uint64_t seed) {
    fibers::opt.order = order;
    fibers::opt.seed  = seed;
    n_dispatch = n_barrier = max_shmem = 0;
}

// the first mistake since the last call, or ""
const char * metal_error(void) {
    const char * last = fibers::error ? fibers::error : "";
    fibers::error = nullptr;
    return last;
}

int metal_n_dispatch(void) { return n_dispatch; }
int metal_n_barrier (void) { return n_barrier;  }
int metal_max_shmem (void) { return max_shmem;  }

}

// ---- kernels

struct ggml_metal_pipeline {
    const launch::kernel_entry * entry;
};

struct ggml_metal_library {
    ggml_metal_device_t    dev;
    ggml_metal_pipelines_t pipelines;
};

struct ggml_metal_device {
    ggml_metal_device_props  props;
    ggml_metal_library       lib;
    ggml_metal_fusion_info * finfo;
};

void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) { delete pipeline; }

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params pipeline) {
    GGML_UNUSED(pipeline);
    return 1024;
}

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    return { ggml_metal_pipelines_get(lib->pipelines, name), 0, 0, 0, 0, false, false };
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base, const char * name, ggml_metal_cv_t cv) {
    GGML_UNUSED(cv);
    const launch::kernel_entry * entry = launch::find(base);
    GGML_ASSERT(entry && "there is no such kernel");
    ggml_metal_pipelines_add(lib->pipelines, name, new ggml_metal_pipeline { entry });
    return ggml_metal_library_get_pipeline(lib, name);
}

struct ggml_metal_cv {};

ggml_metal_cv_t ggml_metal_cv_init(void)      { return new ggml_metal_cv; }
void ggml_metal_cv_free(ggml_metal_cv_t cv)   { delete cv; }
void ggml_metal_cv_set_int16(ggml_metal_cv_t, int16_t, int32_t) {}
void ggml_metal_cv_set_int32(ggml_metal_cv_t, int32_t, int32_t) {}
void ggml_metal_cv_set_bool (ggml_metal_cv_t, bool,    int32_t) {}

// ---- encoder

struct dispatch {
    const launch::kernel_entry * entry = nullptr;

    std::vector<char> bytes;
    launch::arguments args  = {};
    size_t            shmem = 0;
    int               grid[3];
    int               n_thread;
};

struct ggml_metal_encoder {
    bool                  concurrent;
    dispatch              next;
    std::vector<dispatch> pending;
};

static const dispatch * running;

static void run_dispatch(dispatch & d) {
    n_dispatch++;
    max_shmem = std::max<int>(max_shmem, d.shmem);

    if (d.n_thread > 1024 || d.n_thread % fibers::SIMD != 0 || d.shmem > 32*1024 || d.shmem % 16 != 0) {
        fail("a dispatch beyond the limits of a device");
        return;
    }

    // NaN in every type, with room to see what is written behind the end
    std::vector<char> shmem(d.shmem + GUARD);

    d.args.buffer[0] = d.bytes.data();
    d.args.shmem     = shmem.data();

    running = &d;
    launch::arguments & args = d.args;

    fibers::body = []() {
        launch::arguments cur = running->args;
        cur.thread_in_group = fibers::current->index;
        cur.thread_in_simd  = fibers::current->index % fibers::SIMD;
        cur.simd_in_group   = fibers::current->index / fibers::SIMD;
        running->entry->run(cur);
    };

    std::vector<int> order;
    fibers::arrange(order, d.grid[0]*d.grid[1]*d.grid[2]);
    for (int i : order) {
        args.group[0] = i % d.grid[0];
        args.group[1] = i / d.grid[0] % d.grid[1];
        args.group[2] = i / d.grid[0] / d.grid[1];

        memset(shmem.data(), 0xFF, shmem.size());
        if (!fibers::run_group(d.n_thread)) {
            return;
        }
        for (size_t j = d.shmem; j < shmem.size(); j++) {
            if (shmem[j] != (char) 0xFF) {
                fail("a write behind threadgroup memory");
                return;
            }
        }
    }
}

static void flush(ggml_metal_encoder_t enc) {
    fibers::rng = fibers::opt.seed;

#if defined(__SSE2__)
    const unsigned csr = _mm_getcsr();
    _mm_setcsr(csr | 0x8040); // a GPU flushes denormals to zero
#endif
    std::vector<int> order;
    fibers::arrange(order, enc->pending.size());
    for (int i : order) {
        if (!fibers::error) {
            run_dispatch(enc->pending[i]);
        }
    }
#if defined(__SSE2__)
    _mm_setcsr(csr);
#endif
    enc->pending.clear();
}

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t cmd_buf, bool concurrent) {
    GGML_UNUSED(cmd_buf);
    return new ggml_metal_encoder { concurrent, {}, {} };
}

void ggml_metal_encoder_free(ggml_metal_encoder_t enc)         { delete enc; }
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t enc) { flush(enc); }

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t enc) {
    n_barrier += !enc->pending.empty();
    flush(enc);
}

void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop (ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t enc, ggml_metal_pipeline_with_params pipeline) {
    enc->next.entry = pipeline.pipeline->entry;
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t enc, void * data, size_t size, int idx) {
    GGML_ASSERT(idx == 0);
    enc->next.bytes.assign((char *) data, (char *) data + size);
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t enc, ggml_metal_buffer_id buffer, int idx) {
    GGML_ASSERT(idx > 0 && idx < launch::N_BUFFER);
    enc->next.args.buffer[idx] = (char *) buffer.metal + buffer.offs;
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t enc, size_t size, int idx) {
    GGML_ASSERT(idx == 0);
    enc->next.shmem = size;
}

void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t enc, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    enc->next.grid[0]  = tg0;
    enc->next.grid[1]  = tg1;
    enc->next.grid[2]  = tg2;
    enc->next.n_thread = tptg0*tptg1*tptg2;
    enc->pending.push_back(std::move(enc->next));
    enc->next = {};
    if (!enc->concurrent) {
        flush(enc);
    }
}

// ---- buffers

struct ggml_metal_buffer {
    char * base;
    size_t size;
    bool   shared;
    bool   owned;
};

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t dev, size_t size, bool shared) {
    GGML_UNUSED(dev);
    void * base = nullptr;
    if (posix_memalign(&base, 4096, size + GUARD) != 0) {
        return nullptr;
    }
    memset(base, 0xFF, size + GUARD);
    return new ggml_metal_buffer { (char *) base, size, shared, true };
}

ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t, void * ptr, size_t size, size_t) {
    return new ggml_metal_buffer { (char *) ptr, size, true, false };
}

void ggml_metal_buffer_free(ggml_metal_buffer_t buf) {
    for (size_t i = 0; buf->owned && i < GUARD; i++) {
        if (buf->base[buf->size + i] != (char) 0xFF) {
            fail("a write behind a buffer");
        }
    }
    if (buf->owned) {
        free(buf->base);
    }
    delete buf;
}

void * ggml_metal_buffer_get_base (ggml_metal_buffer_t buf) { return buf->base; }
bool   ggml_metal_buffer_is_shared(ggml_metal_buffer_t buf) { return buf->shared; }

void ggml_metal_buffer_memset_tensor(ggml_metal_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    memset((char *) tensor->data + offset, value, size);
}

void ggml_metal_buffer_set_tensor(ggml_metal_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}

void ggml_metal_buffer_get_tensor(ggml_metal_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) tensor->data + offset, size);
}

bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t, const ggml_tensor *, ggml_tensor *) { return false; }

void ggml_metal_buffer_clear(ggml_metal_buffer_t buf, uint8_t value) { memset(buf->base, value, buf->size); }

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t buf, const ggml_tensor * t) {
    return { buf->base, (size_t) ((char *) t->data - buf->base) };
}

// ---- device

ggml_metal_device_t ggml_metal_device_init(int device, int n_devices) {
    GGML_UNUSED(n_devices);
    auto * dev = new ggml_metal_device {};

    snprintf(dev->props.name, sizeof(dev->props.name), "MTL%d", device);
    snprintf(dev->props.desc, sizeof(dev->props.desc), "Metal kernels on the CPU");
    dev->props.max_buffer_size            = (size_t) 1 << 34;
    dev->props.max_working_set_size       = (size_t) 1 << 34;
    dev->props.max_theadgroup_memory_size = 32*1024;
    dev->props.has_simdgroup_reduction    = true;
    dev->props.has_simdgroup_mm           = true;
    dev->props.has_unified_memory         = true;

    dev->lib   = { dev, ggml_metal_pipelines_init() };
    dev->finfo = ggml_metal_fusion_info_init(true, 0);

    return dev;
}

void ggml_metal_device_free(ggml_metal_device_t dev) {
    ggml_metal_pipelines_free(dev->lib.pipelines);
    ggml_metal_fusion_info_free(dev->finfo);
    delete dev;
}

ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t  dev) { return &dev->lib; }
ggml_metal_device_t  ggml_metal_library_get_device(ggml_metal_library_t lib) { return lib->dev;  }

const char * ggml_metal_device_id_token(ggml_metal_device_id) { return "cpu"; }

void ggml_metal_device_get_memory(ggml_metal_device_t dev, size_t * free, size_t * total) {
    *free = *total = dev->props.max_working_set_size;
}

const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) { return &dev->props; }

ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t dev) { return dev->finfo; }

static bool has_bfloat = true;

extern "C" void metal_set_has_bfloat(bool value) { has_bfloat = value; }

// the functions of ggml-metal-device.m
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wimplicit-fallthrough"
#define ggml_metal_device_supports_op device_supports_op
#include "supports_op.h"
#undef ggml_metal_device_supports_op
#pragma GCC diagnostic pop

// runs what has no kernel here, if it is set: buffers are host memory
static ggml_backend_t cpu = nullptr;

extern "C" void metal_set_cpu(ggml_backend_t backend) { cpu = backend; }

static bool has_kernel(const ggml_tensor * op) {
    return op->op == GGML_OP_LEVERAGE_SCORE || op->op == GGML_OP_LIGHTNING_INDEXER;
}

// of all that it takes, only a few kernels are here
bool ggml_metal_device_supports_op(ggml_metal_device_t dev, const ggml_tensor * op) {
    dev->props.has_bfloat = has_bfloat;
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_PERMUTE:
            return true;
        default:
            return has_kernel(op) ? device_supports_op(dev, op) : cpu && ggml_backend_supports_op(cpu, op);
    }
}

struct ggml_metal_event {};

ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t)       { return new ggml_metal_event; }
void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t ev) { delete ev; }
void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t) {}

// ---- context

struct ggml_metal {
    ggml_metal_device_t dev;
};

ggml_metal_t ggml_metal_init(ggml_metal_device_t dev) { return new ggml_metal { dev }; }
void         ggml_metal_free(ggml_metal_t ctx)        { delete ctx; }
const char * ggml_metal_get_name(ggml_metal_t ctx)    { return ctx->dev->props.name; }
void         ggml_metal_synchronize(ggml_metal_t)     {}

void ggml_metal_set_tensor_async(ggml_metal_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    memcpy((char *) tensor->data + offset, data, size);
}

void ggml_metal_get_tensor_async(ggml_metal_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) tensor->data + offset, size);
}

bool ggml_metal_cpy_tensor_async(ggml_metal_t, ggml_metal_t, const ggml_tensor *, ggml_tensor *) { return false; }

ggml_status ggml_metal_graph_compute(ggml_metal_t ctx, ggml_cgraph * gf) {
    for (int i0 = 0; i0 < gf->n_nodes;) {
        int i1 = i0 + 1;
        if (cpu && !has_kernel(gf->nodes[i0])) {
            ggml_cgraph node = ggml_graph_view(gf, i0, i1);
            ggml_backend_graph_compute(cpu, &node);
        } else {
            while (i1 < gf->n_nodes && (!cpu || ggml_op_is_empty(gf->nodes[i1]->op) || has_kernel(gf->nodes[i1]))) {
                i1++;
            }
            ggml_metal_op_t ops = ggml_metal_op_init(ctx->dev, nullptr, gf, ctx->dev->finfo, i0, i1, true, false, 0);
            for (int idx = 0; idx < ggml_metal_op_n_nodes(ops);) {
                idx += ggml_metal_op_encode(ops, idx);
            }
            ggml_metal_op_free(ops);
        }
        i0 = i1;
    }

    return !fibers::error ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
}

void ggml_metal_graph_optimize(ggml_metal_t, ggml_cgraph *) {}

void ggml_metal_event_record(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_event_wait  (ggml_metal_t, ggml_metal_event_t) {}

ggml_metal_event_t ggml_metal_get_ev_cpy(ggml_metal_t) { return nullptr; }

void ggml_metal_set_n_cb            (ggml_metal_t, int) {}
void ggml_metal_set_abort_callback  (ggml_metal_t, ggml_abort_callback, void *) {}
bool ggml_metal_supports_family     (ggml_metal_t, int) { return false; }
void ggml_metal_capture_next_compute(ggml_metal_t) {}
