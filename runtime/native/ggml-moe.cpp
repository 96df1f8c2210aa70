// The ggml backend: buffer, backend, device and registry tables in ggml's own order. Everything that
// thinks is elsewhere: executor.cpp, dialogue.cpp, reads.cpp and Python.
#include "ggml-moe.h"

#include <cstring>
#include <exception>

#include "executor.h"
#include "model.h"
#include "os.h"
#include "proxy.h"
#include "table.h"

// ---- buffer: address space without memory; weights never arrive here

static const char * moe_buffer_type_name(ggml_backend_buffer_type_t) { return "MOE"; }

static void moe_buffer_free(ggml_backend_buffer_t buffer) {
    if (buffer->size > 0) {
        moe::os::release(buffer->context, buffer->size);
    }
}

static void * moe_buffer_base(ggml_backend_buffer_t buffer) { return buffer->context; }
static void   moe_buffer_memset(ggml_backend_buffer_t, ggml_tensor *, uint8_t, size_t, size_t) {}
static void   moe_buffer_set(ggml_backend_buffer_t, ggml_tensor *, const void *, size_t, size_t) {}

static void moe_buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void *, size_t, size_t) {
    GGML_ABORT("the weights of %s are on disk and cannot be read back through llama.cpp", tensor->name);
}

static void moe_buffer_clear(ggml_backend_buffer_t, uint8_t) {}

static const ggml_backend_buffer_i moe_buffer_iface = {
    /* .free_buffer   = */ moe_buffer_free,
    /* .get_base      = */ moe_buffer_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ moe_buffer_memset,
    /* .set_tensor    = */ moe_buffer_set,
    /* .get_tensor    = */ moe_buffer_get,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ moe_buffer_clear,
    /* .reset         = */ nullptr,
};

ggml_backend_buffer_t moe::address_space(ggml_backend_buffer_type_t buft, size_t size) {
    void * p = size == 0 ? (void *)64 : os::reserve(size);
    return p ? ggml_backend_buffer_init(buft, moe_buffer_iface, p, size) : nullptr;
}

size_t moe::address_space_alignment(ggml_backend_buffer_type_t) { return 64; }

static bool moe_buffer_type_is_host(ggml_backend_buffer_type_t) { return false; }

const moe::buffer_type_functions moe::expert_type = {
    /* .get_name       = */ moe_buffer_type_name,
    /* .alloc_buffer   = */ moe::address_space,
    /* .get_alignment  = */ moe::address_space_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ moe_buffer_type_is_host,
};

static bool is_moe_buffer_type(ggml_backend_buffer_type_t buft) { return moe::buffer_type::is_named_by(buft, moe_buffer_type_name); }

bool moe::is_expert_weight(const ggml_tensor * t) {
    return t != nullptr && t->buffer != nullptr && (is_moe_buffer_type(t->buffer->buft) || proxy::is_expert_type(t->buffer->buft));
}

// One that this backend computes with.
static bool is_expert_here(const ggml_tensor * t) { return moe::is_expert_weight(t) && is_moe_buffer_type(t->buffer->buft); }

// ---- backend: one per llama context

struct moe_backend {
    ggml_backend_t inner;
    moe::executor  executor;

    explicit moe_backend(ggml_backend_t b) : inner(b), executor(b) {}
    ~moe_backend() { ggml_backend_free(inner); }
};

static const char * moe_backend_name(ggml_backend_t) { return "MOE"; }

static void moe_backend_free(ggml_backend_t backend) {
    delete (moe_backend *)backend->context;
    delete backend;
}

static ggml_status moe_backend_graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    try {
        return ((moe_backend *)backend->context)->executor.compute(graph);
    } catch (const std::exception & e) {  // nothing may unwind through ggml's C frames
        fprintf(stderr, "moe: %s\n", e.what());
        return GGML_STATUS_ALLOC_FAILED;
    }
}

static const ggml_backend_i moe_backend_iface = {
    /* .get_name            = */ moe_backend_name,
    /* .free                = */ moe_backend_free,
    /* .set_tensor_async    = */ nullptr,
    /* .get_tensor_async    = */ nullptr,
    /* .set_tensor_2d_async = */ nullptr,
    /* .get_tensor_2d_async = */ nullptr,
    /* .cpy_tensor_async    = */ nullptr,
    /* .synchronize         = */ nullptr,
    /* .graph_plan_create   = */ nullptr,
    /* .graph_plan_free     = */ nullptr,
    /* .graph_plan_update   = */ nullptr,
    /* .graph_plan_compute  = */ nullptr,
    /* .graph_compute       = */ moe_backend_graph_compute,
    /* .event_record        = */ nullptr,
    /* .event_wait          = */ nullptr,
    /* .graph_optimize      = */ nullptr,
};

static ggml_guid_t moe_backend_guid() {
    static ggml_guid guid = {0x6d, 0x6f, 0x65, 0x2d, 0x67, 0x67, 0x75, 0x66, 0x2d, 0x70, 0x6c, 0x75, 0x67, 0x69, 0x6e, 0x31};
    return &guid;
}

