// The functions of moe.h that make, feed and ask a model; those of repack, gates and probe are with what
// they call.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "executor.h"
#include "ggml-moe.h"
#include "model.h"
#include "repack.h"

static void put(const std::string & text, char * out, size_t n) {
    if (n > 0) {
        const size_t k = std::min(n - 1, text.size());
        memcpy(out, text.data(), k);
        out[k] = 0;
    }
}

int32_t moe_ggml_version(void) { return moe::ggml_version(); }

moe_model * moe_model_new(const moe_config * config, char * error, size_t n_error) {
    try {
        if (config->abi != MOE_ABI) {  // before anything else of it is believed
            throw std::runtime_error("the plugin and the Python package are of different versions; reinstall moe-gguf");
        }
        return new moe_model(*config, moe::ggml_version(), moe::device());
    } catch (const std::exception & e) {
        put(e.what(), error, n_error);
        return nullptr;
    }
}

void         moe_model_free(moe_model * model) { delete model; }
void *       moe_model_expert_buffer_type(moe_model * model) { return model->experts.ggml(); }
void *       moe_model_device_expert_buffer_type(moe_model * model) { return model->device ? model->device->experts.ggml() : nullptr; }
void *       moe_model_trunk_buffer_type(moe_model * model) { return model->trunk.plain.ggml(); }
void *       moe_model_repack_buffer_type(moe_model * model) { return moe::repack_type() ? model->trunk.repacked.ggml() : nullptr; }
void *       moe_model_device_buffer_type(moe_model * model) { return model->device ? model->trunk.on_device.ggml() : nullptr; }
void *       moe_model_device(moe_model * model) { return model->device ? model->device->ggml() : nullptr; }
void *       moe_model_table_buffer_type(moe_model * model) { return model->tables->type.ggml(); }
FILE *       moe_model_stream(moe_model * model) { return model->open_stream(); }
const void * moe_model_trunk_data(moe_model * model, const char * name) { return model->trunk.data(name); }
int64_t      moe_model_work_bytes(moe_model * model, int32_t n_used, int32_t n_ubatch) {
    return moe::executor::work_bytes(model->weights, n_used, n_ubatch);
}
int32_t moe_model_arena(moe_model * model, int32_t n_slots) { return model->allocate(n_slots) ? 0 : -1; }
int32_t moe_model_is_pinned(moe_model * model) { return model->arena->is_pinned(); }
int32_t moe_model_pools(moe_model * model, const int32_t * n_slots, int32_t n_windows) {
    return model->allocate_pools(n_slots, n_windows) ? 0 : -1;
}
int64_t moe_model_copy_ns(moe_model * model, int32_t layer, int32_t n) {
    std::lock_guard<std::mutex> lock(model->step);
    return model->pools->copy_ns(layer, n, [model](int i) { return model->arena->place(i, 0); });
}
void moe_model_join_copies(moe_model * model, int32_t on) { model->pools->join(on != 0); }
void moe_model_compute_on_cpu(moe_model * model) { model->cpu_experts = true; }
void moe_model_pool_keys(moe_model * model, int32_t layer, int32_t * keys) {
    for (int slot = 0; slot < model->pools->n_slots(layer); slot++) {
        keys[slot] = model->pools->key_of(layer, slot);
    }
}
int32_t moe_model_upload(moe_model * model, const int32_t * slots, const int32_t * pool_slots, int32_t n) {
    std::lock_guard<std::mutex> lock(model->step);
    return model->upload_all(slots, pool_slots, n) ? 0 : -1;
}
int32_t moe_model_tables(moe_model * model, const moe_table * tables, int32_t n_tables, int64_t cache_bytes) {
    return model->tables->hold(tables, n_tables, cache_bytes) ? 0 : -1;
}
void moe_model_fetch_rows(moe_model * model, int32_t table, const int32_t * rows, int32_t n_rows) {
    model->tables->fetch(table, rows, n_rows);
}
void moe_model_bind(moe_model * model, moe_route_fn route, moe_route_fn guess, moe_route_fn tell) {
    model->dialogue.route = route;
    model->dialogue.guess = guess;
    model->dialogue.told  = tell;
}
int32_t moe_model_tell(moe_model * model) {
    std::lock_guard<std::mutex> lock(model->step);
    return model->dialogue.tell();
}
void moe_model_guess_with(moe_model * model, moe_gates * gates) { model->dialogue.gates = gates; }
void moe_model_step(moe_model * model, int32_t phase, int32_t n_sequences) {
    std::lock_guard<std::mutex> lock(model->step);
    model->dialogue.step(phase, n_sequences);
    model->reads->step(n_sequences);
}
moe_call * moe_model_call(moe_model * model) { return &model->dialogue.call; }
void       moe_model_stats(moe_model * model, moe_stats * stats) {
    std::lock_guard<std::mutex> lock(model->step);
    *stats = model->count();
}

int32_t moe_model_error(moe_model * model, char * error, size_t n_error) {
    std::string   sentence;
    const int32_t kind = model->failure.take(sentence);
    put(sentence, error, n_error);
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
