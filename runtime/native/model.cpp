#include "model.h"

#include <algorithm>

#include "ggml-moe.h"
#include "os.h"
#include "stream.h"

moe_model::moe_model(const moe_config & config, int api_version, ggml_backend_dev_t accelerator)
    : weights(config),
      experts(api_version, moe::expert_type, accelerator, this),
      device(config.device ? std::make_unique<moe::proxy>(config.device, api_version, *this) : nullptr),
      trunk(config, api_version, device.get(), failure),
      arena(std::make_unique<moe::host_arena>(weights, device ? ggml_backend_dev_host_buffer_type(device->real) : nullptr)),
      pools(device ? std::make_unique<moe::pools>(weights, device->real) : nullptr),
      dialogue(*this),
      header_(config.header, config.header + config.header_bytes),
      stream_bytes_(config.stream_bytes),
      slot_of_(weights.n_keys(), -1) {
    moe::read_options options;
    options.lanes        = config.lanes;
    options.direct       = config.direct != 0;
    options.offset_align = config.offset_align;
    options.memory_align = config.memory_align;
    if (!weights.are_as_stored()) {
        options.finish = [this](int slot, int key) { arena->finish(slot, key); };
    }
    reads  = std::make_unique<moe::reads>(std::vector<std::string>(config.paths, config.paths + config.n_files), options);
    tables = std::make_unique<moe::tables>(api_version, accelerator, *reads, failure);
}

moe_model::~moe_model() {
    reads.reset();  // joins the lanes before their destinations go
    pools.reset();  // likewise the copies, before their sources
}

FILE * moe_model::open_stream() {
    trunk.forget();  // of an earlier load
    return moe::os::open_stream(std::make_unique<moe::stream>(header_, stream_bytes_));
}

bool moe_model::allocate(int n_slots) {
    if (!arena->allocate(n_slots)) {
        return false;
    }
    reads->resize(n_slots);
    read_by_.resize(n_slots, 0);
    return true;
}

// What is whole is so from the start: nothing else is ever put there.
bool moe_model::allocate_pools(const int32_t * n_slots, int n_windows) { return pools && pools->allocate(n_slots, n_windows); }

void moe_model::upload(int slot, int layer, int pool_slot) {
    const int    key    = reads->key_of(slot);
    const char * memory = arena->place(slot, 0);
    read_by_[slot]      = pool_slot < 0 ? pools->upload_to_window(key, memory) : pools->upload(layer, pool_slot, key, memory);
}

int moe_model::slot_in_memory(int key) const {
    const int slot = slot_of_[key];
    return slot >= 0 && reads->key_of(slot) == key && reads->state(slot) == moe::slot_state::READY ? slot : -1;
}

bool moe_model::upload_all(const int32_t * slots, const int32_t * pool_slots, int n) {
    int64_t ticket = 0;
    for (int i = 0; i < n; i++) {
        const bool exists = pools && slots[i] >= 0 && slots[i] < arena->n_slots() && reads->state(slots[i]) == moe::slot_state::READY;
        const int  key = exists ? reads->key_of(slots[i]) : -1, layer = weights.layer_of(std::max(key, 0));
        if (key < 0 || weights.copy_of(key) != 0 || pool_slots[i] < 0 || pool_slots[i] >= pools->n_slots(layer)) {
            if (pools) {
                pools->issue();  // of what has been started
            }
            failure.set(moe::ERROR_OTHER, "an expert to be copied to the device is not in memory, or has no slot there");
            return false;
        }
        upload(slots[i], layer, pool_slots[i]);
        ticket = read_by_[slots[i]];
    }
    if (n > 0) {
        pools->issue();
    }
    pools->settle(ticket);
    return true;
}

void moe_model::load(int slot, int key, bool guess) {
    if (pools) {
        pools->settle(read_by_[slot]);
    }
    parts_.clear();
    const auto [begin, end] = weights.parts(key);
    for (const moe_part * p = begin; p < end; p++) {
        parts_.push_back({p->file, p->offset, p->n_bytes, arena->place(slot, p->slot_offset)});
    }
    reads->submit(slot, key, parts_, guess);
    slot_of_[key] = slot;
}

bool moe_model::fill(const int32_t * keys, const int32_t * slots, int n) {
    for (int i = 0; i < n; i++) {
        if (!weights.is_key(keys[i]) || slots[i] < 0 || slots[i] >= arena->n_slots()) {
            failure.set(moe::ERROR_OTHER, "an expert or a slot to be filled does not exist");
            return false;
        }
    }
    for (int i = 0; i < n; i++) {
        load(slots[i], keys[i], false);
    }
    bool ok = true;
    for (int i = 0; i < n; i++) {
        reads->wait_any({slots[i]});
        ok = reads->state(slots[i]) == moe::slot_state::READY && ok;
    }
    if (!ok) {
        failure.set(moe::ERROR_READ, reads->last_error());
        reads->abandon({slots, slots + n});
    }
    return ok;
}

moe_stats moe_model::count() const {
    const auto & count  = reads->count;
    moe_stats    all    = stats;
    all.read_bytes      = count.bytes + count.errand_bytes;
    all.guess_bytes     = count.guess_bytes;
    all.disk_ns         = reads->disk_ns();
    all.reads           = count.reads;
    all.bounced         = count.bounced;
    all.guess_loads     = count.guess_loads;
    all.guess_promoted  = count.guess_promoted;
    all.guess_cancelled = count.guess_cancelled;
    if (pools) {
        all.uploads      = pools->count.uploads;
        all.upload_bytes = pools->count.bytes;
    }
    const auto rows  = tables->counted();
    all.table_rows   = rows.asked;
    all.table_missed = rows.missed;
    all.table_ahead  = rows.ahead;
    all.stall_ns += rows.stall_ns;
    return all;
}
