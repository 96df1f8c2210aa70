#include "table.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "ggml-moe.h"
#include "os.h"

namespace moe {

// What is kept per row beside its bytes: its link, its entry in the index, its part in an errand.
constexpr int64_t ROW_OVERHEAD_BYTES = 160;
// Rows this close on disk are read as one: the bytes between them cost less than another read.
constexpr int64_t GAP_BYTES = 4096;
// Rows that are fetched ahead come in errands of so many: who needs one of them waits for all.
constexpr size_t AHEAD_ROWS = 256;

// ---- the cache

row_cache::row_cache(const moe_table & t, int64_t bytes) : table(t) {
    const int64_t n = std::max<int64_t>(1, std::min(t.n_rows, bytes / (t.row_bytes + ROW_OVERHEAD_BYTES)));
    memory_         = (char *)os::allocate(n * t.row_bytes);
    if (memory_ == nullptr) {
        throw std::bad_alloc();
    }
    links_.resize(n + 1);
    links_.back().newer = links_.back().older = (int)n;
    for (int slot = 0; slot < n; slot++) {
        insert_newest(slot);
    }
    slot_of_.reserve(n);
}

row_cache::~row_cache() { os::release(memory_, capacity() * table.row_bytes); }

void row_cache::insert_newest(int slot) {
    link &    ring       = links_.back();
    const int second     = ring.older;
    links_[slot].newer   = capacity();
    links_[slot].older   = second;
    links_[second].newer = slot;
    ring.older           = slot;
}

void row_cache::remove(int slot) {
    const link & l        = links_[slot];
    links_[l.newer].older = l.older;
    links_[l.older].newer = l.newer;
}

int row_cache::find(int64_t row) {
    const auto it = slot_of_.find(row);
    if (it == slot_of_.end()) {
        return -1;
    }
    remove(it->second);
    insert_newest(it->second);
    return it->second;
}

void row_cache::give(int slot, int64_t row, const std::shared_ptr<errand> & bringer) {
    link & l = links_[slot];
    if (l.row >= 0) {
        slot_of_.erase(l.row);
    }
    l.row         = row;
    l.bringer     = bringer;
    slot_of_[row] = slot;
    remove(slot);
    insert_newest(slot);
}

void row_cache::forget(const std::shared_ptr<errand> & failed) {
    const std::shared_ptr<errand> gone = failed;  // the argument may be one of those that are cleared
    for (link & l : links_) {
        if (l.bringer == gone) {
            slot_of_.erase(l.row);
            l.row     = -1;
            l.bringer = nullptr;
        }
    }
}

// ---- the buffer type: what marks a tensor as a table

static const char * table_type_name(ggml_backend_buffer_type_t) { return "MOE_TABLE"; }

static const buffer_type_functions table_type = {
    /* .get_name       = */ table_type_name,
    /* .alloc_buffer   = */ address_space,
    /* .get_alignment  = */ address_space_alignment,
    /* .get_max_size   = */ nullptr,
    /* .get_alloc_size = */ nullptr,
    /* .is_host        = */ nullptr,
};

static const ggml_tensor * whole(const ggml_tensor * t) { return t->view_src ? t->view_src : t; }

bool is_table_type(ggml_backend_buffer_type_t buft) { return buffer_type::is_named_by(buft, table_type_name); }

bool is_table(const ggml_tensor * t) {
    t = t ? whole(t) : nullptr;
    return t != nullptr && t->buffer != nullptr && is_table_type(t->buffer->buft);
}

bool is_lookup(const ggml_tensor * node) {
    const ggml_tensor * from = node->src[0];
    if (!is_table(from) || node->type != GGML_TYPE_F32 || whole(from)->ne[2] != 1 || whole(from)->ne[3] != 1) {
        return false;
    }
    switch (node->op) {
        case GGML_OP_GET_ROWS:
            return from->view_src == nullptr;
        case GGML_OP_CPY: {  // of whole rows, one behind the other: gemma4 casts a view of its first row
            const size_t row = whole(from)->nb[1];
            return ggml_is_contiguous(from) && ggml_is_contiguous(node) && from->view_offs % row == 0 && ggml_nbytes(from) % row == 0;
        }
        default:
            return false;
    }
}

// ---- lookups

tables::tables(int api_version, ggml_backend_dev_t device, moe::reads & reads, failure & why)
    : type(api_version, table_type, device, this), reads_(reads), why_(why) {}

tables & tables::of(const ggml_tensor * lookup) { return *(tables *)buffer_type::owner(whole(lookup->src[0])->buffer->buft); }

bool tables::hold(const moe_table * tables, int n, int64_t cache_bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
        for (int i = 0; i < n; i++) {
            caches_.push_back(std::make_unique<row_cache>(tables[i], cache_bytes / n));
        }
    } catch (const std::bad_alloc &) {
        return false;
    }
    return true;
}

