// One open model as the plugin sees it: the parts that a step passes through, and the counters. Decides
// nothing.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "buffer_type.h"
#include "dialogue.h"
#include "failure.h"
#include "moe.h"
#include "pools.h"
#include "proxy.h"
#include "reads.h"
#include "table.h"
#include "trunk.h"
#include "weights.h"

struct moe_model {
    // Throws std::runtime_error with a sentence.
    moe_model(const moe_config & config, int api_version, ggml_backend_dev_t accelerator);
    ~moe_model();

    FILE * open_stream();
    bool   allocate(int n_slots);
    // Starts reading an expert into a slot.
    void load(int slot, int key, bool guess);
    // By layer, on the device.
    bool allocate_pools(const int32_t * n_slots, int n_windows);
    // Starts copying what a slot holds into one of a layer's pool; -1: into the window.
    void upload(int slot, int layer, int pool_slot);
    // Copies experts from slots to pools and waits for all of them; false after a failure.
    bool upload_all(const int32_t * slots, const int32_t * pool_slots, int n);
    // The slot a key was last read into, or -1.
    int slot_of(int key) const { return slot_of_[key]; }
    // Where it is completely, or -1.
    int slot_in_memory(int key) const;
    // Whether a slot holds or awaits it; a failed or cancelled read may go unnoticed.
    bool is_loaded(int key) const { return slot_of_[key] >= 0 && reads->key_of(slot_of_[key]) == key; }
    // Reads experts into slots and waits for all of them; false after a failure.
    bool fill(const int32_t * keys, const int32_t * slots, int n);
    // Adds an event of a layer to the timeline; `thread`: of one among several.
    void record(int kind, int layer, int64_t start_ns, int thread = -1) {
        if (reads->history.on()) {
            reads->history.add(kind, thread, layer, start_ns);
        }
    }
    // The counters of all parts, since the model was opened.
    moe_stats count() const;

    const moe::weights           weights;
    moe::failure                 failure;
    moe::buffer_type             experts;  // what marks a tensor as ours
    std::unique_ptr<moe::proxy>  device;   // null: experts are computed on the processor
    moe::trunk                   trunk;
    std::unique_ptr<moe::arena>  arena;
    std::unique_ptr<moe::pools>  pools;  // as device
    std::unique_ptr<moe::reads>  reads;
    std::unique_ptr<moe::tables> tables;
    moe::dialogue                dialogue;
    bool                         cpu_experts = false;  // the processor may compute some of a device's events
    moe_stats                    stats{};              // those of steps
    std::mutex                   step;                 // one context at a time computes on the slots
    ggml_backend_t               computing = nullptr;  // the device's stream whose launches may still read pools

  private:
    std::vector<uint8_t>   header_;
    int64_t                stream_bytes_;
    std::vector<int>       slot_of_;
    std::vector<moe::part> parts_;
    std::vector<int64_t>   read_by_;  // slot -> ticket of the copy that reads it
};
