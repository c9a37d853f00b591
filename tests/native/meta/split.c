// Says how the meta backend shares tensors out: the one callback that ctypes cannot be, since it returns a struct.
#include <stdint.h>
#include <string.h>

enum { N_DEVICES_MAX = 16, N_SEGMENTS_MAX = 16, MIRRORED = 10 };

// ggml_backend_meta_split_state of ggml-backend.h
struct split_state {
    int      axis;
    int64_t  ne[N_SEGMENTS_MAX*N_DEVICES_MAX];
    uint32_t nr[N_SEGMENTS_MAX];
    uint32_t n_segments;
};

// KV heads of each of two devices, all on both if the first has none; query heads of a KV head
struct shares {
    int64_t n_head_kv[2];
    int64_t n_group;
};

const char * ggml_get_name(const void * tensor);

struct split_state split(const void * tensor, void * userdata) {
    const struct shares * shares = userdata;
    struct split_state    state;

    memset(&state, 0, sizeof(state));
    state.axis       = MIRRORED;
    state.nr[0]      = 1;
    state.n_segments = 1;

    if (shares->n_head_kv[0] > 0) {
        const int64_t n = strcmp(ggml_get_name(tensor), "w") == 0 ? shares->n_group : 1;

        state.axis = 1; // heads, in u [d, n_head_kv, n_kv] as in w [n_kv, n_head]
        for (int i = 0; i < 2; ++i) {
            state.ne[i] = n*shares->n_head_kv[i];
        }
    }

    return state;
}