void tables::fetch(int table, const int32_t * rows, int n) {
    std::lock_guard<std::mutex> lock(mutex_);
    row_cache &                 cache = *caches_[table];
    int                         left  = cache.capacity() / 2;
    auto                        e     = std::make_shared<errand>();
    missing_.clear();
    for (int i = 0; i < n && left > 0; i++) {
        if (rows[i] < 0 || rows[i] >= cache.table.n_rows || cache.find(rows[i]) >= 0) {
            continue;
        }
        const int slot = cache.oldest();
        if (cache.bringer(slot) && !cache.bringer(slot)->done()) {
            break;  // the cache is full of what is on its way
        }
        cache.give(slot, rows[i], e);
        missing_.emplace_back(rows[i], slot);
        left--;
        count_.ahead++;
        if (missing_.size() == AHEAD_ROWS) {
            send(cache, e, missing_, false);
            e = std::make_shared<errand>();
        }
    }
    send(cache, e, missing_, false);
}

bool tables::compute(ggml_tensor * node) {
    if (ggml_nelements(node) == 0 || !(node->flags & GGML_TENSOR_FLAG_COMPUTE)) {
        return true;  // of the branch of a graph that this step does not take
    }
    std::lock_guard<std::mutex> lock(mutex_);
    row_cache * const           cache = cache_of(node);
    if (cache == nullptr || !read_rows(node, cache->table)) {
        return false;
    }
    const ggml_tensor * table    = whole(node->src[0]);
    const auto          to_float = ggml_get_type_traits(table->type)->to_float;
    const size_t        stride   = node->op == GGML_OP_GET_ROWS ? node->nb[1] : table->ne[0] * sizeof(float);
    const int           n_rows   = (int)rows_.size();
    count_.asked += n_rows;
    for (int first = 0, n = 0; first < n_rows; first += n) {
        n = std::min(n_rows - first, cache->capacity());
        if (!load(*cache, rows_.data() + first, n)) {
            return false;
        }
        for (int i = 0; i < n; i++) {
            float * const out = (float *)((char *)node->data + (first + i) * stride);
            if (table->type == GGML_TYPE_F32) {
                memcpy(out, cache->memory(slots_[i]), cache->table.row_bytes);
            } else {
                to_float(cache->memory(slots_[i]), out, table->ne[0]);
            }
        }
    }
    return true;
}

// Also refuses what is not the tensor that was announced: an adapter's, in a buffer like the table's.
row_cache * tables::cache_of(const ggml_tensor * node) {
    const ggml_tensor * table = whole(node->src[0]);
    for (const auto & cache : caches_) {
        const moe_table & t = cache->table;
        if (strcmp(t.name, table->name) == 0 && (int64_t)table->nb[1] == t.row_bytes && table->ne[1] == t.n_rows) {
            return cache.get();
        }
    }
    why_.set(ERROR_OTHER, std::string(table->name) + " is not a table of this model");
    return nullptr;
}

