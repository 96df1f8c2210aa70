#include "repack.h"

#include <cstring>

namespace moe {

ggml_backend_buffer_type_t repack_type() {
    static const ggml_backend_buffer_type_t found = []() -> ggml_backend_buffer_type_t {
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(cpu);
        const auto list = (ggml_backend_dev_get_extra_bufts_t)ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts");
        // By name, not the first: on a CPU that advertises AMX that one comes first, and stock
        // llama.cpp crashes in it.
        for (ggml_backend_buffer_type_t * b = list ? list(cpu) : nullptr; b && *b; b++) {
            if (strcmp(ggml_backend_buft_name(*b), "CPU_REPACK") == 0) {
                return *b;
            }
        }
        return nullptr;
    }();
    return found;
}

// ggml-cpu decides in init_tensor and looks at nothing but the tensor: any buffer of the type will do.
static void * init(ggml_tensor & t) {
    static const ggml_backend_buffer_t any = repack_type() ? ggml_backend_buft_alloc_buffer(repack_type(), 64) : nullptr;
    if (any == nullptr) {
        return nullptr;
    }
    t.buffer = any;
    any->iface.init_tensor(any, &t);
    return t.extra;
}

static ggml_tensor matrix(enum ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor t{};
    t.type  = type;
    t.ne[0] = ne0;
    t.ne[1] = ne1;
    t.ne[2] = t.ne[3] = 1;
    t.nb[0]           = ggml_type_size(type);
    t.nb[1]           = ggml_row_size(type, ne0);
    t.nb[2] = t.nb[3] = t.nb[1] * ne1;
    return t;
}

void * repack_traits(enum ggml_type type, int64_t ne0, int64_t ne1) {
    ggml_tensor t = matrix(type, ne0, ne1);
    return init(t);
}

static const ggml_backend_buffer_i borrowed_iface = {
    /* .free_buffer   = */ nullptr,
    /* .get_base      = */ [](ggml_backend_buffer_t buffer) { return buffer->context; },
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ nullptr,
    /* .set_tensor    = */ nullptr,
    /* .get_tensor    = */ nullptr,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ nullptr,
    /* .reset         = */ nullptr,
};

ggml_backend_buffer_t repack_buffer_over(void * memory, size_t n_bytes) {
    return ggml_backend_buffer_init(repack_type(), borrowed_iface, memory, n_bytes);
}

void repack(enum ggml_type type, int64_t ne0, int64_t ne1, int64_t n_rows, const void * plain, void * out) {
    ggml_tensor whole = matrix(type, ne0, ne1);  // its number of rows decides the layout
    init(whole);
    ggml_tensor t = matrix(type, ne0, n_rows);
    t.buffer      = whole.buffer;
    t.extra       = whole.extra;
    t.data        = out;
    t.buffer->iface.set_tensor(t.buffer, &t, plain, 0, ggml_nbytes(&t));
}

void unpack(const moe_transform & how, int64_t n_blocks, int64_t n_rows, uint8_t * matrix, uint8_t * scratch) {
    const int64_t group = (int64_t)how.rows * how.block_bytes, row = n_blocks * how.block_bytes;
    memcpy(scratch, matrix, n_rows * row);
    for (int64_t r = 0; r < n_rows; r += how.rows) {
        for (int64_t b = 0; b < n_blocks; b++) {
            const uint8_t * from   = scratch + r * row + b * group;
            const int32_t * source = how.source;
            for (int64_t i = 0; i < group; i++) {
                uint8_t byte = how.flip[i];
                for (int bit = 0; bit < 8; bit++, source++) {
                    byte ^= ((from[*source >> 3] >> (*source & 7)) & 1) << bit;
                }
                matrix[(r + i / how.block_bytes) * row + b * how.block_bytes + i % how.block_bytes] = byte;
            }
        }
    }
}

}  // namespace moe

int32_t moe_repack_supported(int32_t type, int64_t ne0, int64_t ne1) {
    return moe::repack_traits((enum ggml_type)type, ne0, ne1) != nullptr;
}

void moe_repack(int32_t type, int64_t ne0, int64_t ne1, int64_t n_rows, const uint8_t * plain, uint8_t * repacked) {
    moe::repack((enum ggml_type)type, ne0, ne1, n_rows, plain, repacked);
}
