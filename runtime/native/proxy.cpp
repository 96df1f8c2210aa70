#include "proxy.h"

#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "device_executor.h"
#include "ggml-moe.h"
#include "model.h"

namespace moe {

namespace {

ggml_backend_dev_t find(const char * name) {
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t found = ggml_backend_dev_get(i);
        if (strcmp(ggml_backend_dev_name(found), name) == 0) {
            return found;
        }
    }
    throw std::runtime_error(std::string("there is no device ") + name);
}

ggml_backend_dev_t real(ggml_backend_dev_t dev) { return proxy::of(dev).real; }

// ---- backend: one per llama context; what it does not do itself, the real one does

struct device_backend {
    std::unique_ptr<ggml_backend, void (*)(ggml_backend_t)> inner;  // goes last
    device_executor                                         executor;

    device_backend(ggml_backend_t b, moe_model & model) : inner(b, ggml_backend_free), executor(b, model) {}
};

ggml_backend_t inner(ggml_backend_t backend) { return ((device_backend *)backend->context)->inner.get(); }

const char * backend_name(ggml_backend_t backend) { return ggml_backend_name(inner(backend)); }

void backend_free(ggml_backend_t backend) {
    delete (device_backend *)backend->context;
    delete backend;
}

ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    try {
        return ((device_backend *)backend->context)->executor.compute(graph);
    } catch (const std::exception & e) {  // nothing may unwind through ggml's C frames
        fprintf(stderr, "moe: %s\n", e.what());
        return GGML_STATUS_ALLOC_FAILED;
    }
}

void backend_set(ggml_backend_t b, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    inner(b)->iface.set_tensor_async(inner(b), t, data, offset, size);
}

void backend_get(ggml_backend_t b, const ggml_tensor * t, void * data, size_t offset, size_t size) {
    inner(b)->iface.get_tensor_async(inner(b), t, data, offset, size);
}

void backend_set_2d(ggml_backend_t b, ggml_tensor * t, const void * data, size_t offset, size_t size, size_t n, size_t stride_tensor,
                    size_t stride_data) {
    inner(b)->iface.set_tensor_2d_async(inner(b), t, data, offset, size, n, stride_tensor, stride_data);
}

void backend_get_2d(ggml_backend_t b, const ggml_tensor * t, void * data, size_t offset, size_t size, size_t n, size_t stride_tensor,
                    size_t stride_data) {
    inner(b)->iface.get_tensor_2d_async(inner(b), t, data, offset, size, n, stride_tensor, stride_data);
}

bool backend_copy(ggml_backend_t from, ggml_backend_t to, const ggml_tensor * src, ggml_tensor * dst) {
    if (from->iface.graph_compute == backend_compute) {
        from = inner(from);
    }
    if (to->iface.graph_compute == backend_compute) {
        to = inner(to);
    }
    return to->iface.cpy_tensor_async && to->iface.cpy_tensor_async(from, to, src, dst);
}

void backend_synchronize(ggml_backend_t b) { ggml_backend_synchronize(inner(b)); }
void backend_record(ggml_backend_t b, ggml_backend_event_t event) { inner(b)->iface.event_record(inner(b), event); }
void backend_wait(ggml_backend_t b, ggml_backend_event_t event) { inner(b)->iface.event_wait(inner(b), event); }
void backend_optimize(ggml_backend_t b, ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    inner(b)->iface.graph_optimize(inner(b), graph, params);
}

// A null of the real backend means something to ggml, so it stays one.
ggml_backend_i backend_iface(const ggml_backend_i & theirs) {
    return {
        /* .get_name            = */ backend_name,
        /* .free                = */ backend_free,
        /* .set_tensor_async    = */ theirs.set_tensor_async ? backend_set : nullptr,
        /* .get_tensor_async    = */ theirs.get_tensor_async ? backend_get : nullptr,
        /* .set_tensor_2d_async = */ theirs.set_tensor_2d_async ? backend_set_2d : nullptr,
        /* .get_tensor_2d_async = */ theirs.get_tensor_2d_async ? backend_get_2d : nullptr,
        /* .cpy_tensor_async    = */ theirs.cpy_tensor_async ? backend_copy : nullptr,
        /* .synchronize         = */ theirs.synchronize ? backend_synchronize : nullptr,
        /* .graph_plan_create   = */ nullptr,
        /* .graph_plan_free     = */ nullptr,
        /* .graph_plan_update   = */ nullptr,
        /* .graph_plan_compute  = */ nullptr,
        /* .graph_compute       = */ backend_compute,
        /* .event_record        = */ theirs.event_record ? backend_record : nullptr,
        /* .event_wait          = */ theirs.event_wait ? backend_wait : nullptr,
        /* .graph_optimize      = */ theirs.graph_optimize ? backend_optimize : nullptr,
    };
}

