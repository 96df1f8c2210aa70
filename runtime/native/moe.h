// The plugin's whole surface towards Python: everything the ctypes mirror in runtime/plugin/abi.py
// repeats, and nothing else. Change a struct here and tests/test_abi.py fails until the mirror,
// MOE_ABI and the expected sizes follow.
//
// Units: *_bytes in bytes, *_ns in nanoseconds. Layers, experts, slots and files are indices.
// A key is (copy * n_layers + layer) * n_experts + expert, where n_layers is the highest MoE layer
// plus one: the first copy's keys are layer * n_experts + expert.
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

#define MOE_ABI 14
// Versions of ggml's backend interface that the plugin can speak.
#define MOE_GGML_OLDEST 2
#define MOE_GGML_NEWEST 3
#define MOE_MAX_GUESSES 256
// By layer, in spares and copy_chances.
#define MOE_MAX_SPARES 32
// An expert may be stored twice: as llama.cpp's tensors are, and once more in fewer bits.
#define MOE_COPIES 2
// In plan_pools.
#define MOE_ON_CPU (-2)

struct moe_model;
struct moe_gates;

// How a matrix lies in its slot.
enum moe_layout {
    MOE_LAYOUT_PLAIN = 0,
    MOE_LAYOUT_REPACKED,  // as ggml-cpu's repacked kernels of this machine want it
    MOE_LAYOUT_FOREIGN,   // stored as another machine's kernels want it: made plain after each read
    MOE_LAYOUT_REPACK,    // stored plain: made MOE_LAYOUT_REPACKED after each read
};

// One routed-expert tensor. The arrays are per copy; type -1: there is no such copy.
struct moe_tensor {
    char    name[64];
    int64_t slot_offset[MOE_COPIES];
    int64_t ne[2];  // of one expert's matrix
    int32_t type[MOE_COPIES];
    int32_t layout[MOE_COPIES];
    int32_t transform[MOE_COPIES];  // of a foreign layout: index in moe_config.transforms
    int32_t layer;
    int32_t reserved;
};

// A contiguous piece of one expert on disk and where in the slot it goes. Sorted by key.
struct moe_part {
    int64_t offset;
    int64_t n_bytes;
    int64_t slot_offset;
    int32_t key;
    int32_t file;
};

// Undoes an interleaving of `rows` rows: of each group of rows * block_bytes bytes, bit i of the
// plain blocks (one after the other) is bit source[i] of the group, flipped where flip says so.
struct moe_transform {
    int32_t         rows;
    int32_t         block_bytes;
    const int32_t * source;  // [8 * rows * block_bytes]
    const uint8_t * flip;    // [rows * block_bytes]
};

// One tensor of the trunk, read whole into the memory llama.cpp computes on.
struct moe_trunk_tensor {
    char    name[64];
    int64_t offset;
    int64_t n_bytes;
    int32_t file;
    int32_t repacked;  // 1: llama.cpp computes on it in ggml-cpu's repacked layout
};

// A tensor of the trunk that stays on disk because only rows of it are looked up.
struct moe_table {
    char    name[64];
    int64_t offset;
    int64_t row_bytes;
    int64_t n_rows;
    int32_t file;
    int32_t reserved;
};

struct moe_config {
    int32_t                         abi;
    int32_t                         n_experts;
    int32_t                         n_files;
    int32_t                         n_trunk_tensors;
    int32_t                         n_tensors;
    int32_t                         n_parts;
    int32_t                         n_transforms;
    int32_t                         lanes;         // reader threads
    int32_t                         direct;        // 1: past the page cache
    int32_t                         offset_align;  // of file offsets in direct reads
    int32_t                         memory_align;  // of destinations in direct reads
    int64_t                         slot_bytes;    // distance between two slots
    int64_t                         header_bytes;
    int64_t                         stream_bytes;  // size of the GGUF the header describes
    const char * const *            paths;
    const struct moe_trunk_tensor * trunk_tensors;
    const struct moe_tensor *       tensors;
    const struct moe_part *         parts;
    const struct moe_transform *    transforms;
    const uint8_t *                 header;
    const char *                    device;  // ggml's name of the one that computes the experts; NULL: the processor
};

enum moe_spare {
    MOE_SPARE_NONE    = -1,  // no more
    MOE_SPARE_TAKEN   = -2,
    MOE_SPARE_GUESSES = -3,  // those of guesses copied meanwhile that the event does not ask for, by expert
};

