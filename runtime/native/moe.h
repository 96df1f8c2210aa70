// The plugin's whole surface towards Python: everything the ctypes mirror in runtime/plugin.py
// repeats, and nothing else. Change a struct here and tests/test_abi.py fails until the mirror,
// MOE_ABI and the expected sizes follow.
//
// Units: *_bytes in bytes, *_ns in nanoseconds. Layers, experts, slots and files are indices.
// A key is layer * n_experts + expert.
#pragma once

#include <stdint.h>
#include <stdio.h>

#if defined(_WIN32)
#define MOE_API __declspec(dllexport)
#else
#define MOE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MOE_ABI 2
#define MOE_MAX_GUESSES 256

struct moe_model;

// One routed-expert tensor: expert e lies at offset + e * expert_bytes and is read to
// slot_offset within its slot.
struct moe_tensor {
    char    name[64];
    int64_t offset;
    int64_t expert_bytes;
    int64_t slot_offset;
    int32_t layer;
    int32_t file;
};

// One tensor of the trunk, read whole into the memory llama.cpp computes on.
struct moe_trunk_tensor {
    char    name[64];
    int64_t offset;
    int64_t n_bytes;
    int32_t file;
    int32_t reserved;
};

struct moe_config {
    int32_t                         abi;
    int32_t                         n_experts;
    int32_t                         n_files;
    int32_t                         n_trunk_tensors;
    int32_t                         n_tensors;
    int32_t                         lanes;         // reader threads
    int32_t                         direct;        // 1: O_DIRECT
    int32_t                         offset_align;  // of file offsets in direct reads
    int32_t                         memory_align;  // of destinations in direct reads
    int32_t                         reserved;
    int64_t                         slot_bytes;  // distance between two slots
    int64_t                         header_bytes;
    int64_t                         stream_bytes;  // size of the GGUF the header describes
    const char * const *            paths;
    const struct moe_trunk_tensor * trunk_tensors;
    const struct moe_tensor *       tensors;
    const uint8_t *                 header;
};

// One route event and its answer, in memory shared with the callback. The plugin fills the first
// half before the call, the callback fills the second half. All pointers are valid during the
// call only, except the arrays, whose addresses never change.
struct moe_call {
    int32_t         layer;
    int32_t         n_tokens;
    int32_t         n_used;        // experts per token
    int32_t         n_experts;     // distinct experts in this event
    int32_t         continuation;  // 1: further tensors of the layer and step of the previous event
    int32_t         n_embd;
    int64_t         x_stride;  // bytes from one token's row of x to the next
    const float *   x;         // input of the expert FFN, [n_tokens][n_embd] (Fate's gate input)
    const int32_t * ids;       // [n_tokens][n_used]
    int32_t *       experts;   // [n_experts] distinct, in first-seen order
    int32_t *       counts;    // [n_experts] (token, rank) pairs per expert

    int32_t * plan_experts;  // [n_experts] in execution order
    int32_t * plan_slots;
    int32_t * plan_loads;  // 1: read the expert into the slot first; 0: it is there or on its way
    int32_t * guess_keys;  // [n_guesses]
    int32_t * guess_slots;
    int32_t   n_guesses;
    int32_t   reserved;
};

// Returns 1 when the plan is filled; anything else fails the step. Not 0 for success: that is what
// ctypes returns when the callback raised.
typedef int32_t (*moe_route_fn)(void);

struct moe_stats {
    int64_t read_bytes;
    int64_t reads;       // positional reads issued
    int64_t bounced;     // of them through an aligned bounce buffer
    int64_t stall_ns;    // layers waiting with nothing to compute
    int64_t compute_ns;  // inner device at work on experts
    int64_t route_ns;    // inside the route callback
    int64_t events;
    int64_t whole;     // events run as one graph on the original nodes
    int64_t rounds;    // graphs run over a subset of the (token, expert) pairs
    int64_t generic;   // expert matmuls run node by node
    int64_t recycled;  // slots used twice within one event
    int64_t guess_loads;
    int64_t guess_promoted;  // demanded while still being read
    int64_t guess_cancelled;
    int64_t scratch_bytes;  // high-water mark of the executor's own buffers
};

