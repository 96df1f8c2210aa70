// Everything that is not a routed expert: read by name from its file into the memory that llama.cpp
// computes on, through two buffer types: the CPU's own memory, and ggml-cpu's repacked layout of it.
#pragma once

#include <string>
#include <unordered_map>
#include <vector>

#include "buffer_type.h"
#include "failure.h"

namespace moe {

class trunk {
  public:
    trunk(const moe_config & config, int api_version, failure & why);

    buffer_type plain, repacked;

    // Fills a tensor from its file; false when it is not of this model.
    bool read(ggml_tensor * tensor);
    // Where that tensor lies now; nullptr if it is unknown, not loaded or repacked.
    const void * data(const char * name) const;
    // A model is about to be loaded: nothing lies anywhere.
    void forget();

  private:
    int read_rows(const moe_trunk_tensor & t, ggml_tensor * tensor) const;

    std::vector<std::string>             paths_;
    std::vector<moe_trunk_tensor>        tensors_;
    std::unordered_map<std::string, int> by_name_;
    std::vector<const void *>            data_;
    failure &                            why_;
};

}  // namespace moe