// What a step of llama.cpp does. Not to be read off its number of tokens: eight sequences decoding are
// eight tokens, and a prompt may end in a batch of one.
enum moe_phase {
    MOE_PHASE_PREFILL = 0,
    MOE_PHASE_DECODE,  // one token of each sequence
    MOE_PHASE_MIXED,   // some of each
};

// One route event and its answer, in memory shared with the callback. The plugin fills the first
// half before the call, the route callback fills the plan. Where it sets wants_guesses, the guess
// callback runs once the plan's reads are under way and fills the guesses. All pointers are valid
// during the calls only, except the arrays, whose addresses never change.
struct moe_call {
    int32_t         layer;
    int32_t         n_tokens;
    int32_t         n_used;        // experts per token
    int32_t         n_experts;     // distinct experts in this event
    int32_t         continuation;  // 1: further tensors of the layer and step of the previous event
    int32_t         n_embd;
    int32_t         phase;  // of the running step, as moe_model_step said
    int32_t         n_sequences;
    int64_t         x_stride;    // bytes from one token's row of x to the next
    int64_t         now_ns;      // a steady clock
    int64_t         since_ns;    // since what was guessed after the event before could be copied to the device; 0: it could not
    int64_t         disk_ns;     // of it so far, some lane was reading
    int64_t         read_bytes;  // so far
    int64_t         stall_ns;    // of the event before this one: with nothing to compute
    int64_t         guess_ns;    // likewise: inside the guess callback
    const float *   x;           // input of the expert FFN, [n_tokens][n_embd] (Fate's gate input)
    const int32_t * ids;         // [n_tokens][n_used]
    int32_t *       experts;     // [n_experts] distinct, in first-seen order
    int32_t *       counts;      // [n_experts] (token, rank) pairs per expert
    int32_t *       cancelled;   // [n_cancelled] keys of guesses that will not arrive any more
    int32_t         n_cancelled;
    int32_t         n_late;  // of the event before: guesses it demanded while they were being read
    int32_t         wants_guesses;
    int32_t         settled;  // set by the callback: the rest of this decode step finds all it needs, so do not ask

    int32_t * plan_experts;  // [n_experts] in execution order
    int32_t * plan_slots;
    int32_t * plan_loads;  // 0: it is there or on its way; 1 + copy: read that copy into the slot first
    int32_t * guess_keys;  // [n_guesses]
    int32_t * guess_slots;
    int32_t * guess_pools;  // -1: read the key into the slot. Else the slot holds it, and the pool of its layer gets it there
    int32_t   n_guesses;

    int32_t   n_predicted;     // by the model's gates, for the guess callback to choose from
    int32_t * predicted_keys;  // [n_predicted], the nearest layer first, best first
    float *   predicted_chances;

    // [n_experts] on a device: the slot in the layer's pool. What is there already has a plan_slot of -1. In an
    // event of more experts than the pool has slots -1: for this event only, into the window.
    // MOE_ON_CPU: computed by the processor, only where it may; MOE_ON_CPU - 1 - slot: likewise, and copied into
    // that slot of the pool for later events.
    int32_t * plan_pools;

    // On a device, where a callback has set may_pass, an event of a decode step passes unasked if its layer's pool
    // or memory has all its experts: the missing ones, most demanded first, take the first spares of the layer that
    // hold nothing the event asks for. With may_copy the best guesses after it that are in memory, as long as their
    // chances are above the layer's copy_chances, one by one, are copied to the next layer's spares. The tell callback
    // then finds all this as the event's plan and guesses, while the device computes, and fills the spares again.
    int32_t * spares;        // [n_layers][MOE_MAX_SPARES] slots of the layer's pool, or one of enum moe_spare
    float *   copy_chances;  // [n_layers][MOE_MAX_SPARES]
    int32_t   may_pass;
    int32_t   may_copy;
    int32_t   passed;  // the event is not told of yet; whoever tells of it makes it 0
    int32_t   n_layers;

    int64_t * settled_hits;   // by layer: experts that were found unasked, since the model was opened
    int64_t   settled_pairs;  // likewise (token, rank) pairs

    int32_t may_compute;  // the processor may compute experts of this event, which is a device's
    int32_t cpu_experts;  // that it computed since whoever has read it made it 0
    int64_t cpu_pairs;    // likewise (token, rank) pairs
    int64_t cpu_ns;       // likewise
    int32_t cpu_rest;     // set by the callback: so many events in which it may not, and its inputs stay on the device

    // After an event of more experts than its pool has slots: keys of one later layer, likeliest first, that go to that
    // layer's window while the device computes. Those that neither its pool nor memory has are passed over.
    int32_t   n_window;
    int32_t * window_keys;  // [n_window], at most n_experts
};

