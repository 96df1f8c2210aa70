// Buffer types of ours, in the layout of the interface version that the loaded ggml speaks.
//
// Version 3 put two members into the middle of the table, and whatever follows them has no fixed place
// any more. So nothing of ggml's struct is read, ours or another's, but its first member.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#include "ggml-iface.h"
#include "moe.h"

namespace moe {

// What a buffer type does, by name; null where ggml's default will do: get_max_size, get_alloc_size, is_host.
struct buffer_type_functions {
    const char * (*get_name)(ggml_backend_buffer_type_t buft);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t buft, size_t size);
    size_t (*get_alignment)(ggml_backend_buffer_type_t buft);
    size_t (*get_max_size)(ggml_backend_buffer_type_t buft);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t buft, const struct ggml_tensor * tensor);
    bool (*is_host)(ggml_backend_buffer_type_t buft);
};

// ggml_backend_buffer_type_i of each version.
template <int VERSION>
struct buffer_type_table;

// Its members are those above, in that order.
template <>
struct buffer_type_table<2> : buffer_type_functions {
    explicit buffer_type_table(const buffer_type_functions & f) : buffer_type_functions(f) {}
};

template <>
struct buffer_type_table<3> {
    const char * (*get_name)(ggml_backend_buffer_type_t buft);
    ggml_backend_buffer_t (*alloc_buffer)(ggml_backend_buffer_type_t buft, size_t size);
    // Null: ggml lays the tensors out itself and calls alloc_buffer.
    ggml_backend_buffer_t (*alloc_buffer_n)(ggml_backend_buffer_type_t buft, struct ggml_tensor ** tensors, int n_tensors);
    size_t (*get_alignment)(ggml_backend_buffer_type_t buft);
    size_t (*get_max_size)(ggml_backend_buffer_type_t buft);
    size_t (*get_alloc_size)(ggml_backend_buffer_type_t buft, const struct ggml_tensor * tensor);
    // Null likewise: ggml adds up get_alloc_size.
    size_t (*get_alloc_size_n)(ggml_backend_buffer_type_t buft, struct ggml_tensor ** tensors, int n_tensors);
    bool (*is_host)(ggml_backend_buffer_type_t buft);

    explicit buffer_type_table(const buffer_type_functions & f)
        : get_name(f.get_name),
          alloc_buffer(f.alloc_buffer),
          alloc_buffer_n(nullptr),
          get_alignment(f.get_alignment),
          get_max_size(f.get_max_size),
          get_alloc_size(f.get_alloc_size),
          get_alloc_size_n(nullptr),
          is_host(f.is_host) {}
};

// ggml_backend_buffer_type of each version.
template <int VERSION>
struct described_buffer_type {
    buffer_type_table<VERSION> iface;
    ggml_backend_dev_t         device;
    void *                     context;
};

// ggml is shown the beginning of it.
class buffer_type {
  public:
    // `owner` answers for its buffers. Throws for a version that is not described here.
    buffer_type(int api_version, const buffer_type_functions & functions, ggml_backend_dev_t device, void * owner) : owner_(owner) {
        static_assert(MOE_GGML_OLDEST == 2 && MOE_GGML_NEWEST == 3, "each version is described above and chosen here");
        switch (api_version) {
            case 2:
                new (&v2_) described_buffer_type<2>{buffer_type_table<2>(functions), device, nullptr};
                break;
            case 3:
                new (&v3_) described_buffer_type<3>{buffer_type_table<3>(functions), device, nullptr};
                break;
            default:
                throw std::runtime_error("version " + std::to_string(api_version) + " of ggml's backend interface is not known");
        }
    }
    buffer_type(const buffer_type &)             = delete;
    buffer_type & operator=(const buffer_type &) = delete;

    ggml_backend_buffer_type_t ggml() { return (ggml_backend_buffer_type_t)this; }
    // Whether a buffer type of anyone's has this get_name, the first member in every version.
    static bool is_named_by(ggml_backend_buffer_type_t buft, const char * (*get_name)(ggml_backend_buffer_type_t)) {
        return *(const char * (**)(ggml_backend_buffer_type_t))buft == get_name;
    }
    // Of one that is ours.
    static void * owner(ggml_backend_buffer_type_t buft) { return ((buffer_type *)buft)->owner_; }

  private:
    union {
        described_buffer_type<2> v2_;
        described_buffer_type<3> v3_;
    };
    void * owner_;
};

}  // namespace moe