// ---- device

static const char *               moe_device_name(ggml_backend_dev_t) { return "MOE"; }
static const char *               moe_device_description(ggml_backend_dev_t) { return "routed experts from disk"; }
static enum ggml_backend_dev_type moe_device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

static void moe_device_memory(ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = 0; }

static void moe_device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    memset(props, 0, sizeof(*props));
    props->name        = moe_device_name(dev);
    props->description = moe_device_description(dev);
    props->type        = moe_device_type(dev);
}

static ggml_backend_t moe_device_init(ggml_backend_dev_t dev, const char *) {
    ggml_backend_t inner = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (inner == nullptr) {
        return nullptr;
    }
    return new ggml_backend{moe_backend_guid(), moe_backend_iface, dev, new moe_backend(inner)};
}

// Activations live where the CPU backend's live, so nothing is copied between the two.
static ggml_backend_buffer_type_t moe_device_buffer_type(ggml_backend_dev_t) {
    return ggml_backend_dev_buffer_type(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
}

// Per-expert scales reach the chain as GET_ROWS(REPEAT(RESHAPE(scale)), ids). Taking these two as
// well keeps gate and up of one layer in one split. The down scale comes after our last node.
static bool is_scale(const ggml_tensor * t) {
    return t && t->op == GGML_OP_RESHAPE && t->src[0] && strstr(t->src[0]->name, "_exps.scale") && !strstr(t->src[0]->name, "down");
}

static bool moe_device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_NONE:
            return is_expert_here(op) || moe::is_table(op);
        case GGML_OP_VIEW:
            return moe::is_table(op);
        case GGML_OP_CPY:
            return moe::is_lookup(op);
        case GGML_OP_MUL_MAT_ID:
            return is_expert_here(op->src[0]);
        case GGML_OP_REPEAT:
            return is_scale(op->src[0]);
        case GGML_OP_GET_ROWS:
            return moe::is_lookup(op) || (op->src[0]->op == GGML_OP_REPEAT && is_scale(op->src[0]->src[0]));
        default:
            return moe::is_rowwise(op->op) && moe::chain_stage(op) == 1;
    }
}

static bool moe_device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    return is_moe_buffer_type(buft) || moe::is_table_type(buft) || ggml_backend_buft_is_host(buft);
}

static const ggml_backend_device_i moe_device_iface = {
    /* .get_name             = */ moe_device_name,
    /* .get_description      = */ moe_device_description,
    /* .get_memory           = */ moe_device_memory,
    /* .get_type             = */ moe_device_type,
    /* .get_props            = */ moe_device_props,
    /* .init_backend         = */ moe_device_init,
    /* .get_buffer_type      = */ moe_device_buffer_type,
    /* .get_host_buffer_type = */ nullptr,
    /* .buffer_from_host_ptr = */ nullptr,
    /* .supports_op          = */ moe_device_supports_op,
    /* .supports_buft        = */ moe_device_supports_buft,
    /* .offload_op           = */ nullptr,
    /* .event_new            = */ nullptr,
    /* .event_free           = */ nullptr,
    /* .event_synchronize    = */ nullptr,
};

static ggml_backend_device moe_device = {moe_device_iface, nullptr, nullptr};

// ---- registry

static const char *       moe_reg_name(ggml_backend_reg_t) { return "MOE"; }
static size_t             moe_reg_device_count(ggml_backend_reg_t) { return 1; }
static ggml_backend_dev_t moe_reg_device(ggml_backend_reg_t, size_t) { return &moe_device; }

// A device is not told, but whoever computes on it is this thread.
static thread_local int told_n_threads = 1;

int moe::n_threads() { return told_n_threads; }

void moe::set_n_threads(ggml_backend_t cpu, int n) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
    if (auto set = (ggml_backend_set_n_threads_t)ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set(cpu, n);
    }
}

static void moe_set_n_threads(ggml_backend_t backend, int n_threads) {
    told_n_threads = n_threads;
    moe::set_n_threads(((moe_backend *)backend->context)->inner, n_threads);
}

static void * moe_reg_proc_address(ggml_backend_reg_t, const char * name) {
    return strcmp(name, "ggml_backend_set_n_threads") == 0 ? (void *)moe_set_n_threads : nullptr;
}

// ggml's registry admits backends of its own version only, so any that is there tells which that is.
int moe::ggml_version() { return ggml_backend_reg_count() > 0 ? ggml_backend_reg_get(0)->api_version : 0; }

ggml_backend_dev_t moe::device() { return &moe_device; }

// ggml_backend_load calls it; a null is a refusal, for which library.py has the sentence.
extern "C" MOE_API ggml_backend_reg_t ggml_backend_init(void) {
    const int version = moe::ggml_version();
    if (version < MOE_GGML_OLDEST || version > MOE_GGML_NEWEST) {
        return nullptr;
    }
    static ggml_backend_reg reg = {
        version,
        {moe_reg_name, moe_reg_device_count, moe_reg_device, moe_reg_proc_address},
        nullptr,
    };
    moe_device.reg = &reg;
    return &reg;
}
