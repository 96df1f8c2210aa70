// The ggml backend: buffers, backend, device and registry tables in ggml's own order, then the
// C functions of moe.h. Everything that thinks is in executor.cpp, reads.cpp and Python.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "executor.h"
#include "ggml-iface.h"
#include "model.h"
#include "repack.h"

// ---- buffer: address space without memory; weights never arrive here

static const char * moe_buffer_type_name(ggml_backend_buffer_type_t) { return "MOE"; }

static void moe_buffer_free(ggml_backend_buffer_t buffer) {
    if (buffer->size > 0) {
        munmap(buffer->context, buffer->size);
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

static ggml_backend_buffer_t moe_buffer_type_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    void * p = size == 0 ? (void *)64 : mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        return nullptr;
    }
    return ggml_backend_buffer_init(buft, moe_buffer_iface, p, size);
}

static size_t moe_buffer_type_alignment(ggml_backend_buffer_type_t) { return 64; }
static bool   moe_buffer_type_is_host(ggml_backend_buffer_type_t) { return false; }

static const ggml_backend_buffer_type_i moe_buffer_type_iface = {
    /* .get_name       = */ moe_buffer_type_name,
    /* .alloc_buffer   = */ moe_buffer_type_alloc,
    /* .get_alignment  = */ moe_buffer_type_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ moe_buffer_type_is_host,
};

// ---- trunk buffer: the CPU's own memory, filled by us instead of by llama.cpp

static const char * trunk_buffer_type_name(ggml_backend_buffer_type_t) { return "MOE_TRUNK"; }

static ggml_backend_buffer_t trunk_inner(ggml_backend_buffer_t buffer) { return (ggml_backend_buffer_t)buffer->context; }

static void   trunk_buffer_free(ggml_backend_buffer_t buffer) { ggml_backend_buffer_free(trunk_inner(buffer)); }
static void * trunk_buffer_base(ggml_backend_buffer_t buffer) { return ggml_backend_buffer_get_base(trunk_inner(buffer)); }

static void trunk_buffer_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    memset((char *)tensor->data + offset, value, size);
}

static void trunk_buffer_set(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    // While loading, data points into the empty mapping. A tensor that is not the model's (a LoRA
    // adapter's) comes with its bytes.
    if (!((moe_model *)buffer->buft->context)->read_trunk(tensor)) {
        memcpy((char *)tensor->data + offset, data, size);
    }
}

static void trunk_buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *)tensor->data + offset, size);
}

static void trunk_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) { ggml_backend_buffer_clear(trunk_inner(buffer), value); }

static const ggml_backend_buffer_i trunk_buffer_iface = {
    /* .free_buffer   = */ trunk_buffer_free,
    /* .get_base      = */ trunk_buffer_base,
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ trunk_buffer_memset,
    /* .set_tensor    = */ trunk_buffer_set,
    /* .get_tensor    = */ trunk_buffer_get,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ trunk_buffer_clear,
    /* .reset         = */ nullptr,
};

static ggml_backend_buffer_type_t trunk_inner_type() {
    return ggml_backend_dev_buffer_type(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
}

static ggml_backend_buffer_t trunk_buffer_type_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t inner = ggml_backend_buft_alloc_buffer(trunk_inner_type(), size);
    return inner ? ggml_backend_buffer_init(buft, trunk_buffer_iface, inner, size) : nullptr;
}

static size_t trunk_buffer_type_alignment(ggml_backend_buffer_type_t) { return ggml_backend_buft_get_alignment(trunk_inner_type()); }
static bool   trunk_buffer_type_is_host(ggml_backend_buffer_type_t) { return true; }

static const ggml_backend_buffer_type_i trunk_buffer_type_iface = {
    /* .get_name       = */ trunk_buffer_type_name,
    /* .alloc_buffer   = */ trunk_buffer_type_alloc,
    /* .get_alignment  = */ trunk_buffer_type_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ trunk_buffer_type_is_host,
};

// ---- repacked trunk buffer: what ggml-cpu takes for its own CPU_REPACK buffer, filled by us

struct repacked_trunk {
    ggml_backend_buffer_t inner;
    moe_model *           model;
};

static repacked_trunk & repacked(ggml_backend_buffer_t buffer) { return *(repacked_trunk *)buffer->context; }