// Returns 1 when its part is filled; anything else fails the step. Not 0 for success: that is what
// ctypes returns when the callback raised.
typedef int32_t (*moe_route_fn)(void);

struct moe_stats {
    int64_t read_bytes;
    int64_t guess_bytes;  // of them for guesses
    int64_t disk_ns;      // some lane was reading
    int64_t reads;        // positional reads issued
    int64_t bounced;      // of them through an aligned bounce buffer
    int64_t stall_ns;     // layers waiting with nothing to compute
    int64_t compute_ns;   // inner device at work on experts
    int64_t route_ns;     // inside the route callback
    int64_t guess_ns;     // inside the guess callback
    int64_t tell_ns;      // inside the tell callback, while the device computes
    int64_t events;
    int64_t passed;    // of them on a device, nobody was asked
    int64_t whole;     // events run as one graph on the original nodes
    int64_t rounds;    // graphs run over a subset of the (token, expert) pairs
    int64_t generic;   // expert matmuls run node by node
    int64_t recycled;  // slots used twice within one event
    int64_t guess_loads;
    int64_t guess_promoted;  // demanded while still being read
    int64_t guess_cancelled;
    int64_t table_rows;     // looked up in tables on disk
    int64_t table_missed;   // of them read while the model waited
    int64_t table_ahead;    // rows fetched before they were asked for
    int64_t uploads;        // experts copied to the device
    int64_t uploads_ahead;  // of them, before they were asked for
    int64_t upload_bytes;
    int64_t routed;         // events after which the device itself has applied the next layer's router
    int64_t waits;          // for the ids of a layer, on a device
    int64_t wait_ns;        // likewise: what came before was computed meanwhile
    int64_t ranges;         // pieces of events that needed more experts than a pool has slots
    int64_t cpu_experts;    // of a device's events, computed by the processor
    int64_t cpu_pairs;      // likewise (token, rank) pairs
    int64_t cpu_ns;         // likewise
    int64_t scratch_bytes;  // high-water mark of the rows that were kept and gathered
};

enum moe_gating {
    MOE_GATING_SOFTMAX = 0,
    MOE_GATING_SIGMOID,
    MOE_GATING_SOFTMAX_WEIGHT,
    MOE_GATING_SQRT_SOFTPLUS,
};

// How a layer chooses experts; runtime/plugin/gates.py says what each field means.
struct moe_router {
    const float * weight;      // [n_experts][n_embd]
    const float * logit_bias;  // [n_experts] or NULL, added to the logits
    const float * bias;        // [n_experts] or NULL, added to the gated scores for the choice alone
    const float * norm;        // [n_embd] of the norm before it; only MOE_GATES_RENORM needs it
    int32_t       n_experts;
    int32_t       n_embd;
    int32_t       gating;
    int32_t       n_groups;
    int32_t       n_groups_used;
    int32_t       reserved;
};

// What is fed to the router of a later layer.
enum moe_gates_variant {
    MOE_GATES_RAW = 0,   // this layer's gate input as it is
    MOE_GATES_RENORM,    // with this layer's norm weight taken out and the later layer's put in
    MOE_GATES_RESIDUAL,  // plus the mean of how the gate input changed between the two so far
};

struct moe_gates_config {
    const struct moe_router * routers;  // [n_layers], in model order; what they point to stays valid
    const int32_t *           layers;   // [n_layers] their numbers
    int32_t                   n_layers;
    int32_t                   n_used;  // experts per token
    int32_t                   width;   // experts ranked per token, at most any router's n_experts
    int32_t                   variant;
    int32_t                   ahead;  // for how many layers to guess
    int32_t                   reserved;
};

enum moe_event_kind {
    MOE_EVENT_LAYER   = 0,  // one event of a layer's experts, from asking to the last result
    MOE_EVENT_ROUTE   = 1,  // the route callback
    MOE_EVENT_COMPUTE = 2,  // the inner device at work on one graph
    MOE_EVENT_STALL   = 3,  // nothing to compute: waiting for a read
    MOE_EVENT_DEMAND  = 4,  // one positional read of an expert that a layer waits for
    MOE_EVENT_GUESS   = 5,  // likewise of one that was guessed
    MOE_EVENT_PREDICT = 6,  // the guess callback
};

// One event of the timeline; times are of the monotonic clock.
struct moe_event {
    int32_t kind;
    int32_t lane;  // of a read; of what one of several threads computed or waited for, its number; -1 otherwise
    int32_t key;   // of a read; the layer otherwise
    int32_t reserved;
    int64_t start_ns;
    int64_t end_ns;
};

