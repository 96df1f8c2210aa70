// What the rest of the plugin needs of its own registration in ggml.
#pragma once

#include "buffer_type.h"

namespace moe {

// The version of the backend interface that the ggml of this process speaks; 0 if it has no backend yet
// that would tell.
int ggml_version();
// Ours, once ggml has registered it.
ggml_backend_dev_t device();
// How many threads llama.cpp wants for the graph that this thread computes: it tells before each one.
int n_threads();
// Tells ggml-cpu's backend.
void set_n_threads(ggml_backend_t cpu, int n);
// Of routed experts: address space without memory.
extern const buffer_type_functions expert_type;
// What buffer types of weights that never arrive have in common: a place for a tensor, without memory.
ggml_backend_buffer_t address_space(ggml_backend_buffer_type_t buft, size_t size);
size_t                address_space_alignment(ggml_backend_buffer_type_t buft);

}  // namespace moe