static void repacked_buffer_free(ggml_backend_buffer_t buffer) {
    ggml_backend_buffer_free(repacked(buffer).inner);
    delete &repacked(buffer);
}

static void * repacked_buffer_base(ggml_backend_buffer_t buffer) { return ggml_backend_buffer_get_base(repacked(buffer).inner); }

static ggml_status repacked_buffer_init(ggml_backend_buffer_t buffer, ggml_tensor * tensor) {
    return repacked(buffer).inner->iface.init_tensor(repacked(buffer).inner, tensor);
}

static void repacked_buffer_set(ggml_backend_buffer_t buffer, ggml_tensor * tensor, const void *, size_t, size_t) {
    if (!repacked(buffer).model->read_trunk(tensor)) {
        GGML_ABORT("%s is not a tensor of this model", tensor->name);
    }
}

static const ggml_backend_buffer_i repacked_buffer_iface = {
    /* .free_buffer   = */ repacked_buffer_free,
    /* .get_base      = */ repacked_buffer_base,
    /* .init_tensor   = */ repacked_buffer_init,
    /* .memset_tensor = */ nullptr,
    /* .set_tensor    = */ repacked_buffer_set,
    /* .get_tensor    = */ nullptr,
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ nullptr,
    /* .clear         = */ nullptr,
    /* .reset         = */ nullptr,
};

static const char * repacked_buffer_type_name(ggml_backend_buffer_type_t) { return "MOE_TRUNK_REPACK"; }

// ggml-cpu knows its repacked tensors by their buffer's type, so the buffer has to carry that type.
static ggml_backend_buffer_t repacked_buffer_type_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    ggml_backend_buffer_t inner = ggml_backend_buft_alloc_buffer(moe::repack_type(), size);
    return inner ? ggml_backend_buffer_init(moe::repack_type(), repacked_buffer_iface,
                                            new repacked_trunk{inner, (moe_model *)buft->context}, size)
                 : nullptr;
}

static const ggml_backend_buffer_type_i repacked_buffer_type_iface = {
    /* .get_name       = */ repacked_buffer_type_name,
    /* .alloc_buffer   = */ repacked_buffer_type_alloc,
    /* .get_alignment  = */ trunk_buffer_type_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ nullptr,
};

static bool is_moe_buffer_type(ggml_backend_buffer_type_t buft) { return buft->iface.get_name == moe_buffer_type_name; }

bool moe::is_expert_weight(const ggml_tensor * t) { return t != nullptr && t->buffer != nullptr && is_moe_buffer_type(t->buffer->buft); }

// ---- backend: one per llama context

struct moe_backend {
    ggml_backend_t               inner;
    ggml_backend_set_n_threads_t set_n_threads;
    moe::executor                executor;

    explicit moe_backend(ggml_backend_t b) : inner(b), set_n_threads(nullptr), executor(b) {
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(b));
        set_n_threads          = (ggml_backend_set_n_threads_t)ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    }
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
            return moe::is_expert_weight(op);
        case GGML_OP_MUL_MAT_ID:
            return moe::is_expert_weight(op->src[0]);
        case GGML_OP_REPEAT:
            return is_scale(op->src[0]);
        case GGML_OP_GET_ROWS:
            return op->src[0]->op == GGML_OP_REPEAT && is_scale(op->src[0]->src[0]);
        default:
            return moe::is_rowwise(op->op) && moe::chain_stage(op) == 1;
    }
}