struct moe_probe {
    int32_t direct;  // 1: direct reads work on this file
    int32_t offset_align;
    int32_t memory_align;
    int32_t reserved;
};

// The version that the ggml of this process speaks; 0 where it cannot be known. Outside the two above
// the plugin registers nothing.
MOE_API int32_t moe_ggml_version(void);

// NULL on failure, with a sentence in error[n_error].
MOE_API struct moe_model * moe_model_new(const struct moe_config * config, char * error, size_t n_error);
// Joins the lanes and frees the arena. Every llama model and context using it must be gone.
MOE_API void moe_model_free(struct moe_model * model);
// The ggml_backend_buffer_type_t for tensor_buft_overrides: of experts that are computed on the processor,
// and of all the rest.
MOE_API void * moe_model_expert_buffer_type(struct moe_model * model);
// Of experts that are computed on the device. NULL without one.
MOE_API void * moe_model_device_expert_buffer_type(struct moe_model * model);
MOE_API void * moe_model_trunk_buffer_type(struct moe_model * model);
// For trunk tensors marked repacked. NULL where this machine's ggml-cpu repacks nothing.
MOE_API void * moe_model_repack_buffer_type(struct moe_model * model);
// For trunk tensors in the device's memory. NULL without a device.
MOE_API void * moe_model_device_buffer_type(struct moe_model * model);
// The ggml_backend_dev_t for llama_model_params.devices: the device with our buffer types. NULL without one.
MOE_API void * moe_model_device(struct moe_model * model);
// For the tensors that moe_model_tables names.
MOE_API void * moe_model_table_buffer_type(struct moe_model * model);
// A FILE * that llama.cpp takes for the complete model: it reads the header from it and maps the
// rest, of which nothing is ever touched. The caller closes it with fclose.
MOE_API FILE * moe_model_stream(struct moe_model * model);
// Where the loaded model keeps a trunk tensor, in the file's own type; NULL if it does not, or not
// plainly. Valid as long as the llama model is.
MOE_API const void * moe_model_trunk_data(struct moe_model * model, const char * name);
// What a batch of so many tokens takes at most, with every expert in a slot, beside the slots: the
// plugin's own buffers and those of the kernels it calls.
MOE_API int64_t moe_model_work_bytes(struct moe_model * model, int32_t n_used, int32_t n_ubatch);
// Allocates the slots; once, before the first decode. 0, or -1 when memory is refused.
MOE_API int32_t moe_model_arena(struct moe_model * model, int32_t n_slots);
// Whether the slots lie in memory that the device copies from directly; known once they are allocated.
MOE_API int32_t moe_model_is_pinned(struct moe_model * model);
// Allocates the pools on the device, by layer n_slots[n_layers], 0 for one that
// is computed on the processor; once, before the first decode. A layer with
// a slot for every expert is not asked for: expert e is in slot e from the start. With windows there is room
// besides for all experts of any layer, in turn, and with two for those of the next one meanwhile; without any, an
// event of more experts than a pool has slots is asked for in pieces. 0, or -1 when memory is refused.
MOE_API int32_t moe_model_pools(struct moe_model * model, const int32_t * n_slots, int32_t n_windows);
// Nanoseconds in which so many slots are copied into a layer's pool, which holds nothing yet; only before the
// first step.
MOE_API int64_t moe_model_copy_ns(struct moe_model * model, int32_t layer, int32_t n);
// Whether copies to the device that lie evenly apart go in one call, as they do at first; only between steps.
MOE_API void moe_model_join_copies(struct moe_model * model, int32_t on);
// From now on the processor may compute experts of the device's events; plans say which.
MOE_API void moe_model_compute_on_cpu(struct moe_model * model);
// keys[slots of the layer]: the key each slot of a pool holds, -1 for none.
MOE_API void moe_model_pool_keys(struct moe_model * model, int32_t layer, int32_t * keys);
// Copies n experts from slots that hold them into slots of their layers' pools, and returns when all are
// there; only between steps. 0, or -1 with a sentence for moe_model_error.
MOE_API int32_t moe_model_upload(struct moe_model * model, const int32_t * slots, const int32_t * pool_slots, int32_t n);
// Which tensors stay on disk, and the memory for rows of all of them together; once, before the model
// is loaded. 0, or -1 when memory is refused.
MOE_API int32_t moe_model_tables(struct moe_model * model, const struct moe_table * tables, int32_t n_tables, int64_t cache_bytes);
// Starts reading rows of one of them that the next steps will look up. A hint: what does not exist or
// does not fit is passed over.
MOE_API void moe_model_fetch_rows(struct moe_model * model, int32_t table, const int32_t * rows, int32_t n_rows);
MOE_API void moe_model_bind(struct moe_model * model, moe_route_fn route, moe_route_fn guess, moe_route_fn tell);
// Tells of an event that passed and is not told of; from any thread. As the callback: 1, or it raised.
MOE_API int32_t moe_model_tell(struct moe_model * model);
// From now on these gates guess for the model; NULL: none do. Not owned.
MOE_API void moe_model_guess_with(struct moe_model * model, struct moe_gates * gates);
// What the steps that follow do, and for how many sequences; said before each call of llama_decode.
// Until it is said: prefill, one.
MOE_API void              moe_model_step(struct moe_model * model, int32_t phase, int32_t n_sequences);
MOE_API struct moe_call * moe_model_call(struct moe_model * model);
// Since the model was opened: whoever wants less remembers where they stood.
MOE_API void moe_model_stats(struct moe_model * model, struct moe_stats * stats);
// The sentence of the last failed step, and clears it: 0 none, 1 a read failed, 2 anything else.
MOE_API int32_t moe_model_error(struct moe_model * model, char * error, size_t n_error);
// keys[n_slots]: the key each slot completely holds, -1 for none. For reconciling after a failure.
MOE_API void moe_model_slots(struct moe_model * model, int32_t * keys);
// Reads n experts into slots that hold nothing and returns when all are there; only between steps.
// 0, or -1 with a sentence for moe_model_error and none of these slots half loaded.
MOE_API int32_t moe_model_fill(struct moe_model * model, const int32_t * keys, const int32_t * slots, int32_t n);
// Drops every guess that no lane has started.
MOE_API void moe_model_cancel_guesses(struct moe_model * model);
// Starts recording events into a ring of this many, of which the newest are kept; 0 stops.
MOE_API void moe_model_timeline(struct moe_model * model, int32_t capacity);
// Moves the oldest recorded events to events[capacity] and returns how many.
MOE_API int32_t moe_model_timeline_read(struct moe_model * model, struct moe_event * events, int32_t capacity);
// Tests only: the read after `skip` further ones fails with error number err (0: reads short;
// negative: takes -err milliseconds longer).
MOE_API void moe_model_inject(struct moe_model * model, int32_t skip, int32_t err);