enum moe_event_kind {
    MOE_EVENT_LAYER   = 0,  // one event of a layer's experts, from asking to the last result
    MOE_EVENT_ROUTE   = 1,  // the route callback
    MOE_EVENT_COMPUTE = 2,  // the inner device at work on one graph
    MOE_EVENT_STALL   = 3,  // nothing to compute: waiting for a read
    MOE_EVENT_DEMAND  = 4,  // one positional read of an expert that a layer waits for
    MOE_EVENT_GUESS   = 5,  // likewise of one that was guessed
};

// One event of the timeline; times are of the monotonic clock.
struct moe_event {
    int32_t kind;
    int32_t lane;  // of a read; -1 otherwise
    int32_t key;   // of a read; the layer otherwise
    int32_t reserved;
    int64_t start_ns;
    int64_t end_ns;
};

struct moe_probe {
    int32_t direct;  // 1: O_DIRECT reads work on this file
    int32_t offset_align;
    int32_t memory_align;
    int32_t reserved;
};

// NULL on failure, with a sentence in error[n_error].
MOE_API struct moe_model * moe_model_new(const struct moe_config * config, char * error, size_t n_error);
// Joins the lanes and frees the arena. Every llama model and context using it must be gone.
MOE_API void moe_model_free(struct moe_model * model);
// The ggml_backend_buffer_type_t for tensor_buft_overrides: of the experts, and of all the rest.
MOE_API void * moe_model_expert_buffer_type(struct moe_model * model);
MOE_API void * moe_model_trunk_buffer_type(struct moe_model * model);
// A FILE * that llama.cpp takes for the complete model: it reads the header from it and maps the
// rest, of which nothing is ever touched. The caller closes it with fclose.
MOE_API FILE * moe_model_stream(struct moe_model * model);
// Allocates the slots; once, before the first decode. 0, or -1 when memory is refused.
MOE_API int32_t           moe_model_arena(struct moe_model * model, int32_t n_slots);
MOE_API void              moe_model_bind(struct moe_model * model, moe_route_fn route);
MOE_API struct moe_call * moe_model_call(struct moe_model * model);
MOE_API void              moe_model_stats(struct moe_model * model, struct moe_stats * stats, int32_t reset);
// The sentence of the last failed step, and clears it: 0 none, 1 a read failed, 2 anything else.
MOE_API int32_t moe_model_error(struct moe_model * model, char * error, size_t n_error);
// keys[n_slots]: the key each slot completely holds, -1 for none. For reconciling after a failure.
MOE_API void moe_model_slots(struct moe_model * model, int32_t * keys);
// Drops every guess that no lane has started.
MOE_API void moe_model_cancel_guesses(struct moe_model * model);
// Starts recording events into a ring of this many, of which the newest are kept; 0 stops.
MOE_API void moe_model_timeline(struct moe_model * model, int32_t capacity);
// Moves the oldest recorded events to events[capacity] and returns how many.
MOE_API int32_t moe_model_timeline_read(struct moe_model * model, struct moe_event * events, int32_t capacity);
// Tests only: the read after `skip` further ones fails with error number err (0: reads short;
// negative: takes -err milliseconds longer).
MOE_API void moe_model_inject(struct moe_model * model, int32_t skip, int32_t err);

// Tries O_DIRECT on a file and finds the smallest alignments that work.
MOE_API void moe_probe_direct(const char * path, struct moe_probe * probe);
// Bytes per second of reading blobs of `bytes` at the given offsets with `lanes` threads.
MOE_API double moe_probe_speed(const char * path, const int64_t * offsets, int32_t n, int64_t bytes, int32_t lanes, int32_t direct);

#ifdef __cplusplus
}
#endif