static bool moe_device_supports_buft(ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
    return is_moe_buffer_type(buft) || ggml_backend_buft_is_host(buft);
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

static void moe_set_n_threads(ggml_backend_t backend, int n_threads) {
    auto * b = (moe_backend *)backend->context;
    if (b->set_n_threads) {
        b->set_n_threads(b->inner, n_threads);
    }
}

static void * moe_reg_proc_address(ggml_backend_reg_t, const char * name) {
    return strcmp(name, "ggml_backend_set_n_threads") == 0 ? (void *)moe_set_n_threads : nullptr;
}

extern "C" MOE_API ggml_backend_reg_t ggml_backend_init(void) {
    static ggml_backend_reg reg = {
        MOE_GGML_API_VERSION,
        {moe_reg_name, moe_reg_device_count, moe_reg_device, moe_reg_proc_address},
        nullptr,
    };
    moe_device.reg = &reg;
    return &reg;
}

// ---- moe.h

static void put(const std::string & text, char * out, size_t n) {
    if (n > 0) {
        const size_t k = std::min(n - 1, text.size());
        memcpy(out, text.data(), k);
        out[k] = 0;
    }
}

moe_model * moe_model_new(const moe_config * config, char * error, size_t n_error) {
    try {
        if (config->abi != MOE_ABI) {  // before anything else of it is believed
            throw std::runtime_error("the plugin and the Python package are of different versions; reinstall moe-gguf");
        }
        auto * model           = new moe_model(*config);
        model->expert_buft     = {moe_buffer_type_iface, &moe_device, model};
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        model->trunk_buft      = {trunk_buffer_type_iface, cpu, model};
        model->repack_buft     = {repacked_buffer_type_iface, cpu, model};
        return model;
    } catch (const std::exception & e) {
        put(e.what(), error, n_error);
        return nullptr;
    }
}

void         moe_model_free(moe_model * model) { delete model; }
void *       moe_model_expert_buffer_type(moe_model * model) { return &model->expert_buft; }
void *       moe_model_trunk_buffer_type(moe_model * model) { return &model->trunk_buft; }
void *       moe_model_repack_buffer_type(moe_model * model) { return moe::repack_type() ? &model->repack_buft : nullptr; }
FILE *       moe_model_stream(moe_model * model) { return model->open_stream(); }
const void * moe_model_trunk_data(moe_model * model, const char * name) { return model->trunk_data(name); }
int32_t      moe_model_arena(moe_model * model, int32_t n_slots) { return model->allocate_arena(n_slots) ? 0 : -1; }
void         moe_model_guess_with(moe_model * model, moe_gates * gates) { model->gates = gates; }
void         moe_model_bind(moe_model * model, moe_route_fn route, moe_route_fn guess) {
    model->route = route;
    model->guess = guess;
}
void moe_model_step(moe_model * model, int32_t phase, int32_t n_sequences) {
    std::lock_guard<std::mutex> lock(model->step);
    model->call.phase       = phase;
    model->call.n_sequences = n_sequences;
    model->call.settled     = 0;
}
moe_call * moe_model_call(moe_model * model) { return &model->call; }

void moe_model_stats(moe_model * model, moe_stats * stats, int32_t reset) {
    std::lock_guard<std::mutex> lock(model->step);
    auto &                      count = model->reads->count;
    *stats                            = model->stats;
    stats->read_bytes                 = count.bytes;
    stats->guess_bytes                = count.guess_bytes;
    stats->disk_ns                    = model->reads->disk_ns() - model->disk_ns_at_reset;
    stats->reads                      = count.reads;
    stats->bounced                    = count.bounced;
    stats->guess_loads                = count.guess_loads;
    stats->guess_promoted             = count.guess_promoted;
    stats->guess_cancelled            = count.guess_cancelled;
    if (reset) {
        model->stats = {};
        std::fill_n(model->call.settled_hits, model->n_layers, 0);
        model->call.settled_pairs = 0;
        model->disk_ns_at_reset += stats->disk_ns;
        for (auto * c : {&count.bytes, &count.guess_bytes, &count.reads, &count.bounced, &count.guess_loads, &count.guess_promoted,
                         &count.guess_cancelled}) {
            c->store(0);
        }
    }
}

int32_t moe_model_error(moe_model * model, char * error, size_t n_error) {
    std::lock_guard<std::mutex> lock(model->error_mutex);
    put(model->error, error, n_error);
    const int32_t kind = model->error_kind;
    model->error_kind  = moe::ERROR_NONE;
    model->error.clear();
    return kind;
}

void    moe_model_slots(moe_model * model, int32_t * keys) { model->reads->keys(keys); }
int32_t moe_model_fill(moe_model * model, const int32_t * keys, const int32_t * slots, int32_t n) {
    std::lock_guard<std::mutex> lock(model->step);
    return model->fill(keys, slots, n) ? 0 : -1;
}
void    moe_model_cancel_guesses(moe_model * model) { model->reads->cancel_guesses(); }
void    moe_model_timeline(moe_model * model, int32_t capacity) { model->reads->history.resize(capacity); }
int32_t moe_model_timeline_read(moe_model * model, moe_event * events, int32_t capacity) {
    return model->reads->history.read(events, capacity);
}
void moe_model_inject(moe_model * model, int32_t skip, int32_t err) { model->reads->inject(skip, err); }