// 1: ggml-cpu has a repacked layout for matrices of this type and shape on this machine.
MOE_API int32_t moe_repack_supported(int32_t type, int64_t ne0, int64_t ne1);
// Brings rows of such a matrix into that layout: all, or those of whole interleaved groups. Both are
// of the type's plain size.
MOE_API void moe_repack(int32_t type, int64_t ne0, int64_t ne1, int64_t n_rows, const uint8_t * plain, uint8_t * repacked);

// Guesses with the routers of the layers ahead. Alone, or as part of a model, which then guesses
// after each event that the route callback wants guesses for, before it asks for a choice.
MOE_API struct moe_gates * moe_gates_new(const struct moe_gates_config * config);
MOE_API void               moe_gates_free(struct moe_gates * gates);
// From a layer's gate input, n_tokens rows of x, x_stride bytes apart: how many guesses, at most
// ahead * n_experts, the nearest layer first and of each the best guess first. A chance is that any
// token asks for the expert.
MOE_API int32_t moe_gates_predict(struct moe_gates * gates, int32_t layer, const float * x, int64_t x_stride, int32_t n_tokens,
                                  int32_t * layers, int32_t * experts, float * chances);
// What a layer asked for, [n_tokens][n_used]: teaches what was predicted for it.
MOE_API void moe_gates_observe(struct moe_gates * gates, int32_t layer, const int32_t * ids, int32_t n_tokens, int32_t n_used);
// An event passes that is neither observed nor predicted from.
MOE_API void moe_gates_forget(struct moe_gates * gates);
// Lately: of the experts a token used, the share that was guessed first; -1 where nothing was.
MOE_API float moe_gates_recall(struct moe_gates * gates, int32_t layer);

// Tries direct reads of a file and finds the smallest alignments that work.
MOE_API void moe_probe_direct(const char * path, struct moe_probe * probe);
// Bytes per second of reading blobs of `bytes` at the given offsets with `lanes` threads.
MOE_API double moe_probe_speed(const char * path, const int64_t * offsets, int32_t n, int64_t bytes, int32_t lanes, int32_t direct);

#ifdef __cplusplus
}
#endif