// Which rows a node asks for. ggml-cpu would end the process over one that does not exist.
bool tables::read_rows(const ggml_tensor * node, const moe_table & table) {
    rows_.clear();
    if (node->op == GGML_OP_CPY) {
        const ggml_tensor * from = node->src[0];
        for (int64_t i = 0; i < (int64_t)ggml_nbytes(from) / table.row_bytes; i++) {
            rows_.push_back((int64_t)from->view_offs / table.row_bytes + i);
        }
        return true;
    }
    const ggml_tensor * ids = node->src[1];
    for (int64_t i = 0; i < ids->ne[0]; i++) {
        const int32_t row = *(const int32_t *)((const char *)ids->data + i * ids->nb[0]);
        if (row < 0 || row >= table.n_rows) {
            why_.set(ERROR_OTHER,
                     "row " + std::to_string(row) + " of " + table.name + " was asked for, which has " + std::to_string(table.n_rows));
            return false;
        }
        rows_.push_back(row);
    }
    return true;
}

// Brings rows, at most as many as the cache has slots, and says in slots_ where each one is.
bool tables::load(row_cache & cache, const int64_t * rows, int n) {
    const auto e = std::make_shared<errand>();
    slots_.resize(n);
    for (int i = 0; i < n; i++) {
        slots_[i] = cache.find(rows[i]);  // all that are there, before any goes
    }
    for (int i = 0; i < n; i++) {
        slots_[i] = slots_[i] >= 0 ? slots_[i] : cache.find(rows[i]);  // the same row may be asked for twice
        if (slots_[i] >= 0) {
            continue;
        }
        slots_[i] = cache.oldest();
        if (cache.bringer(slots_[i])) {
            wait(cache.bringer(slots_[i]));
        }
        cache.give(slots_[i], rows[i], e);
        missing_.emplace_back(rows[i], slots_[i]);
    }
    count_.missed += missing_.size();
    send(cache, e, missing_, true);
    for (int i = 0; i < n; i++) {
        const std::shared_ptr<errand> bringer = cache.bringer(slots_[i]);
        if (bringer == nullptr) {
            continue;
        }
        wait(bringer);
        if (bringer->error.empty()) {
            cache.arrived(slots_[i]);
            continue;
        }
        cache.forget(bringer);
        if (bringer != e) {  // it was fetched ahead: whoever needs it tries once more
            return load(cache, rows, n);
        }
        why_.set(ERROR_READ, e->error);
        return false;
    }
    return true;
}

void tables::wait(const std::shared_ptr<errand> & e) {
    if (!e->done()) {
        const int64_t t0 = now_ns();
        reads_.wait(e);
        count_.stall_ns += now_ns() - t0;
    }
}

// Cuts what is missing into ranges, neighbours together, and has them read.
void tables::send(row_cache & cache, const std::shared_ptr<errand> & e, std::vector<std::pair<int64_t, int>> & rows, bool urgent) {
    const moe_table & t = cache.table;
    std::sort(rows.begin(), rows.end());
    for (const auto & [row, slot] : rows) {
        const int64_t begin = t.offset + row * t.row_bytes, end = begin + t.row_bytes;
        for (int64_t from = begin, to = 0; from < end; from = to) {
            to                    = std::min(end, from + RANGE_BYTES);
            errand::range * last  = e->ranges.empty() ? nullptr : &e->ranges.back();
            const int       piece = (int)e->pieces.size();
            e->pieces.push_back({from, to - from, cache.memory(slot) + (from - begin)});
            if (last && from - (last->offset + last->bytes) <= GAP_BYTES && to - last->offset <= RANGE_BYTES) {
                last->bytes = to - last->offset;
                last->end   = piece + 1;
            } else {
                e->ranges.push_back({t.file, from, to - from, piece, piece + 1});
            }
        }
    }
    rows.clear();
    if (!e->ranges.empty()) {
        reads_.send(e, urgent);
    }
}

tables::counters tables::counted() {
    std::lock_guard<std::mutex> lock(mutex_);
    return count_;
}

}  // namespace moe