ggml_guid_t backend_guid() {
    static ggml_guid guid = {0x6d, 0x6f, 0x65, 0x2d, 0x67, 0x67, 0x75, 0x66, 0x2d, 0x64, 0x65, 0x76, 0x69, 0x63, 0x65, 0x31};
    return &guid;
}

// ---- device

const char *               device_name(ggml_backend_dev_t dev) { return ggml_backend_dev_name(real(dev)); }
const char *               device_description(ggml_backend_dev_t dev) { return ggml_backend_dev_description(real(dev)); }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t dev) { return ggml_backend_dev_type(real(dev)); }

void device_memory(ggml_backend_dev_t dev, size_t * free, size_t * total) { ggml_backend_dev_memory(real(dev), free, total); }

// The model's file cannot be mapped into the device's memory: there is none (stream.h).
void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    ggml_backend_dev_get_props(real(dev), props);
    props->caps.buffer_from_host_ptr = false;
    props->caps.mmap_support         = true;
}

ggml_backend_t device_init(ggml_backend_dev_t dev, const char * params) {
    ggml_backend_t theirs = ggml_backend_dev_init(real(dev), params);
    if (theirs == nullptr) {
        return nullptr;
    }
    return new ggml_backend{backend_guid(), backend_iface(theirs->iface), dev, new device_backend(theirs, proxy::of(dev).model())};
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t dev) { return ggml_backend_dev_buffer_type(real(dev)); }
ggml_backend_buffer_type_t device_host_type(ggml_backend_dev_t dev) { return ggml_backend_dev_host_buffer_type(real(dev)); }

// Whatever the device can compute on its own weights it can on ours, once they are in a pool: it is asked
// about a weight that has no place yet.
bool device_supports_op(ggml_backend_dev_t dev, const ggml_tensor * op) {
    if (op->op == GGML_OP_NONE && op->buffer && proxy::is_expert_type(op->buffer->buft)) {
        return true;
    }
    if (op->op != GGML_OP_MUL_MAT_ID || op->src[0]->buffer == nullptr || !proxy::is_expert_type(op->src[0]->buffer->buft)) {
        return ggml_backend_dev_supports_op(real(dev), op);
    }
    ggml_tensor node = *op, weight = *op->src[0];
    weight.buffer = nullptr;
    node.src[0]   = &weight;
    return ggml_backend_dev_supports_op(real(dev), &node);
}

bool device_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    moe_model & model = proxy::of(dev).model();
    return buft == proxy::of(dev).experts.ggml() || buft == model.trunk.on_device.ggml() || ggml_backend_dev_supports_buft(real(dev), buft);
}

bool device_offload_op(ggml_backend_dev_t dev, const ggml_tensor * op) { return ggml_backend_dev_offload_op(real(dev), op); }

ggml_backend_event_t device_event_new(ggml_backend_dev_t dev) { return ggml_backend_event_new(real(dev)); }
void                 device_event_free(ggml_backend_dev_t, ggml_backend_event_t event) { ggml_backend_event_free(event); }
void                 device_event_synchronize(ggml_backend_dev_t, ggml_backend_event_t event) { ggml_backend_event_synchronize(event); }

ggml_backend_device_i device_iface(const ggml_backend_device_i & theirs) {
    return {
        /* .get_name             = */ device_name,
        /* .get_description      = */ device_description,
        /* .get_memory           = */ device_memory,
        /* .get_type             = */ device_type,
        /* .get_props            = */ device_props,
        /* .init_backend         = */ device_init,
        /* .get_buffer_type      = */ device_buffer_type,
        /* .get_host_buffer_type = */ theirs.get_host_buffer_type ? device_host_type : nullptr,
        /* .buffer_from_host_ptr = */ nullptr,
        /* .supports_op          = */ device_supports_op,
        /* .supports_buft        = */ device_supports_buft,
        /* .offload_op           = */ theirs.offload_op ? device_offload_op : nullptr,
        /* .event_new            = */ theirs.event_new ? device_event_new : nullptr,
        /* .event_free           = */ theirs.event_free ? device_event_free : nullptr,
        /* .event_synchronize    = */ theirs.event_synchronize ? device_event_synchronize : nullptr,
    };
}

const char * expert_type_name(ggml_backend_buffer_type_t) { return "MOE_DEVICE"; }
bool         expert_type_is_host(ggml_backend_buffer_type_t) { return false; }

const buffer_type_functions expert_functions = {
    /* .get_name       = */ expert_type_name,
    /* .alloc_buffer   = */ address_space,
    /* .get_alignment  = */ address_space_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ expert_type_is_host,
};

}  // namespace

proxy::proxy(const char * name, int api_version, moe_model & model)
    : real(find(name)),
      experts(api_version, expert_functions, &device_, &model),
      model_(model),
      device_{device_iface(real->iface), real->reg, this} {}

bool proxy::is_expert_type(ggml_backend_buffer_type_t buft) { return buffer_type::is_named_by(buft, expert_type_name); }

}  // namespace moe
